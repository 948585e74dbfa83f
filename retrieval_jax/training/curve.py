"""What training leaves to look at: a learning curve in JSON lines, and TensorBoard event files."""

import json
from pathlib import Path

from retrieval_jax.evaluation.report import read_curve
from retrieval_jax.storage import write_aside


class Curve:
    """Appends points to learning_curve.jsonl and to TensorBoard; on a resume forgets what came after."""

    def __init__(self, model_dir: Path, step: int):
        """`step`: the checkpoint that training goes on from; later points will be made again."""
        from clu import metric_writers  # imports TensorFlow

        self.path = model_dir / "learning_curve.jsonl"
        kept = [p for p in read_curve(self.path) if p["step"] <= step] if self.path.exists() else []
        write_aside(self.path, "".join(json.dumps(p) + "\n" for p in kept).encode())
        self.minutes_before = kept[-1]["minutes"] if kept else 0.0
        self.file = self.path.open("a")
        self.writer = metric_writers.SummaryWriter(str(model_dir))

    def add(self, step: int, minutes: float, metrics: dict[str, float]) -> None:
        """One point: metrics after `step` steps and so many minutes of training."""
        point = {"step": step, "minutes": round(minutes, 3)} | {k: round(v, 5) for k, v in metrics.items()}
        self.file.write(json.dumps(point) + "\n")
        self.file.flush()
        self.writer.write_scalars(step, metrics)

    def close(self) -> None:
        self.file.close()
        self.writer.close()
