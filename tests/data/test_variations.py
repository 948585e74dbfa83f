"""Variations of queries, by properties: what changes, how far, and that only the arguments count."""

import collections
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from bm25s import stopwords
from hypothesis import given
from hypothesis import strategies as st

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import variations
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.variations import KINDS, TYPOS, vary

WORDS = st.sampled_from(
    [
        "what",
        "smooth",
        "Signal?",
        "the",
        "numpy.random",
        "aaaa",
        "über",
        "ﬁnden",
        "привет",
        "हिन्दी",
        "東京都庁",
        "42",
        "a",
    ]
)
QUERIES = st.lists(WORDS, max_size=8).map(" ".join) | st.text()
SEEDS = st.integers(0, 1000)


def distance(one: str, other: str) -> int:
    """The edits between two texts: a letter more, less or another, or two that changed places."""
    d = {(i, -1): i + 1 for i in range(-1, len(one))} | {(-1, j): j + 1 for j in range(-1, len(other))}
    for (i, a), (j, b) in itertools.product(enumerate(one), enumerate(other)):
        d[i, j] = min(d[i - 1, j] + 1, d[i, j - 1] + 1, d[i - 1, j - 1] + (a != b))
        if i and j and a == other[j - 1] and one[i - 1] == b:
            d[i, j] = min(d[i, j], d[i - 2, j - 2] + 1)
    return d[len(one) - 1, len(other) - 1]


def is_stop_word(word: str) -> bool:
    return word.lower().strip("?.,!") in stopwords.STOPWORDS_EN_PLUS


@given(QUERIES, st.sampled_from(["typo", *TYPOS]), SEEDS)
def test_a_typo_is_one_edit_of_one_word_of_four_letters(text: str, kind: str, seed: int):
    varied = vary(text, kind, "q", seed)
    before, after = text.split(), varied.split()
    eligible = [word for word in before if sum(map(str.isalpha, word)) >= 4 and not is_stop_word(word)]
    if varied == text:
        assert kind in ("swap", "qwerty") or not any(word.isascii() for word in eligible)
        return
    assert len(before) == len(after)
    ((was, now),) = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert was in eligible
    assert distance(was, now) == 1
    longer = {"insert": 1, "delete": -1, "swap": 0, "qwerty": 0, "substitute": 0}
    assert len(now) - len(was) == longer.get(kind, len(now) - len(was))
    if kind == "swap":
        assert sorted(was) == sorted(now)
    if kind == "qwerty":
        ((a, b),) = [(a.lower(), b.lower()) for a, b in zip(was, now, strict=True) if a != b]
        rows = ["qwertyuiop", "asdfghjkl", "zxcvbnm"]
        (x, p), (y, q) = [next((i, row.index(c)) for i, row in enumerate(rows) if c in row) for c in (a, b)]
        assert abs(x - y) <= 1
        assert q - p in ({-1, 1} if x == y else {-1, 0} if y > x else {0, 1})


@given(QUERIES, SEEDS)
def test_words_are_left_out_or_in_another_order(text: str, seed: int):
    words = text.split()
    counts = collections.Counter(words)
    content = [word for word in words if not is_stop_word(word)]
    kept = vary(text, "no_stop_words", "q", seed).split()
    assert kept == (content or words)

    left = vary(text, "drop_words", "q", seed).split()
    assert not collections.Counter(left) - counts
    dropped = len(words) - len(left)
    assert dropped == (max(1, round(len(words) / 5)) if len(words) > 1 else 0)
    rest = iter(words)
    assert all(word in rest for word in left)  # in their order

    shuffled = vary(text, "shuffle", "q", seed).split()
    assert collections.Counter(shuffled) == counts
    assert (shuffled == words) == (len(counts) < 2)


@given(QUERIES, st.sampled_from([*KINDS]), SEEDS)
def test_a_variation_is_a_function_of_its_arguments(text: str, kind: str, seed: int):
    assert vary(text, kind, "q", seed) == vary(text, kind, "q", seed)
    vary(text, kind, "q", seed).encode()


def test_queries_seeds_and_kinds_draw_apart_and_evenly():
    text = "smooth signals quickly"
    by_query = [vary(text, "typo", f"q{i}") for i in range(600)]
    assert len({*by_query}) > 200
    assert by_query != [vary(text, "typo", f"q{i}", 1) for i in range(600)]
    words = collections.Counter(
        next(i for i, (a, b) in enumerate(zip(text.split(), one.split(), strict=True)) if a != b)
        for one in by_query
    )
    assert all(150 < words[i] < 250 for i in range(3))
    lengths = collections.Counter(len(one) - len(text) for one in by_query)
    assert all(
        80 < lengths[change] < 160 for change in (-1, 1)
    )  # a fifth each, three fifths without a change
    assert vary("what is the use", "typo", "q") == "what is the use"


def test_a_file_of_queries_is_read_in_either_form_and_checked(tmp_path: Path):
    tsv, jsonl = tmp_path / "a.tsv", tmp_path / "a.jsonl"
    tsv.write_text("qid\tquery\nq1\tein Weg\nq2\tअन्य\n")
    jsonl.write_text('{"_id": "q1", "text": "ein\\tWeg"}\n')
    assert variations.read_texts(tsv) == {"q1": "ein Weg", "q2": "अन्य"}
    assert variations.read_texts(jsonl) == {"q1": "ein\tWeg"}
    for path, text, message in (
        (tsv, "q1\ta\nq1\tb\n", r"a\.tsv:2: the query 'q1' again: keep one line of it"),
        (tsv, "q1 a\n", r"a\.tsv:1: 1 tab-separated columns instead of 2"),
        (jsonl, "q1\ta\n", r"a\.jsonl:1: the JSON is wrong"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            variations.read_texts(path)


def test_a_split_is_read_with_the_judgements_of_its_queries(own_work: Workspace, collection: Collection):
    queries = collection.queries("test")
    texts = [query.text[::-1] for query in queries]
    folder = own_work.variation("test", "typo")
    assert variations.fingerprint(own_work, "test~typo") == ""
    with pytest.raises(
        UserError, match=r"test~typo: nothing finished here: make it with `retrieval-jax vary`"
    ):
        variations.split_queries(own_work, collection, "test~typo")
    recipe = collection.recipe("test")
    manifest = storage.build_once(folder, recipe, lambda tmp: variations.write(tmp, queries, texts))
    assert (manifest["queries"], manifest["changed"]) == (len(queries), len(queries))
    assert variations.names(own_work) == ["test~typo"]
    assert variations.fingerprint(own_work, "test~typo") == manifest["fingerprint"]
    assert variations.split_queries(own_work, collection, "test") == queries
    found = variations.split_queries(own_work, collection, "test~typo")
    assert [query.text for query in found] == texts
    assert [(query.id, query.judgements) for query in found] == [(q.id, q.judgements) for q in queries]
    with pytest.raises(UserError, match="no queries of split 'tset'"):
        variations.split_queries(own_work, collection, "tset~typo")
    file = folder / "queries.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["_id"] for line in lines] == [query.id for query in queries]
    file.write_text(file.read_text()[1:])
    with pytest.raises(UserError, match=r"queries\.jsonl: missing or altered: make it again"):
        variations.split_queries(own_work, collection, "test~typo")


def test_training_draws_from_a_generator():
    drawn = {variations.add_typo("smooth", np.random.default_rng(seed)) for seed in range(50)}
    assert "smooth" not in drawn
    assert len(drawn) > 30
