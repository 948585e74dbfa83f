"""Ranges of lines are exact: every line once, with its number, however the file is cut."""

import gzip
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.sources.lines import ErrorLog, LineError, decode_lines, read_lines, split_lines


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=12), max_size=30), st.integers(1, 40), st.booleans())
def test_ranges_are_the_lines_of_the_file(lines, size, compressed):
    content = b"\n".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a.txt.gz" if compressed else "a.txt")
        path.write_bytes(gzip.compress(content) if compressed else content)
        errors = ErrorLog()
        found = split_lines(path, Path(folder) / "scratch", errors, size)
        assert [pair for part in found for pair in part] == list(read_lines(path, errors))
        assert all(part.count > 0 for part in found)
        assert all(part.path == path for part in found)
        assert not errors.counts
    if len(content) > 2 * (size + 12):
        assert len(found) > 1


def test_a_damaged_file_keeps_the_whole_lines_before_the_damage(tmp_path):
    import random

    numbers = random.Random(0)
    whole = [f"{numbers.random()}\n".encode() for _ in range(20_000)]
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"".join(whole))[:-40_000])
    errors = ErrorLog(skip=True)
    parts = split_lines(path, tmp_path / "scratch", errors, 1 << 16)
    found = [raw for part in parts for _, raw in part]
    assert 0 < len(found) < 20_000
    assert found == whole[: len(found)]
    assert errors.counts == {"damaged file": 1}
    (fault,) = errors.first["damaged file"]
    assert fault.line == len(found) + 1


def test_lines_that_are_not_utf_8_are_noted():
    errors = ErrorLog(skip=True)
    lines = [(1, b"\xef\xbb\xbfa\r\n"), (2, b"\xff\n"), (3, b"\n"), (4, "b\u2028c".encode())]
    assert list(decode_lines(lines, Path("f"), errors)) == [(1, "a"), (4, "b\u2028c")]
    assert [str(fault) for fault in errors.first["not UTF-8"]] == [
        "f:2: the line is not UTF-8 (invalid start byte): save it as UTF-8"
    ]


def test_bad_lines_are_left_out_only_where_it_is_asked_for():
    assert ErrorLog.skips("skip")
    assert not ErrorLog.skips("fail")
    with pytest.raises(UserError, match=r"^ON_ERROR: no way 'ignore' to treat bad lines: choose 'fail' or"):
        ErrorLog.skips("ignore")


def test_the_first_bad_line_is_raised_and_the_others_are_counted():
    errors = ErrorLog()
    errors.raise_first()
    for line, kind in ((7, "bad id"), (3, "empty passage"), (9, "bad id")):
        errors.add(LineError(Path("f"), line, kind, f"wrong {line}", "mend it"))
    with pytest.raises(UserError, match=r"^f:3: wrong 3: mend it .*ON_ERROR.*2 × bad id\)$"):
        errors.raise_first()
    skipping = ErrorLog(skip=True)
    skipping.merge(errors)
    skipping.raise_first()
    assert skipping.counts == {"bad id": 2, "empty passage": 1}
