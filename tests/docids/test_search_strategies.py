"""The strategies: what they are given, what they find beside scoring every docid, and what they refuse."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from model_folders import exact_scores, random_params
from tables import stand_in

from retrieval_jax.core import arrow_ids
from retrieval_jax.core.errors import UserError
from retrieval_jax.decoding.trie import Trie, build_trie
from retrieval_jax.docids import residual
from retrieval_jax.docids.from_file import FromFile, Settings
from retrieval_jax.docids.kinds import DocidRequest, docid_kind
from retrieval_jax.docids.making import make_table
from retrieval_jax.docids.search_strategies import STRATEGIES, SoftmaxSearch, TrieSearch
from retrieval_jax.docids.table import DocidShape, DocidTable
from retrieval_jax.docids.token_sets import SetShape
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config

OUTPUTS = 24
# Row by row; the first and the last passage of the trie's share a docid.
TOKENS = {
    "softmax": np.array([[7], [3], [20], [1], [9]]),
    "trie": np.array([[7, 3, 1], [3, 1, 0], [7, 4, 1], [20, 1, 0], [7, 3, 1]]),
}


def table_of(tokens_NxL: np.ndarray, search: str) -> DocidTable:
    ids = arrow_ids.array(map(str, range(len(tokens_NxL))))
    return DocidTable("mine", tokens_NxL, ids, OUTPUTS, "", search=search)


@pytest.mark.parametrize("score", ["log_prob", "logits"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_rows_are_found_in_the_order_of_the_scores_of_all_docids(name: str, score: str):
    strategy, tokens_NxL = STRATEGIES[name], TOKENS[name]
    model = GenerativeRetriever(T5Config(OUTPUTS, 16, 2, 8, 16, 1, 1), score=score)
    params = random_params(model)
    docids, first_N = strategy.build(table_of(tokens_NxL, name), OUTPUTS)
    assert first_N.tolist() == {"softmax": [0, 1, 2, 3, 4], "trie": [0, 1, 2, 3, 0]}[name]
    count = len(set(first_N.tolist()))

    def decode(params, batch, docids):
        return strategy.decode(model, params, batch, docids, 5)

    query = np.array([[5, 11, 2, 1]], np.int32)
    rows, aux = jax.jit(decode)(params, {"encoder_input_tokens": query}, docids)
    score_N = exact_scores(model, params, query[0], tokens_NxL)
    distinct = sorted(set(first_N.tolist()), key=lambda row: -score_N[row])
    assert rows[0].tolist() == distinct + [-1] * (5 - count)
    np.testing.assert_allclose(aux["scores"][0][:count], score_N[distinct], rtol=1e-5)
    batch, docids_1xKxL = {"encoder_input_tokens": query}, tokens_NxL[None].astype(np.int32)
    encoded = strategy.encode(model, params, batch)
    given_KxL = strategy.token_scores(model, params, batch, encoded, docids_1xKxL)[0]
    np.testing.assert_allclose(given_KxL.sum(1), score_N, rtol=1e-5)


def test_how_many_docids_are_found():
    assert TrieSearch.width(beams=40, k=100, outputs=128) == 40
    assert SoftmaxSearch.width(beams=40, k=100, outputs=128) == 100
    assert SoftmaxSearch.width(beams=40, k=1000, outputs=128) == 128


def test_docids_that_one_step_does_not_find_are_refused():
    for tokens in ([[3, 1], [4, 1]], [[3], [4], [3]]):
        with pytest.raises(UserError, match="docids/mine: one step of the softmax finds only docids"):
            SoftmaxSearch.build(table_of(np.array(tokens), "softmax"), OUTPUTS)
    with pytest.raises(UserError, match=r"docids/mine: .*prefix of another"):
        TrieSearch.build(table_of(np.array([[3, 0], [3, 1]]), "trie"), OUTPUTS)


def test_arrays_of_single_tokens_have_the_assumed_shape():
    docids, _ = SoftmaxSearch.build(table_of(TOKENS["softmax"], "softmax"), OUTPUTS)
    assumed = SoftmaxSearch.abstract(DocidShape(1, OUTPUTS, 5), 5, OUTPUTS)
    shapes = [{name: (x.shape, x.dtype) for name, x in each.arrays.items()} for each in (docids, assumed)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("impacts", [False, True])
def test_assumed_sets_have_impacts_where_real_ones_have(impacts: bool):
    """MS MARCO's: 2 bytes a token, and 1 more for its impact."""
    sizes = (1000, 1000, 32_128, SetShape(128, impacts), 100, 1)
    for strategy in (SoftmaxSearch, TrieSearch):
        docids = strategy.abstract_planned_docids(DocidShape(4, 1000, 256), 1000)
        assert (docids is None) == (strategy is SoftmaxSearch)
        sets = strategy.abstract_planning(docids, *sizes).sets
        assert (sets.tokens_PxM.shape[1], sets.tokens_PxM.dtype) == (128, np.uint16)
        assert (sets.impacts_PxM is not None) == impacts
        if impacts:
            assert (sets.impacts_PxM.shape, sets.impacts_PxM.dtype) == (sets.tokens_PxM.shape, np.uint8)


@pytest.mark.parametrize(("levels", "size"), [(4, 16), (8, 256)])
def test_an_assumed_trie_has_the_arrays_of_a_real_one_and_no_fewer_bytes(levels: int, size: int):
    rng, count = np.random.default_rng(0), 5000
    codes = rng.integers(0, size, (count, levels)).astype(np.uint8)
    numbers = residual.collision_indices(codes, codes[:0], np.zeros(0, np.int64))
    tokens_NxL = residual.tokens(codes, numbers, 1, size)
    shape = docid_kind(f"rq_{levels}x{size}").shape(count, 1024)
    assert (shape.length, shape.output_size) == (levels + 1, residual.output_size(levels + 1, size))
    real, _ = build_trie(tokens_NxL)
    no_fewer_bytes(TrieSearch.abstract(shape, count, shape.output_size), real)


def no_fewer_bytes(assumed: Trie, real: Trie) -> None:
    assert assumed.length == real.length
    for name, b in real.arrays.items():
        a = assumed.arrays[name]
        assert np.can_cast(b.dtype, a.dtype), name  # fewer children need fewer bytes
        assert a.ndim == b.ndim, name
        assert a.size >= b.size, name
    assert all(a >= b for a, b in zip(assumed.max_branching, real.max_branching, strict=True))


def test_assumed_arrays_have_room_for_several_docids_a_passage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Half of the passages have a docid more, and one has four; all are in the file that is read."""
    rng, passages = np.random.default_rng(0), 400
    several = {str(row): 1 + (row % 2 == 0) for row in range(passages)} | {"7": 4}
    codes = {row: rng.integers(0, 16, (count, 4)).tolist() for row, count in several.items()}
    (tmp_path / "docids.json").write_text(json.dumps(codes))
    monkeypatch.setattr(FromFile, "settings", functools.partial(Settings, str(tmp_path / "docids.json")))
    table, _ = make_table(FromFile(), DocidRequest(stand_in([*several]), settings=FromFile.settings()))
    assert len(table.tokens_NxL) == passages + 203
    shape = FromFile().shape(passages, 1024)
    assert (shape.extra_docids, shape.docids_per_passage) == (203, 4)
    trie, first_N = TrieSearch.build(table, table.output_size)
    no_fewer_bytes(TrieSearch.abstract(shape, passages, shape.output_size), trie)
    real = TrieSearch.planned_docids(table, trie, first_N)
    assumed = TrieSearch.abstract_planned_docids(shape, passages)
    assert assumed.max_docids == real.max_docids == 4
    for a, b in zip(jax.tree.leaves(assumed), jax.tree.leaves(real), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
