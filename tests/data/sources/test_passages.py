"""Passages are checked and read in parts, by several processes, and any choice of them keeps its order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import error_of, places, read, write
from test_layouts import MSMARCO

from retrieval_jax.data import parallel
from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.data.sources import lines, passages
from retrieval_jax.data.sources.lines import ErrorLog


def test_large_files_are_read_in_parts_by_several_processes(tmp_path):
    """In parts of any size, with a bad line, a repeated id and a .gz."""
    lines = [f"d{i}\ttext {i} über" for i in range(1000)]
    lines[333], lines[777], lines[900] = "no columns", "d5\tagain", "d901\t "
    qrels = {"qrels.train.tsv": "q1 0 d999 1\nq2 0 d777 1\n"}
    folder = write(
        tmp_path, MSMARCO | qrels | {"collection.tsv": None, "collection.tsv.gz": "\n".join(lines)}
    )
    del lines[900], lines[777], lines[333]
    expected = [Passage(*line.replace("\t", "\t\t").split("\t")) for line in lines]
    (folder / "qrels.dev.small.tsv").unlink()
    for shard_bytes in (1 << 20, 4000):
        errors = ErrorLog(skip=True)
        passages, queries = read(folder, errors, shard_bytes)
        assert passages == expected
        missing = Query("q2", "what?", {}, missing={"d777": 1})  # of the line that is bad
        assert queries == {"train": [Query("q1", "who?", {"d999": 1}), missing]}
        assert places(errors, tmp_path) == {
            "wrong columns": ["collection.tsv.gz:334"],
            "duplicate id": ["collection.tsv.gz:778"],
            "empty passage": ["collection.tsv.gz:901"],
            "unknown passage": ["qrels.train.tsv:2"],
        }
    message = error_of(lambda: read(folder, None, 4000))
    assert message.startswith(f"{folder / 'collection.tsv.gz'}:334: 1 tab-separated columns instead of 2")
    assert "there are more: 1 × empty passage, 1 × duplicate id)" in message


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(10, 60), st.randoms())
def test_a_subset_holds_the_chosen_passages_in_their_order(tmp_path_factory, numbers, shard_bytes, dice):
    """Whatever the parts: a second passage with an id is left out, and so is what is not chosen."""
    folder = write(
        tmp_path_factory.mktemp("subset"),
        {"collection.tsv": "".join(f"d{n}\ttext {i}\n" for i, n in enumerate(numbers))},
    )
    first = {n: Passage(f"d{n}", "", f"text {i}") for i, n in reversed([*enumerate(numbers)])}
    whole = [first[n] for n in dict.fromkeys(numbers)]
    rows = sorted(dice.sample(range(len(whole)), dice.randint(0, len(whole))))
    parts = [
        passages.Part(some, parse)
        for some in lines.split_lines(folder / "collection.tsv", folder, ErrorLog(), shard_bytes)
    ]
    with pytest.MonkeyPatch.context() as here:  # a pool of processes for each example would take minutes
        here.setattr(parallel, "map_jobs", lambda function, jobs, what: [*map(function, jobs)])
        checked = passages.check(parts, ErrorLog(skip=True))
    subset = checked.subset(np.array(rows, int))
    for found, expected in ((checked, whole), (subset, [whole[row] for row in rows])):
        assert [passage for part in found.shards() for passage in part()] == expected
        assert found.ids.to_pylist() == [passage.id for passage in expected]
    assert (subset.fingerprint() == checked.fingerprint()) == (len(rows) == len(whole))


def parse(line: str) -> list[Passage]:
    key, text = line.split("\t")
    return [Passage(key, "", text)]


def test_a_passage_that_is_repeated_must_have_the_same_text(tmp_path):
    file = tmp_path / "collection.tsv"
    file.write_text("d1\tone\nd2\ttwo\nd1\tone\n")
    parts = [passages.Part(some, parse) for some in lines.split_lines(file, tmp_path, ErrorLog(), 99)]
    assert passages.check(parts, ErrorLog(), repeats=True).ids.to_pylist() == ["d1", "d2"]
    message = error_of(lambda: passages.check(parts, ErrorLog()))
    assert message.startswith(f"{file}:3: the id 'd1' was used on an earlier line ({file}:1)")
    file.write_text("d1\tone\nd2\ttwo\nd1\tnew\n")
    message = error_of(lambda: passages.check(parts, ErrorLog(), repeats=True))
    assert message.startswith(f"{file}:3: passage 'd1' has another text ({file}:1)")
