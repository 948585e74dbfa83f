"""Searching by prefixes: against a beam search in NumPy over the prefixes of whole docids."""

import collections

import jax
import numpy as np
import pytest
from model_folders import random_params

from retrieval_jax.core import arrow_ids
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Query
from retrieval_jax.data.vocabulary import EOS, Vocabulary, learn
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.generative import GenerativeSearcher
from retrieval_jax.search.prefixes import PrefixSearch

OUTPUTS, BEAMS, LENGTH = 128, 5, 4
LOGITS = jax.jit(GenerativeRetriever.logits, static_argnums=0)
TEXTS = ["the fox", "lazy dog", "jumps over the quick"]


@pytest.fixture(scope="module")
def searcher(tmp_path_factory) -> GenerativeSearcher:
    """Of random weights and 400 docids of two to four tokens, of which many share prefixes and some all."""
    path = tmp_path_factory.mktemp("vocabulary") / "sentencepiece.model"
    learn(["the quick brown fox", "jumps over", "the lazy dog"], 60, path)
    tokens = np.random.default_rng(1).integers(EOS + 1, 9, (400, LENGTH)).astype(np.int32)
    tokens[:, -1] = EOS
    tokens[::3, 2:] = EOS, 0
    tokens[::7, 1:] = EOS, 0, 0
    ids = arrow_ids.array([f"p{row}" for row in range(len(tokens))])
    model = GenerativeRetriever(T5Config(OUTPUTS, 16, 2, 8, 32, 1, 1))
    params = jax.tree.map(lambda x: 3 * x, random_params(model))  # of larger differences between docids
    table = DocidTable("naive", tokens, ids, OUTPUTS, "")
    table._check_prefixes()
    return GenerativeSearcher(model, params, table, Vocabulary(path), 6, BEAMS, 2)


def log_probs(searcher: GenerativeSearcher, text: str, prefixes: list[tuple[int, ...]]) -> np.ndarray:
    """Float64 B×V: of the token after each of up to BEAMS prefixes of one length."""
    padded = [(0, *prefix, *[0] * LENGTH)[:LENGTH] for prefix in (prefixes * BEAMS)[:BEAMS]]
    batch = {
        "encoder_input_tokens": searcher.vocabulary.batch([text] * BEAMS, searcher.input_length),
        "decoder_input_tokens": np.array(padded, np.int32),
    }
    logits = np.asarray(LOGITS(searcher.model, searcher.params, batch), np.float64)[:, len(prefixes[0])]
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def beams_of_whole_search(searcher: GenerativeSearcher, text: str) -> list[list[tuple[tuple, float]]]:
    """The beams of the search for whole docids, after each token: (prefix, score), best first."""
    docids = {tuple(docid[docid > 0].tolist()) for docid in searcher.table.tokens_NxL}
    beams, history = [((), 0.0)], []
    for length in range(1, LENGTH + 1):
        longer = {}
        longer |= {prefix: score for prefix, score in beams if prefix in docids}  # they keep their places
        going_on = [(prefix, score) for prefix, score in beams if prefix not in docids]
        afters = log_probs(searcher, text, [prefix for prefix, _ in going_on]) if going_on else ()
        for (prefix, score), after in zip(going_on, afters, strict=False):
            for docid in docids:
                if docid[: length - 1] == prefix:
                    longer[docid[:length]] = score + after[docid[length - 1]]
        beams = sorted(longer.items(), key=lambda item: -item[1])[:BEAMS]
        history.append(beams)
    return history


def test_what_is_found_at_a_length_is_the_beam_of_the_whole_search_at_that_length(searcher):
    tokens = searcher.table.tokens_NxL
    found = {length: searcher.of_prefixes(length).find_docids(TEXTS, 9) for length in (1, 2, 3, LENGTH)}
    whole = searcher.find_docids(TEXTS, 9)
    pruned = 0
    for query, text in enumerate(TEXTS):
        history = beams_of_whole_search(searcher, text)
        for length, results in found.items():
            rows, scores = results[query]
            prefixes = [tuple(x for x in docid[:length].tolist() if x) for docid in tokens[rows[rows >= 0]]]
            assert prefixes == [prefix for prefix, _ in history[length - 1]]
            np.testing.assert_allclose(
                scores[: len(prefixes)], [score for _, score in history[length - 1]], rtol=1e-5
            )
            pruned += length < LENGTH and len({docid[:length] for docid, _ in history[-1]}) < BEAMS
        np.testing.assert_array_equal(found[LENGTH][query][0], whole[query][0])
    assert pruned  # the beam holds prefixes of which no docid is found in the end


def test_passages_of_the_prefixes_take_turns(searcher):
    tokens, queries = searcher.table.tokens_NxL, [Query(f"q{n}", text, {}) for n, text in enumerate(TEXTS)]
    lengths, ids = (1, 3), searcher.table.passage_ids.to_pylist()
    found = {length: searcher.of_prefixes(length).find_docids(TEXTS, 9) for length in lengths}
    left_out = [[passage for row, passage in enumerate(ids) if row % 2 == n % 2][:150] for n in range(3)]
    made = PrefixSearch(searcher, lengths, 2, seed=3).search(queries, 100, left_out)
    for n, ranked_list in enumerate(made):
        per_prefix, passages = collections.Counter(), [passage for passage, _ in ranked_list]
        assert len({*passages}) == len(passages) > 2 * BEAMS
        assert not {*passages} & {*left_out[n]}
        best = {}
        for length in lengths:
            rows, scores = found[length][n]
            best[length] = {tuple(tokens[row, :length]): s for row, s in zip(rows, scores, strict=True)}
        for passage, score in ranked_list:
            prefixes = [tuple(tokens[ids.index(passage), :length]) for length in lengths]
            scores = [best[length].get(p) for length, p in zip(lengths, prefixes, strict=True)]
            assert score in scores
            per_prefix[prefixes[scores.index(score)]] += 1
        assert max(per_prefix.values()) == 2
        # The best prefix of each length that has other passages left comes first.
        assert ranked_list[0][1] == found[1][n][1][0]
        assert ranked_list[1][1] in best[3].values()
    assert PrefixSearch(searcher, lengths, 2, seed=3).search(queries[1:], 100, left_out[1:]) == made[1:]
    assert PrefixSearch(searcher, lengths, 2, seed=4).search(queries, 100, left_out) != made
    few = PrefixSearch(searcher, lengths, 2, seed=3).search(queries, 4, left_out)
    assert few == [ranked_list[:4] for ranked_list in made]
    # A prefix all of whose passages answer the query has none.
    (alone,) = PrefixSearch(searcher, (LENGTH,)).search(queries[:1], 9, [ids])
    assert alone == []


def test_lengths_that_no_docid_has_are_refused(searcher):
    with pytest.raises(UserError, match="prefix_lengths: 5: the docids of kind naive have up to 4 tokens"):
        PrefixSearch(searcher, (2, 5))
