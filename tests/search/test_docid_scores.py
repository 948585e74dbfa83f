"""Which docids are scored for passages; the scores themselves are in test_generative.py."""

import dataclasses

import numpy as np

from retrieval_jax.core import arrow_ids
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.search.docid_scores import docids_of


def test_passages_have_one_docid_or_several_and_some_have_none():
    table = DocidTable("rq_2x9", np.array([[3, 5], [6, 4], [2, 4]]), arrow_ids.array("abc"), 9, "")
    for found, wanted in zip(docids_of(table, [2, -1, 0]), ([2, -1, 0], [0, 1, 2]), strict=True):
        assert found.tolist() == wanted
    several = dataclasses.replace(
        table, tokens_NxL=np.arange(1, 13).reshape(6, 2), extra_docid_passage_M=np.int32([0, 2, 2])
    )
    found = docids_of(several, [2, -1, 1, 0])
    assert [x.tolist() for x in found] == [[2, 4, 5, -1, 1, 0, 3], [0, 0, 0, 1, 2, 3, 3]]
    assert [x.tolist() for x in docids_of(several, [])] == [[], []]
