"""How a source is divided into splits, and the vocabulary that a collection gets; imports: tests/verbs."""

import functools
from pathlib import Path

import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.data.sources.folders import Source, line_passages
from retrieval_jax.data.sources.lines import ErrorLog, parse_lines
from retrieval_jax.data.writing import ImportSettings, hold_out_dev, leave_out_unanswerable, write_collection


def test_dev_is_held_out_of_train_by_a_hash():
    train = [Query(str(i), "text", {"p": 1}) for i in range(2000)]
    test = [Query("t", "text", {"p": 1})]
    split = hold_out_dev({"train": train, "test": test}, 0.05)
    assert sorted([*split["train"], *split["dev"]], key=lambda q: int(q.id)) == train
    assert 60 < len(split["dev"]) < 140
    assert split["test"] == test
    assert hold_out_dev({"test": test}, 0.05) == {"test": test}
    given = {"train": train, "dev": test}
    assert hold_out_dev(given, 0.05) == given
    # A query's place does not depend on the others.
    fewer = hold_out_dev({"train": train[::2]}, 0.05)
    assert [q for q in split["dev"] if int(q.id) % 2 == 0] == fewer["dev"]


def test_train_queries_without_a_positive_are_left_out_and_counted(capsys):
    found, unanswered = Query("a", "text", {"p": 1}), Query("b", "text", {}, ("p",))
    queries = {"train": [found, unanswered], "test": [unanswered, found], "extra": [found], "none": []}
    kept, counts = leave_out_unanswerable(queries)
    assert kept == {"train": [found], "test": [unanswered, found], "extra": [found]}
    assert counts == {"train": 1, "test": 1}
    told = capsys.readouterr().err
    assert "train: 1 of 2 judged queries have no relevant passage: left out" in told
    assert "test: 1 of 2 judged queries have no relevant passage: they count 0 in evaluations" in told
    assert leave_out_unanswerable({"train": [unanswered]}) == ({}, {"train": 1})


def test_only_what_has_a_learned_vocabulary_is_made_anew(collection):
    """Where the vocabulary is given, the way in which others are learned is not in the recipe."""
    recipes = [
        ImportSettings(path, 1000, 0.05, False, None, 0, 1 << 20).recipe()
        for path in (None, str(collection.vocabulary_path))
    ]
    assert [recipe.get("split_punctuation", False) for recipe in recipes] == [True, False]


def test_a_bad_line_of_queries_ends_the_import_whoever_reads_them(tmp_path: Path):
    """A layout reports bad lines; that they end the import is not its own affair."""
    (tmp_path / "docs.txt").write_text("d1\td2\n")
    bad = tmp_path / "queries.txt"
    bad.write_bytes(b"d1\n\xff\n")

    def passages(line: str) -> list[Passage]:
        return [Passage(key, "", key) for key in line.split("\t")]

    def queries(find_rows, errors: ErrorLog) -> dict[str, list[Query]]:
        return {"test": [Query(f"q{n}", key, {key: 1}) for n, key in parse_lines(bad, str, errors)]}

    read = functools.partial(line_passages, [tmp_path / "docs.txt"], passages)
    source = Source("bad", (bad,), read, queries)
    settings = ImportSettings(
        vocabulary_path=None, vocab_size=30, held_out=0.05, skip_errors=False, subset=None, subset_seed=0,
        shard_bytes=1 << 20,
    )  # fmt: skip
    (tmp_path / "collection").mkdir()
    with pytest.raises(UserError, match=r"queries.txt:2: the line is not UTF-8"):
        write_collection(tmp_path / "collection", source, settings)
