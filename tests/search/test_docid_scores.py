"""Which docids are scored for passages, and how many at once; the scores are in test_generative.py."""

import dataclasses

import numpy as np
import pytest

from retrieval_jax.core import arrow_ids
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.search.docid_scores import CANDIDATES, docids_of, score_in_blocks


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


@pytest.mark.parametrize("tokens", [(), (3,)])
def test_any_number_of_rows_is_scored_in_blocks_of_one_shape(tokens: tuple[int, ...]):
    table_N, shapes = np.random.default_rng(0).normal(size=(200, *tokens)).astype(np.float32), []

    def score(row_BxK: np.ndarray) -> np.ndarray:
        shapes.append(row_BxK.shape)
        return table_N[row_BxK]

    rows = [[], [5, -1, 7], [*range(100, 100 + CANDIDATES + 1)]]
    found = score_in_blocks(rows, 4, score)
    assert shapes == [(4, CANDIDATES)] * 2
    for own, scores in zip(rows, found, strict=True):
        known = np.array(own, int)
        wanted = table_N[known]
        wanted[known < 0] = np.nan
        np.testing.assert_array_equal(scores, wanted)
    assert [scores.shape for scores in score_in_blocks([[], []], 2, score)] == [(0, *tokens)] * 2
