"""A learning curve is read as far as it was written, and a broken line is named."""

import json

import pytest

from retrieval_jax.checkpoints.learning_curve import evaluations, read_curve
from retrieval_jax.core.errors import UserError

POINT = {"step": 1, "minutes": 0.5, "loss": 2.0}


@pytest.mark.parametrize("tail", ["", "\n", '\n{"step": 2, "lo', "\n12", b"\n{\xff"])
def test_a_torn_last_line_is_ignored(tmp_path, tail):
    tail = tail if isinstance(tail, bytes) else tail.encode()
    (tmp_path / "curve.jsonl").write_bytes(json.dumps(POINT).encode() + tail)
    assert read_curve(tmp_path / "curve.jsonl") == [POINT]


@pytest.mark.parametrize("line", ["{", "[1]", "nonsense"])
def test_a_broken_line_inside_is_named(tmp_path, line):
    path = tmp_path / "curve.jsonl"
    path.write_text(f"{json.dumps(POINT)}\n{line}\n")
    with pytest.raises(UserError, match=r"curve\.jsonl:2: not a JSON object"):
        read_curve(path)


def test_the_evaluations_up_to_a_step(tmp_path):
    assert evaluations(tmp_path, 9) == []
    points = [POINT, POINT | {"step": 2, "dev/Hits@10": 0.5}, POINT | {"step": 4, "dev_pool/Hits@10": 0.0}]
    (tmp_path / "learning_curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    assert evaluations(tmp_path, 3) == [(2, {"Hits@10": 0.5})]
    assert evaluations(tmp_path, 4)[1:] == [(4, {"Hits@10": 0.0})]


def test_a_missing_curve(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        read_curve(tmp_path / "none.jsonl")
