"""The file learning_curve.jsonl of a model folder, as training writes it and reports read it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError

NAME = "learning_curve.jsonl"
POOL_DIGEST = "pool_digest"  # the metric that tells one pool from another, a number
DEV = ("dev", "dev_pool")
"""What comes before the names of metrics of an evaluation in training: of all passages, of a pool of them."""


def split_dev_metrics(point: Mapping[str, float]) -> tuple[str, dict[str, float]] | None:
    """Gives what the dev metrics of a learning curve's point are of (see DEV), and the metrics by name.

    Args:
      point: of a learning curve.

    Returns:
      (prefix, {name without the prefix: value}); None where the point has no dev metrics.
    """
    for prefix in DEV:
        start = f"{prefix}/"
        if found := {name.removeprefix(start): x for name, x in point.items() if name.startswith(start)}:
            return prefix, found
    return None


def read_curve(path: str | os.PathLike) -> list[dict]:
    """Reads the points of a learning curve, one JSON object per line.

    A last line that a killed process left unfinished is ignored.

    Raises:
      UserError: the file cannot be read, or another line is not a JSON object.
    """
    try:
        lines = paths.as_path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): train the model first") from None
    points = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            point = json.loads(line)
        except ValueError:  # also bytes that are not UTF-8
            point = None
        if isinstance(point, dict):
            points.append(point)
        elif number < len(lines):  # only a line without its newline can be unfinished
            raise UserError(f"{path}:{number}: not a JSON object: delete this line")
    return points


def curve_points(folder: Path, until: float = math.inf) -> list[dict]:
    """Reads the learning curve of a model's folder up to a step; [] where there is none yet."""
    path = folder / NAME
    return [point for point in read_curve(path) if point["step"] <= until] if path.exists() else []


def is_evaluated(folder: Path, step: int) -> bool:
    """Tells whether the learning curve of a model's folder has the evaluation after a number of steps."""
    return any("evaluation_seconds" in point for point in curve_points(folder) if point["step"] == step)


def evaluations(folder: Path, step: int) -> list[tuple[int, dict[str, float]]]:
    """Gives the (step, metrics of dev queries) of the evaluations up to a step, from the learning curve."""
    points = curve_points(folder, until=step)
    return [(point["step"], found[1]) for point in points if (found := split_dev_metrics(point))]


def summary(folder: Path, step: int) -> dict:
    """Summarises the training up to a step, from its learning curve.

    Args:
      folder: the model's folder.
      step: the number of steps.

    Returns:
      step; minutes of training; input_wait, the share of the steps' time spent waiting for batches (the
      device may be at work meanwhile); evaluation_share, the share of the minutes that evaluations took;
      skipped, the number of skipped updates if there are any (see LossSpikeGuard); and the metrics of the
      last evaluation, as "dev/NAME", or "dev_pool/NAME" where only a pool of passages was searched.
    """
    points = curve_points(folder, until=step)
    evaluated = [found for found in map(split_dev_metrics, points) if found]
    prefix, dev = evaluated[-1] if evaluated else ("", {})
    minutes = max([point["minutes"] for point in points], default=0.0)
    spent = sum(point.get("evaluation_seconds", 0) for point in points) / 60
    waits = [point["input_wait"] for point in points if "input_wait" in point]
    skipped = int(sum(point.get("skipped", 0) for point in points))
    return {
        "step": step,
        "minutes": minutes,
        "input_wait": round(sum(waits) / len(waits), 4) if waits else 0.0,
        **({"evaluation_share": round(spent / minutes, 4)} if evaluated and minutes else {}),
        **({"skipped": skipped} if skipped else {}),
        **{f"{prefix}/{name}": value for name, value in dev.items()},
    }
