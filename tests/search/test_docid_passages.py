"""Which passages docids name, against a dictionary of docids."""

import dataclasses

import numpy as np
import pytest

from retrieval_jax.core import arrow_ids
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.search.docid_passages import DocidPassages

ROWS, PASSAGES = 60, 40


@pytest.fixture(scope="module", params=[False, True], ids=["a docid each", "several docids"])
def table(request) -> DocidTable:
    """Docids of which many are shared; with several of a passage, also by rows of one passage."""
    rng = np.random.default_rng(0)
    ids = arrow_ids.array([f"p{row}" for row in range(PASSAGES if request.param else ROWS)])
    table = DocidTable("naive", rng.integers(1, 5, (ROWS, 2)), ids, 5, "")
    if not request.param:
        return table
    more = np.sort(rng.integers(0, PASSAGES, ROWS - PASSAGES)).astype(np.int32)
    return dataclasses.replace(table, extra_docid_passage_M=more)


def test_passages_are_those_of_all_rows_with_the_docid(table: DocidTable):
    docids = [tuple(docid) for docid in table.tokens_NxL.tolist()]
    first_N = np.array([docids.index(docid) for docid in docids])
    passages = DocidPassages(table, first_N)
    np.testing.assert_array_equal(passages.first_rows, first_N)
    assert not passages.one_to_one
    found = np.array([*np.random.default_rng(1).permutation(np.unique(first_N)), -1, -1])
    owner = table.passages_of(np.arange(ROWS)).tolist()
    best: dict[str, float] = {}
    for row, (first, others), named in zip(
        found[:-2].tolist(), passages.sharing(found), passages.of_docids(found), strict=True
    ):
        same = [other for other in range(ROWS) if docids[other] == docids[row]]
        assert [first, *others.tolist()] == same
        assert named == sorted({owner[other] for other in same})
        for passage in named:
            best.setdefault(f"p{passage}", -float(row))
    scores = [-float(row) for row in found]
    assert passages.ranked_list(found, scores) == [*best.items()]


def test_without_shared_docids_each_names_its_own_passage():
    table = DocidTable("naive", np.array([[1], [2], [3]]), arrow_ids.array("abc"), 4, "")
    passages = DocidPassages(table, np.arange(3))
    assert passages.one_to_one
    assert passages.ranked_list(np.array([2, 0, -1]), [0.5, 0.25, -1e30]) == [("c", 0.5), ("a", 0.25)]
    several = dataclasses.replace(
        table, tokens_NxL=np.array([[1], [2], [3], [4]]), extra_docid_passage_M=np.int32([1])
    )
    assert not DocidPassages(several, np.arange(4)).one_to_one
