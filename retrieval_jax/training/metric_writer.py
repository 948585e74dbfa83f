"""The metric writer: a run's learning curve and samples in JSON lines, and its files for TensorBoard."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from retrieval_jax.checkpoints.learning_curve import read_curve
from retrieval_jax.core import paths
from retrieval_jax.core.storage import atomic_write
from retrieval_jax.mesh import multihost

FLUSH_EVERY = 30  # seconds, in a bucket


class _Lines:
    """A file of JSON lines that grows. A bucket cannot append: there the file is written again at times."""

    def __init__(self, path: Path, records: Sequence[dict]):
        self.path, self.lines = path, [_line(record) for record in records]
        self.written, self.file = time.monotonic(), None
        self.flush()
        if not paths.is_remote(path):
            self.file = path.open("a", encoding="utf-8")

    def add(self, record: dict) -> None:
        if self.file:
            self.file.write(_line(record))
            self.file.flush()
            return
        self.lines.append(_line(record))
        if time.monotonic() - self.written > FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Makes sure that every added record is in the file, whatever ends the process from here on."""
        if self.file is None:
            atomic_write(self.path, "".join(self.lines).encode())
            self.written = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self.file:
            self.file.close()


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


class MetricWriter:
    """Appends to learning_curve.jsonl, samples.jsonl and TensorBoard's files.

    Of several processes only the first one writes.

    Args:
      folder: the model's folder.
      step: the step from which training goes on. Points after it are removed, as they will be made again.

    Attributes:
      minutes_before: minutes of training up to that step (0 in other processes than the first).
    """

    def __init__(self, folder: Path, step: int):
        self.writes = multihost.is_process_0()
        self.minutes_before = 0.0
        if not self.writes:
            return
        from clu import metric_writers  # imports TensorFlow

        self.files = {}
        for name in ("learning_curve", "samples"):
            path = folder / f"{name}.jsonl"
            kept = [point for point in read_curve(path) if point["step"] <= step] if path.exists() else []
            self.files[name] = _Lines(path, kept)
            if name == "learning_curve" and kept:
                self.minutes_before = kept[-1]["minutes"]
        self.writer = metric_writers.SummaryWriter(str(folder))

    def write(self, step: int, minutes: float, metrics: dict[str, float]) -> None:
        """Writes a point of the learning curve: metrics after `step` steps and `minutes` of training."""
        if not self.writes:
            return
        # Nine digits tell any two float32 apart.
        point = {name: float(f"{value:.9g}") for name, value in metrics.items()}
        self.files["learning_curve"].add({"step": step, "minutes": round(minutes, 3)} | point)
        self.writer.write_scalars(step, metrics)

    def write_samples(self, step: int, samples: Sequence[dict], prefix: str = "dev") -> None:
        """Writes what was found for some dev queries, each {"query", "right": […], "found": […]}."""
        if not self.writes or not samples:
            return
        for sample in samples:
            self.files["samples"].add({"step": step} | sample)
        texts = [
            f"**{sample['query']}**\n\nright: `{json.dumps(sample['right'])}`\n\n"
            + "\n".join(f"1. `{json.dumps(passage)}`" for passage in sample["found"])
            for sample in samples
        ]
        self.writer.write_texts(step, {f"{prefix}/samples": "\n\n".join(texts)})

    def flush(self) -> None:
        """Makes sure that all points stay. To be called before a checkpoint from which a run may go on."""
        if self.writes:
            for file in self.files.values():
                file.flush()

    def close(self) -> None:
        """Closes all files."""
        if self.writes:
            for file in self.files.values():
                file.close()
            self.writer.close()
