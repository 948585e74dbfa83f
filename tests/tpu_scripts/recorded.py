"""Programs that stand in for gcloud, xpk and pip, record their calls, and answer as a test tells them to."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
COSTS = "the TPU naive-xl may exist and cost money; to end that: tpu_scripts/tpu.sh stop --env tpu.env"
SCRIPTS = ROOT / "tpu_scripts"

# It answers by the first rule whose words are all in the call: (status, output) in turn, then the last again.
STUB = f"""#!{sys.executable} -IS
import json, os, sys
from pathlib import Path

here = Path(os.environ["STUB"])
argv = [Path(sys.argv[0]).name, *sys.argv[1:]]
call = {{"argv": argv, "stdin": sys.stdin.read() if "-" in argv or "tee" in argv else None}}
with open(here / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(call) + "\\n")
if argv[1:4] == ["-m", "pip", "wheel"]:
    Path(argv[argv.index("--wheel-dir") + 1], "retrieval_jax-0.1.0-py3-none-any.whl").touch()
rules = json.loads((here / "rules.json").read_text())
for number, (words, answers) in enumerate(rules):
    if all(word in " ".join(argv) for word in words.split()):
        used = here / f"used.{{number}}"
        times = int(used.read_text()) if used.exists() else 0
        used.write_text(str(times + 1))
        status, output = answers[min(times, len(answers) - 1)]
        print(output, end="\\n" if output else "")
        sys.exit(status)
"""

ENV = {
    "NAME": "naive-xl",
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "ACCELERATOR": "v5litepod-16",
    "BUCKET": "my-bucket",
}


@dataclass
class Cloud:
    """`cloud.run("tpu.sh", "create")` runs a script of the checkout; `cloud.calls()` is what it called."""

    folder: Path
    env: dict[str, str] = field(default_factory=lambda: dict(ENV))
    rules: list[tuple[str, list[tuple[int, str]]]] = field(default_factory=list)

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    def answers(self, words: str, *answers: str | int) -> None:
        """What calls that contain all the words say in turn: an output, or a status to fail with."""
        given = [(a, "") if isinstance(a, int) else (0, a) for a in answers]
        self.rules.append((words, given))

    def start(self, script: str, *argv: str) -> subprocess.Popen:
        """In a process group of its own, as a terminal's foreground job is."""
        (self.folder / "calls.jsonl").write_text("")
        (self.folder / "rules.json").write_text(json.dumps(self.rules))
        for used in self.folder.glob("used.*"):
            used.unlink()
        # Programs that run in the background ignore Ctrl-C, and so would what they start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        (self.checkout / "tpu.env").write_text("".join(f"{n}={v}\n" for n, v in self.env.items()))
        return subprocess.Popen(
            ["bash", f"tpu_scripts/{script}", *argv],
            cwd=self.checkout,
            env=os.environ
            | {
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "STUB": str(self.folder),
                "POLL": "0.01",
                "PAUSE": "0",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *argv: str) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)."""
        process = self.start(script, *argv)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def recorded(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    def calls(self) -> list[list[str]]:
        return [call["argv"] for call in self.recorded()]

    def kinds(self) -> list[str]:
        """Each call in a word or two, to check their order."""
        return [kind(argv) for argv in self.calls()]

    def written(self, name: str) -> str | None:
        """What `gcloud storage cp -` last wrote to a file of the job's folder in the bucket."""
        url = f"gs://{self.env['BUCKET']}/jobs/{self.env['NAME']}/{name}"
        texts = [c["stdin"] for c in self.recorded() if c["argv"] == ["gcloud", "storage", "cp", "-", url]]
        return texts[-1] if texts else None


def kind(argv: list[str]) -> str:
    words = [word for word in argv if not word.startswith("-")]
    if argv[0] == "gcloud":
        words = [w for w in words[1:] if w not in ("alpha", "compute", "tpus", "queued-resources", "storage")]
        if words[0] == "ssh":
            (command,) = (word for word in argv if word.startswith("--command="))
            return f"ssh {'install' if 'host.sh install' in command else command.split()[-1]}"
        return f"{words[0]} {words[1].rsplit('/', 1)[-1]}" if words[0] in ("cat", "rm") else words[0]
    return "wheel" if argv[0] == "python3" else " ".join(words[:3])
