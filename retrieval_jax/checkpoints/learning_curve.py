"""The file learning_curve.jsonl of a model folder, as training writes it and reports read it."""

import json
import os

from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError


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
