"""What only an accelerator can tell, in at most nine minutes on one host with GPUs or TPUs.

    python benchmarks/accelerator.py [--only PART …] [--minutes 9] [--tiny]

The parts, the most telling first:

- train_base, train_large: steps/s and MFU of training T5 1.1 (inputs of 128 tokens, packed, bfloat16,
  Adafactor, dropout). The goal is an MFU of 50%;
- beam_KIND: a search by T5 1.1 Base with 40 beams, batches of 64, at 8,841,823 simulated docids.
  constraint_cost is the time of all the search's own steps over that of the same search without a trie, given
  the same logits; constraint_share is their part of the whole search, of which the rest is the network's;
- atomic: the best 100 of 8,841,823 atomic docids;
- encoding: passages/s of a dual encoder of T5 1.1 Base's encoder, passages of 128 tokens;
- exact: the best 100 of 8,841,823 vectors of 768 dimensions, generated on the device;
- gradient_cache: a training step of a dual encoder with a batch of 65,536 pairs, in chunks.

What does not fit the memory is tried again with half as many rows, and a line says so. A part that fails,
hangs (say, in the compiler) or has no time left is skipped with a line. Parts run in processes of their own,
one after another, as a device's memory is free again when a process ends, and a TPU serves one at a time.
Nothing is read but this checkout: tokens are random numbers.

Compiling is in no rate, but takes of the nine minutes: compile_seconds, and seconds for all of a part. With
JAX_COMPILATION_CACHE_DIR=FOLDER a second run need not compile. --tiny measures nothing of interest, anywhere.

Prints a line a part as it ends, and last one line of JSON, also after an error or Ctrl-C: {"device",
"seconds", "mfu_goal", "parts": {part: its figures}, "skipped": {part: why}}. The MFU is null where the peak
of the device is not known (see mesh/hardware.py).
"""

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

# Nothing here imports JAX: the process that holds a TPU must be the one that measures.


@dataclasses.dataclass(frozen=True)
class Part:
    """`function` of _accelerator.py, called with the sizes and `arguments`.

    group: parts of one group that follow each other share a process, and what it has compiled;
    least: seconds without which it is not begun;
    most: seconds after which its process is ended.
    """

    group: str
    function: str
    arguments: tuple = ()
    least: int = 20
    most: int = 150


def _beam(kind: str, group: str) -> Part:
    return Part(group, "beam", (kind,), most=120)


PARTS = {
    "train_base": Part("train_base", "train", ("base",), most=180),
    "train_large": Part("train_large", "train", ("large",), most=180),
    "beam_naive": _beam("naive", "beam"),
    "beam_rq_8x256": _beam("rq_8x256", "beam"),
    "beam_semantic_2d": _beam("semantic_2d", "beam"),
    "atomic": Part("atomic", "atomic"),
    "encoding": Part("encoding", "encoding", most=90),
    "exact": Part("exact", "exact", most=90),
    "gradient_cache": Part("gradient_cache", "gradient_cache", least=45),
    "beam_rq_8x2048": _beam("rq_8x2048", "beam more"),
    "beam_semantic": _beam("semantic", "beam more"),
    "beam_naive_digits": _beam("naive_digits", "beam more"),
}
MFU_GOAL = 0.5
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # of a GPU; by default JAX takes 0.75
    "TF_CPP_MIN_LOG_LEVEL": "2",  # the compiler tells of each tiling that it does not like
}


# --- the process that measures ---


def measure(names: Sequence[str], tiny: bool) -> None:
    """Measures parts; prints a line of JSON as each begins, and one as it ends."""
    tell({"begins": names[0]})  # what begins first is to blame if JAX does not start
    import _accelerator

    sizes = _accelerator.TINY if tiny else _accelerator.FULL
    tell({"device": _accelerator.device()})
    for name in names:
        tell({"begins": name})
        part, began = PARTS[name], time.monotonic()
        try:
            figures = getattr(_accelerator, part.function)(sizes, *part.arguments)
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "")
            tell({"part": name, "skipped": f"{type(error).__name__}: {first[:300]}"})
        else:
            figures["seconds"] = time.monotonic() - began
            tell({"part": name, "figures": figures})


def tell(line: dict) -> None:
    print(json.dumps(line), flush=True)


# --- the process that watches ---


class Watch:
    """Runs the parts in other processes until the time is up, and keeps what they tell."""

    def __init__(self, minutes: float, tiny: bool):
        self.began, self.tiny = time.monotonic(), tiny
        self.ends = self.began + 60 * minutes
        self.device: dict | None = None
        self.parts: dict[str, dict] = {}
        self.skipped: dict[str, str] = {}

    def run(self, names: Sequence[str]) -> None:
        waiting = list(names)
        while waiting:
            left = self.ends - time.monotonic()
            if left < PARTS[waiting[0]].least:
                about = f"it takes at least {PARTS[waiting[0]].least} s"
                self.skip(waiting.pop(0), f"{max(left, 0):.0f} s of the time are left: {about}")
                continue
            together = [name for name in waiting if PARTS[name].group == PARTS[waiting[0]].group]
            self.run_together(together)
            waiting = [name for name in waiting if name not in self.parts and name not in self.skipped]

    def run_together(self, names: Sequence[str]) -> None:
        """Runs parts in one process, up to the first that ends it or has no time left."""
        options = ["--tiny"] if self.tiny else []
        command = [sys.executable, sys.argv[0], *options, "--measure", *names]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT | os.environ)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=read_lines, args=(process, lines), daemon=True).start()
        now, since = names[0], time.monotonic()
        try:
            while (told := self.next(lines, since + PARTS[now].most)) is not None:
                self.device = told.get("device", self.device)
                if told.get("begins", now) != now:
                    now, since = told["begins"], time.monotonic()
                    if self.ends - since < PARTS[now].least:
                        return  # `run` tells of it
                if "figures" in told:
                    self.parts[told["part"]] = told["figures"]
                    print(line_of(told["part"], told["figures"]), flush=True)
                if "skipped" in told:
                    self.skip(told["part"], told["skipped"])
            process.wait()
            if now not in self.parts and now not in self.skipped:
                self.skip(now, f"its process ended with status {process.returncode}")
        except TimeoutError:
            up = ": the time is up" if time.monotonic() >= self.ends else ""
            self.skip(now, f"stopped after {time.monotonic() - since:.0f} s{up}")
        finally:
            process.kill()
            process.wait()

    def next(self, lines: queue.Queue, until: float) -> dict | None:
        """What the process tells next; None at its end. Raises TimeoutError."""
        while True:
            try:
                line = lines.get(timeout=max(min(until, self.ends) - time.monotonic(), 0))
            except queue.Empty:
                raise TimeoutError from None
            with contextlib.suppress(json.JSONDecodeError):  # a library's words
                if line is None or isinstance(told := json.loads(line), dict):
                    return line if line is None else told

    def skip(self, name: str, why: str) -> None:
        self.skipped[name] = why
        print(f"{name}: skipped: {why}", flush=True)

    def result(self) -> dict:
        return {
            "device": self.device,
            "seconds": time.monotonic() - self.began,
            "mfu_goal": MFU_GOAL,
            "parts": self.parts,
            "skipped": self.skipped,
        }


def read_lines(process: subprocess.Popen, lines: queue.Queue) -> None:
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def line_of(name: str, figures: dict) -> str:
    """A part's figures for people."""

    def text(key: str, value: object) -> str:
        if key == "mfu" and value is not None:
            return f"mfu {value:.1%}" + (f" (goal {MFU_GOAL:.0%})" if name.startswith("train") else "")
        return f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"

    return f"{name}: {', '.join(text(*item) for item in figures.items())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="sizes for a processor: does every part run?")
    parser.add_argument("--measure", nargs="+", choices=[*PARTS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.tiny)
    watch = Watch(options.minutes, options.tiny)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        watch.run([name for name in PARTS if name in (options.only or PARTS)])
    finally:
        print(json.dumps(watch.result()), flush=True)


if __name__ == "__main__":
    main()
