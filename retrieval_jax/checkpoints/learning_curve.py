"""The file learning_curve.jsonl of a model folder, as training writes it and reports read it."""

import json
import os
from collections.abc import Mapping

from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError

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
