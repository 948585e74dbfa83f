"""The constrained search against plain Python: every docid scored, and a textbook beam search over a set."""

import doctest
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rooms import room

from retrieval_jax.data.vocabulary import EOS
from retrieval_jax.decoding import beam_search
from retrieval_jax.decoding.beam_search import constrained_beam_search
from retrieval_jax.decoding.trie import build_trie
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config

VOCABULARY, LENGTH, BEAMS = 128, 4, 48  # LENGTH: tokens of the longest docid
QUERIES = np.array([[7, 5, 9, EOS], [30, EOS, 0, 0], [4, 4, 101, EOS]], np.int32)


def matrix(docids):
    """Docids as rows of LENGTH, padded with 0."""
    return np.array([docid + (0,) * (LENGTH - len(docid)) for docid in docids], np.int32)


def random_docids(seed, count, symbols, first_symbols=None):
    """At most `count` docids of 1 to LENGTH tokens, ended by EOS."""
    rng = np.random.default_rng(seed)
    docids = set()
    for _ in range(count):
        tokens = rng.integers(2, 2 + symbols, rng.integers(0, LENGTH))
        tokens[:1] = rng.integers(2, 2 + (first_symbols or symbols))
        docids.add((*tokens.tolist(), EOS))
    return sorted(docids)


def plain_beam_search(log_probs, docids, beams):
    """The search as a textbook has it. `log_probs` gives the next token's log-probabilities after a prefix.

    Returns ([(docid, score), …] best first, the least difference that decided anything).
    """
    alive, closest = {(): 0.0}, np.inf
    for position in range(LENGTH):
        candidates = {}
        for prefix, score in alive.items():
            if prefix in docids:
                candidates[prefix] = score
            for token in {docid[position] for docid in docids if docid[:position] == prefix != docid}:
                candidates[*prefix, token] = score + log_probs(prefix)[token]
        ranked = sorted(candidates.items(), key=lambda candidate: -candidate[1])
        scores = [score for _, score in ranked]
        decisive = scores[: beams + 1] if position == LENGTH - 1 else scores[beams - 1 : beams + 1]
        closest = min([closest, *(a - b for a, b in itertools.pairwise(decisive))])
        alive = dict(ranked[:beams])
    return list(alive.items()), closest


def found(docids, rows, scores):
    """[(docid, score), …] of one query by a table's rows, after checking that the rest is -1 and -inf."""
    rows, scores = np.asarray(rows), np.asarray(scores)
    real = rows >= 0
    assert not real[np.count_nonzero(real) :].any()
    assert (rows[~real] == -1).all()
    assert (scores[~real] == -np.inf).all()
    return list(zip((docids[row] for row in rows[real]), scores[real].tolist(), strict=True))


def assert_same(ranking, expected):
    """The same docids in the same order, with the same scores."""
    assert [docid for docid, _ in ranking] == [docid for docid, _ in expected]
    np.testing.assert_allclose([s for _, s in ranking], [s for _, s in expected], atol=1e-4)


# A T5 of random weights.


def random_t5(layers):
    """(A small retriever, random parameters)."""
    config = T5Config(VOCABULARY, 16, 2, 8, 32, num_encoder_layers=1, num_decoder_layers=layers)
    model = GenerativeRetriever(config)
    shapes = {"encoder_input_tokens": (1, 4), "decoder_input_tokens": (1, LENGTH)}
    boxed = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda a: rng.normal(0, 0.3, a.shape).astype(a.dtype), nn.unbox(boxed)["params"]
    )


@pytest.fixture(scope="module")
def t5():
    return random_t5(layers=2)


@pytest.fixture(scope="module")
def search(t5):
    """A compiled (params, trie, queries, beams) -> (rows, scores, bound)."""
    module = t5[0].module

    @functools.partial(jax.jit, static_argnames="beams")
    def search(params, trie, queries, beams):
        apply = functools.partial(module.apply, {"params": params})
        cross_kv, cache = apply(queries, 1, LENGTH, method="prefill")

        def step(tokens, position, cache, some):
            x, cache = apply(tokens, position, cache, cross_kv, queries, method="decode_step")
            return *apply(x, some, method="candidate_logits"), cache

        return constrained_beam_search(step, cache, trie, beams)[:3]

    return search


@pytest.fixture(scope="module")
def score(t5):
    """(query, docids) -> log-probabilities, by teacher forcing; compiled once, for BEAMS docids."""
    model, params = t5
    score_batch = jax.jit(model.score_batch)

    def score(query, docids):
        targets = np.pad(matrix(docids), ((0, BEAMS - len(docids)), (0, 0)))
        batch = {
            "encoder_input_tokens": np.tile(query, (BEAMS, 1)),
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": targets > 0,
        }
        return np.asarray(score_batch(params, batch))[: len(docids)]

    return score


TRIES = {
    "one docid": [(5, 9, EOS)],
    "the end at once": [(EOS,)],
    "no shared beginning": [(first, 3, EOS) for first in range(2, 40)],
    "shared to the last": [(3, 3, last, EOS) for last in range(2, 40)],
    "one path with ends": [(9,) * n + (EOS,) for n in range(LENGTH)],
    "binary": random_docids(seed=1, count=60, symbols=2),
    "mixed": random_docids(seed=2, count=40, symbols=5, first_symbols=30),
    "wide": random_docids(seed=3, count=45, symbols=100),
}


ROOM = room(104, 128, (48, 40, 48, 10), 7)


def roomy_trie(docids):
    """The trie, padded to ROOM."""
    trie, _ = build_trie(matrix(docids), reuse_shapes_of=ROOM)
    assert jax.tree.structure(trie) == jax.tree.structure(ROOM)
    return trie


@pytest.mark.parametrize("name", TRIES)
def test_with_a_beam_a_docid_the_search_equals_scoring_every_docid(t5, search, score, name):
    docids = TRIES[name]
    trie = roomy_trie(docids)
    rows, scores, bound = search(t5[1], trie, QUERIES, BEAMS)
    assert (bound == -np.inf).all()  # nothing was left out
    assert rows.shape == scores.shape == (len(QUERIES), BEAMS)
    rankings = []
    for query, *result in zip(QUERIES, rows, scores, strict=True):
        ranking = found(docids, *result)
        scored = dict(zip(docids, score(query, docids), strict=True))
        assert sorted(docid for docid, _ in ranking) == sorted(docids)
        assert_same(ranking, [(docid, scored[docid]) for docid, _ in ranking])
        assert [s for _, s in ranking] == sorted((s for _, s in ranking), reverse=True)
        rankings.append(tuple(docid for docid, _ in ranking))
    assert len(set(rankings)) > 1 or len(docids) < 10  # the queries matter


def test_with_few_beams_the_search_equals_a_plain_beam_search(t5, search):
    model, params = t5
    logits = jax.jit(model.logits)
    docids = TRIES["mixed"]
    trie, _ = build_trie(matrix(docids))
    results = {beams: search(params, trie, QUERIES, beams) for beams in (3, 12)}
    prefixes = sorted({docid[:n] for docid in docids for n in range(len(docid))})
    inputs = np.pad(matrix(prefixes), ((0, 0), (1, 0)))[:, :-1]
    for i, query in enumerate(QUERIES):
        encoder_inputs = np.tile(query, (len(inputs), 1))
        batch = {"encoder_input_tokens": encoder_inputs, "decoder_input_tokens": inputs}
        log_probs = np.asarray(jax.nn.log_softmax(logits(params, batch)))
        after = {prefix: log_probs[j, len(prefix)] for j, prefix in enumerate(prefixes)}
        for beams, (rows, scores, _) in results.items():
            expected, _ = plain_beam_search(after.__getitem__, set(docids), beams)
            assert_same(found(docids, rows[i], scores[i]), expected)


def test_another_table_of_the_same_shapes_does_not_compile_again(t5, search):
    tables = [random_docids(seed, count=40, symbols=5, first_symbols=30) for seed in (2, 5)]
    tries = [build_trie(matrix(docids))[0] for docids in tables]
    assert tries[0].max_branching == tries[1].max_branching
    assert set(tables[0]) != set(tables[1])
    compiled = []
    for docids, trie in zip(tables, tries, strict=True):
        rows, scores, _ = search(t5[1], trie, QUERIES, 12)
        for result in zip(rows, scores, strict=True):
            ranking = dict(found(docids, *result))
            assert len(ranking) == 12
            assert ranking.keys() <= set(docids)
        compiled.append(search._cache_size())
    assert compiled[0] == compiled[1]


# A language without a network: the next token's logits are a table's row that a prefix's hash names.

SYMBOLS = 6
LOGITS = np.random.default_rng(0).normal(0, 2, (997, 2 + SYMBOLS)).astype(np.float32)
LOG_PROBS = np.asarray(jax.nn.log_softmax(LOGITS))


def hash_after(state, token):
    return (state * 31 + token + 1) % 997


@functools.partial(jax.jit, static_argnames=("beams", "normalize"))
def search_language(trie, states, beams, normalize=True):
    """Searches with the beams' hashes as cache, so that a beam given another's is found out."""

    def step(tokens, position, cache, some):
        state = hash_after(cache, tokens)
        logits = jnp.asarray(LOGITS)[state]
        return logits[..., some], jax.nn.logsumexp(logits, axis=-1) if normalize else None, state

    return constrained_beam_search(step, states[:, None], trie, beams)[:3]


@given(
    docids=st.sets(
        st.lists(st.integers(2, 1 + SYMBOLS), max_size=LENGTH - 1).map(lambda tokens: (*tokens, EOS)),
        min_size=1,
        max_size=20,
    ),
    states=st.lists(st.integers(0, 996), min_size=3, max_size=3),
    beams=st.sampled_from([1, 3, 24]),
    normalize=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_any_docids_in_any_language(docids, states, beams, normalize):
    """By log-probabilities or logits: as a textbook's search, and with a beam a docid as all docids."""
    docids = sorted(docids)
    trie = roomy_trie(docids)
    rows, scores, bounds = search_language(trie, np.array(states, np.int32), beams, normalize)
    table = LOG_PROBS if normalize else LOGITS
    for state, bound, *result in zip(states, bounds.tolist(), rows, scores, strict=True):

        def log_probs(prefix, state=state):
            return table[functools.reduce(hash_after, (0, *prefix), state)]

        expected, closest = plain_beam_search(log_probs, set(docids), beams)
        assume(closest > 1e-4)  # a tie may go either way
        ranking = found(docids, *result)
        assert_same(ranking, expected)

        # What lies above the bound is what scoring every docid finds.
        scored = {
            docid: sum(log_probs(docid[:n])[token] for n, token in enumerate(docid)) for docid in docids
        }
        certain = [docid for docid, score in ranking if score > bound + 1e-4]
        assert certain == sorted(scored, key=scored.get, reverse=True)[: len(certain)]
        assert len(certain) == len(docids) or bound > -np.inf
        assert all(scored[docid] <= bound + 1e-4 for docid in scored.keys() - dict(ranking).keys())
        if not normalize:  # a sum of logits may grow: nothing is known of what was pruned
            assert bound in (-np.inf, np.inf)
        if beams >= len(docids):
            assert bound == -np.inf or len(docids) == beams
            assert_same(ranking, sorted(scored.items(), key=lambda pair: -pair[1]))


def test_where_every_token_may_follow_the_search_is_an_ordinary_one():
    """All sequences of three tokens: a beam search that knows no docids finds the same."""
    tokens = range(2, 2 + SYMBOLS)
    docids = list(itertools.product(tokens, repeat=3))
    trie, _ = build_trie(np.array(docids))
    states, beams = np.array([0, 5, 600], np.int32), 10
    rows, scores, _ = search_language(trie, states, beams)
    for state, *result in zip(states.tolist(), rows, scores, strict=True):
        alive = [(0.0, (), hash_after(state, 0))]
        for _ in range(3):
            longer = [
                (score + LOG_PROBS[state][token], (*written, token), hash_after(state, token))
                for score, written, state in alive
                for token in tokens
            ]
            alive = sorted(longer, reverse=True)[:beams]
        assert_same(found(docids, *result), [(written, score) for score, written, _ in alive])


def test_the_example_of_four_docids():
    result = doctest.testmod(beam_search, extraglobs={"np": np, "build_trie": build_trie})
    assert (result.failed, result.attempted) == (0, 9)
