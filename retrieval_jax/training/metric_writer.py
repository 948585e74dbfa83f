"""What training leaves to look at: a learning curve and samples in JSON lines, and TensorBoard's files."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from retrieval_jax.checkpoints.learning_curve import read_curve
from retrieval_jax.core import paths
from retrieval_jax.core.storage import atomic_write
from retrieval_jax.mesh import multihost

WRITTEN_EVERY = 30  # seconds, in a bucket


class _Lines:
    """A file of JSON lines that grows; in a bucket, where nothing is appended to, written anew at times."""

    def __init__(self, path: Path, kept: Sequence[dict]):
        self.path, self.lines = path, [_line(one) for one in kept]
        self.written, self.file = time.monotonic(), None
        self.flush()
        if not paths.is_remote(path):
            self.file = path.open("a", encoding="utf-8")

    def add(self, one: dict) -> None:
        if self.file:
            self.file.write(_line(one))
            self.file.flush()
            return
        self.lines.append(_line(one))
        if time.monotonic() - self.written > WRITTEN_EVERY:
            self.flush()

    def flush(self) -> None:
        """What was added is in the file from here on, whatever ends the process."""
        if self.file is None:
            atomic_write(self.path, "".join(self.lines).encode())
            self.written = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self.file:
            self.file.close()


def _line(one: dict) -> str:
    return json.dumps(one, ensure_ascii=False) + "\n"


class MetricWriter:
    """Appends to learning_curve.jsonl, samples.jsonl and TensorBoard; on a resume forgets what came after.

    Of several processes the first one writes.
    """

    def __init__(self, model_dir: Path, step: int):
        """`step`: the checkpoint that training goes on from; later points will be made again."""
        self.writes = multihost.is_process_0()
        self.minutes_before = 0.0
        if not self.writes:
            return
        from clu import metric_writers  # imports TensorFlow

        self.files = {}
        for name in ("learning_curve", "samples"):
            path = model_dir / f"{name}.jsonl"
            kept = [p for p in read_curve(path) if p["step"] <= step] if path.exists() else []
            self.files[name] = _Lines(path, kept)
            if name == "learning_curve" and kept:
                self.minutes_before = kept[-1]["minutes"]
        self.writer = metric_writers.SummaryWriter(str(model_dir))

    def add(self, step: int, minutes: float, metrics: dict[str, float]) -> None:
        """One point: metrics after `step` steps and so many minutes of training."""
        if not self.writes:
            return
        # Nine digits tell any two float32 apart.
        point = {name: float(f"{value:.9g}") for name, value in metrics.items()}
        self.files["learning_curve"].add({"step": step, "minutes": round(minutes, 3)} | point)
        self.writer.write_scalars(step, metrics)

    def add_samples(self, step: int, samples: Sequence[dict]) -> None:
        """What was found for some dev queries: {"query", "right", "found"} each."""
        if not self.writes or not samples:
            return
        for sample in samples:
            self.files["samples"].add({"step": step} | sample)
        texts = [
            f"**{s['query']}**\n\nright: `{json.dumps(s['right'])}`\n\n"
            + "\n".join(f"1. `{json.dumps(one)}`" for one in s["found"])
            for s in samples
        ]
        self.writer.write_texts(step, {"dev/samples": "\n\n".join(texts)})

    def flush(self) -> None:
        """What was added stays, whatever ends the process: called before a checkpoint to go on from."""
        if self.writes:
            for file in self.files.values():
                file.flush()

    def close(self) -> None:
        if self.writes:
            for file in self.files.values():
                file.close()
            self.writer.close()
