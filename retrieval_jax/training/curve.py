"""What training leaves to look at: a learning curve and samples in JSON lines, and TensorBoard's files."""

import json
from collections.abc import Sequence
from pathlib import Path

from retrieval_jax.evaluation.report import read_curve
from retrieval_jax.storage import write_aside
from retrieval_jax.training import multihost


class Curve:
    """Appends to learning_curve.jsonl, samples.jsonl and TensorBoard; on a resume forgets what came after.

    Of several processes the first one writes.
    """

    def __init__(self, model_dir: Path, step: int):
        """`step`: the checkpoint that training goes on from; later points will be made again."""
        self.writes = multihost.is_first()
        self.minutes_before = 0.0
        if not self.writes:
            return
        from clu import metric_writers  # imports TensorFlow

        self.files = {}
        for name in ("learning_curve", "samples"):
            path = model_dir / f"{name}.jsonl"
            kept = [p for p in read_curve(path) if p["step"] <= step] if path.exists() else []
            write_aside(path, "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in kept).encode())
            self.files[name] = path.open("a", encoding="utf-8")
            if name == "learning_curve" and kept:
                self.minutes_before = kept[-1]["minutes"]
        self.writer = metric_writers.SummaryWriter(str(model_dir))

    def add(self, step: int, minutes: float, metrics: dict[str, float]) -> None:
        """One point: metrics after `step` steps and so many minutes of training."""
        if not self.writes:
            return
        # Nine digits tell any two float32 apart.
        point = {name: float(f"{value:.9g}") for name, value in metrics.items()}
        self._append("learning_curve", {"step": step, "minutes": round(minutes, 3)} | point)
        self.writer.write_scalars(step, metrics)

    def add_samples(self, step: int, samples: Sequence[dict]) -> None:
        """What was found for some dev queries: {"query", "right", "found"} each."""
        if not self.writes or not samples:
            return
        for sample in samples:
            self._append("samples", {"step": step} | sample)
        texts = [
            f"**{s['query']}**\n\nright: `{json.dumps(s['right'])}`\n\n"
            + "\n".join(f"1. `{json.dumps(one)}`" for one in s["found"])
            for s in samples
        ]
        self.writer.write_texts(step, {"dev/samples": "\n\n".join(texts)})

    def _append(self, name: str, line: dict) -> None:
        self.files[name].write(json.dumps(line, ensure_ascii=False) + "\n")
        self.files[name].flush()

    def close(self) -> None:
        if self.writes:
            for file in self.files.values():
                file.close()
            self.writer.close()
