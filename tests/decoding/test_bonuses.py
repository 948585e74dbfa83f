"""Planned search against plain Python: a textbook beam search, and all docids scored by the sum."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rooms import room

from retrieval_jax.data.vocabulary import EOS
from retrieval_jax.decoding.beam_search import constrained_beam_search
from retrieval_jax.decoding.bonuses import build_docids, keep, lexical_scores, rerank
from retrieval_jax.decoding.local_ids import to_local_ids
from retrieval_jax.decoding.planning import build_sets, place_sets, plan
from retrieval_jax.decoding.trie import build_trie
from retrieval_jax.mesh.multihost import make_global_arrays
from retrieval_jax.mesh.partitioning import make_mesh

LENGTH, SYMBOLS, TOKENS, SET = 4, 6, 30, 4
LOGITS = np.random.default_rng(0).normal(0, 2, (997, 2 + SYMBOLS)).astype(np.float32)
LOG_PROBS = np.asarray(jax.nn.log_softmax(LOGITS.astype(np.float64)), np.float64)
ROOM = room(8, 64, (8, 8, 8, 8), 3)
EARLIER = build_docids(np.zeros((64, LENGTH), np.uint8), np.zeros(64, int), np.zeros(4, np.int32))


def hash_after(state, token):
    return (state * 31 + token + 1) % 997


@functools.partial(jax.jit, static_argnames=("beams", "n", "normalize", "mesh"))
def search(trie, states, weights, sets, docids, weight, beams, n, normalize=True, mesh=None):
    """Planned search in a language whose next token's logits are a table's row that a prefix's hash names."""

    def step(tokens, position, cache, some):
        state = hash_after(cache, tokens)
        logits = jnp.asarray(LOGITS)[state]
        return logits[..., some], jax.nn.logsumexp(logits, axis=-1) if normalize else None, state

    kept = keep(plan(weights, sets, n, mesh), docids, weight)
    rows, scores, bound, kept = constrained_beam_search(step, states[:, None], trie, beams, mesh, kept)
    lexical = lexical_scores(weights, sets, docids, rows, mesh)
    return *rerank(rows, scores, lexical, weight), bound, kept.steps_BxD


class Case:
    """Passages with docids (which some share, and of which some have several) and token sets."""

    def __init__(self, docids, extra_of, seed, queries=2, shards=1):
        """`docids` are of the passages, and then one for each passage in `extra_of`, ascending."""
        rng = np.random.default_rng(seed)
        self.docids, self.passages = docids, len(docids) - len(extra_of)
        self.owner = [*range(self.passages), *extra_of]
        self.tokens = rng.integers(0, TOKENS, (self.passages, SET)).astype(np.uint16)
        self.weights = (rng.random((queries, TOKENS)) * (rng.random((queries, TOKENS)) < 0.4)).astype(
            np.float32
        )
        self.weights[:, 0] = 0
        self.states = rng.integers(0, 997, queries).astype(np.int32)
        matrix = np.array([docid + (0,) * (LENGTH - len(docid)) for docid in docids], np.int32)
        self.trie, first = build_trie(matrix, reuse_shapes_of=ROOM)
        self.sets = build_sets(self.tokens, shards=shards)
        extra = np.array(extra_of, np.int32) if extra_of else None
        self.arrays = build_docids(to_local_ids(matrix)[1], first, extra, reuse_shapes_of=EARLIER)

    def lexical(self, query):
        """The lexical score of each passage."""
        return self.weights[query].astype(np.float64)[self.tokens].sum(axis=1)

    def of_docids(self, scores):
        """The best score of each docid's passages, of those that `scores` {passage: score} has."""
        best = {}
        for docid, owner in zip(self.docids, self.owner, strict=True):
            if owner in scores:
                best[docid] = max(best.get(docid, -np.inf), scores[owner])
        return best

    def plain_search(self, query, beams, n, weight, table):
        """([(docid, score), …] best first; the least difference that decided anything; steps by docid)."""
        lexical = self.lexical(query)
        order = np.argsort(-lexical, kind="stable")
        kept = self.of_docids({int(p): lexical[p] for p in order[:n]})
        floor = 0.0 if n > len(order) else lexical[order[n - 1]]
        closest = abs(lexical[order[n - 1]] - lexical[order[n]]) if n < len(order) else np.inf
        alive, steps = {(): 0.0}, dict.fromkeys(kept, 0)
        for position in range(LENGTH):
            candidates = {}
            for prefix, score in alive.items():
                if prefix in self.docids:
                    candidates[prefix] = score
                state = functools.reduce(hash_after, (0, *prefix), int(self.states[query]))
                for token in {d[position] for d in self.docids if d[:position] == prefix != d}:
                    candidates[*prefix, token] = score + table[state][token]

            def priority(item):
                below = [score for docid, score in kept.items() if docid[: len(item[0])] == item[0]]
                return weight * item[1] + max(below, default=floor)

            ranked = sorted(candidates.items(), key=lambda item: -priority(item))
            if len(ranked) > beams:
                closest = min(closest, priority(ranked[beams - 1]) - priority(ranked[beams]))
            alive = dict(ranked[:beams])
            for docid in steps:
                if docid[: position + 1] in alive:
                    steps[docid] = position + 1
        true = self.of_docids(dict(enumerate(lexical)))
        found = sorted(((d, weight * s + true[d]) for d, s in alive.items()), key=lambda item: -item[1])
        gaps = [a[1] - b[1] for a, b in itertools.pairwise(found)]
        return found, min([closest, *gaps]), steps


DOCID = st.lists(st.integers(2, 1 + SYMBOLS), max_size=LENGTH - 1).map(lambda tokens: (*tokens, EOS))


@given(
    docids=st.lists(DOCID, min_size=1, max_size=14),
    extra=st.lists(st.tuples(st.integers(0, 13), DOCID), max_size=4),
    seed=st.integers(0, 10_000),
    sizes=st.sampled_from([(1, 4, True), (3, 4, True), (3, 2, False), (24, 20, True)]),
    weight=st.sampled_from([0.25, 1.0, 3.0]),
)
@settings(deadline=None, max_examples=80)
def test_any_passages_in_any_language(docids, extra, seed, sizes, weight):
    beams, n, normalize = sizes
    extra = sorted((min(passage, len(docids) - 1), docid) for passage, docid in extra)
    case = Case([*docids, *(docid for _, docid in extra)], [passage for passage, _ in extra], seed)
    arguments = case.trie, case.states, case.weights, case.sets, case.arrays, np.float32(weight)
    rows, scores, bounds, _ = search(*arguments, beams, n, normalize)
    assert search._cache_size() <= 4  # of all examples
    table = LOG_PROBS if normalize else LOGITS.astype(np.float64)
    for query in range(2):
        expected, closest, _ = case.plain_search(query, beams, n, weight, table)
        assume(closest > 1e-4)  # a tie may go either way
        real = np.asarray(rows[query]) >= 0
        found = [case.docids[row] for row in np.asarray(rows[query])[real]]
        assert found == [docid for docid, _ in expected]
        np.testing.assert_allclose(scores[query][real], [score for _, score in expected], atol=1e-4)
        assert (np.asarray(scores[query])[~real] == -np.inf).all()

        # With a beam for each docid this is scoring every docid by the sum; what is above the bound is, too.
        everything, _, _ = case.plain_search(query, 1000, 1000, weight, table)
        if beams == 24:
            np.testing.assert_allclose(scores[query][real], [score for _, score in everything], atol=1e-4)
        bound = float(bounds[query])
        certain = [docid for docid, score in expected if score > bound + 1e-4]
        assert certain == [docid for docid, _ in everything[: len(certain)]]
        if not normalize:
            assert bound in (-np.inf, np.inf)


def random_case(seed, passages, **kwargs):
    """A case in which docids are shared, and some passages have several."""
    rng = np.random.default_rng(seed)
    docids = [(*rng.integers(2, 2 + SYMBOLS, 3).tolist(), EOS) for _ in range(passages + 5)]
    return Case(docids, sorted(rng.integers(0, passages, 5).tolist()), seed, **kwargs)


def test_a_mesh_makes_no_difference():
    """tests/search/test_planned.py calls it in a process that has eight devices."""
    case, mesh = (
        random_case(7, passages=50, queries=8, shards=jax.device_count()),
        make_mesh(devices=jax.devices()),
    )
    arguments = case.trie, case.states, case.weights, case.sets, case.arrays, np.float32(0.5)
    alone = search(*arguments, beams=4, n=10)
    place = functools.partial(make_global_arrays, mesh)
    states, weights = place((case.states, case.weights), "data")
    placed = (
        place(case.trie),
        states,
        weights,
        place_sets(case.sets, place),
        place(case.arrays),
        np.float32(0.5),
    )
    for one, eight in zip(alone, search(*placed, beams=4, n=10, mesh=mesh), strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-6)


def test_the_search_says_how_far_it_followed_each_kept_docid():
    case = next(
        case
        for case in (random_case(seed, passages=40) for seed in itertools.count())
        if all(case.plain_search(query, 3, 6, 1.0, LOG_PROBS)[1] > 1e-4 for query in range(2))
    )
    *_, steps = search(
        case.trie, case.states, case.weights, case.sets, case.arrays, np.float32(1), beams=3, n=6
    )
    for query in range(2):
        expected = case.plain_search(query, 3, 6, 1.0, LOG_PROBS)[2]
        order = np.argsort(-case.lexical(query), kind="stable")[:6]
        wanted = [
            [expected[d] for d, o in zip(case.docids, case.owner, strict=True) if o == p] for p in order
        ]
        steps_of = np.asarray(steps[query]).reshape(6, -1)
        for got, want in zip(steps_of, wanted, strict=True):
            assert got[: len(want)].tolist() == want
            assert not got[len(want) :].any()


def test_without_lexical_weights_it_is_the_search_without_a_plan():
    case = random_case(5, passages=45)

    @jax.jit
    def unplanned(trie, states):
        def step(tokens, position, cache, some):
            state = hash_after(cache, tokens)
            logits = jnp.asarray(LOGITS)[state]
            return logits[..., some], jax.nn.logsumexp(logits, axis=-1), state

        return constrained_beam_search(step, states[:, None], trie, 5)[:3]

    nothing = np.zeros_like(case.weights)
    planned = search(case.trie, case.states, nothing, case.sets, case.arrays, np.float32(1), beams=5, n=9)
    for got, expected in zip(planned[:3], unplanned(case.trie, case.states), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("extra", [[], [1, 1]])
def test_docids_keep_their_shapes(extra):
    """An earlier state's arrays take a smaller table, and a larger one with the first shared docids."""
    local_ids = np.arange(10, dtype=np.uint8)[:, None]
    owners = np.array(extra, np.int32) if extra else None
    earlier = build_docids(local_ids, np.arange(10), owners)
    later = build_docids(local_ids[:9], np.arange(9), owners, reuse_shapes_of=earlier)
    assert [x.shape for x in jax.tree.leaves(later)] == [x.shape for x in jax.tree.leaves(earlier)]
    assert later.max_docids == earlier.max_docids == 1 + len(extra)
    assert later.passages == 9 - len(extra)
    larger = np.concatenate([local_ids, local_ids[:2]])
    later = build_docids(larger, np.array([*range(10), 0, 1]), owners, reuse_shapes_of=earlier)
    assert [x.shape for x in jax.tree.leaves(later)] == [x.shape for x in jax.tree.leaves(earlier)]
