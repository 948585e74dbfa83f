"""Sampling against the definition: the renormalised top-k softmax, teacher forcing, and keys a passage."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_jax.data.vocabulary import EOS
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.query_generator import QueryGenerator

# Embeddings of size 3 make the logits uneven, so that every part of the sampling matters.
CONFIG = T5Config(40, 16, 2, 8, 32, 1, 2, embedding_init_std=3.0)
MODEL = QueryGenerator(CONFIG)
PASSAGES = np.array([[7, 8, 9, 4, EOS, 0], [30, 3, EOS, 0, 0, 0], [5, 6, 7, 8, 9, EOS]], np.int32)
SHAPES = {"encoder_input_tokens": (1, 6), "decoder_input_tokens": (1, 4)}


@pytest.fixture(scope="module")
def params() -> dict:
    return nn.unbox(jax.jit(lambda key: MODEL.get_initial_variables(key, SHAPES))(jax.random.key(3)))[
        "params"
    ]


@functools.partial(jax.jit, static_argnames=("count", "length", "temperature", "top_k"))
def sample(params, passages, rows, seed=0, count=5, length=6, temperature=1.0, top_k=10):
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(rows)
    return MODEL.sample(params, passages, keys, count, length, temperature, top_k)


def teacher_forced(params: dict, passage: np.ndarray, tokens_NxT: np.ndarray) -> np.ndarray:
    """Logits N×T×V of the samples' positions, through the network's other path (no cache)."""
    batch = {
        "encoder_input_tokens": np.tile(passage, (len(tokens_NxT), 1)),
        "decoder_input_tokens": np.pad(tokens_NxT, ((0, 0), (1, 0)))[:, :-1],
    }
    return np.asarray(jax.jit(MODEL.logits)(params, batch))


def written(tokens_NxT: np.ndarray) -> np.ndarray:
    """Which positions are of a sample: up to and with its first EOS."""
    ended = np.cumsum(tokens_NxT == EOS, axis=1) - (tokens_NxT == EOS)
    return ended == 0


def test_tokens_are_drawn_from_the_renormalised_top_k_softmax(params):
    """First tokens, and second tokens after the commonest first one, by a chi-square test each."""
    count, temperature, top_k = 20_000, 1.5, 6
    tokens, _ = sample(params, PASSAGES[:1], np.array([0]), 1, count, 2, temperature, top_k)
    tokens = np.asarray(tokens)[0]
    first = np.bincount(tokens[:, 0]).argmax()
    assert first != EOS
    after = tokens[tokens[:, 0] == first]
    logits = teacher_forced(params, PASSAGES[0], np.array([[first, 0]]))[0].astype(np.float64)
    for position, drawn in enumerate((tokens[:, 0], after[:, 1])):
        best = np.argsort(-logits[position])[:top_k]
        expected = np.exp(logits[position][best] / temperature)
        expected *= len(drawn) / expected.sum()
        counts = np.array([(drawn == token).sum() for token in best])
        assert counts.sum() == len(drawn)  # nothing outside the top k
        kept = expected > 5
        assert kept.sum() >= 3, "a distribution that tests something"
        chi_square = (((counts - expected) ** 2) / expected)[kept].sum()
        assert chi_square < 20.5  # the 99.9th percentile for 5 degrees of freedom


def test_only_the_top_ten_and_the_log_probabilities_of_teacher_forcing(params):
    tokens, scores = sample(params, PASSAGES, np.arange(3), count=50, length=6)
    assert tokens.shape == (3, 50, 6)
    assert tokens.dtype == jnp.int32
    for passage, tokens_NxT, scores_N in zip(PASSAGES, np.asarray(tokens), np.asarray(scores), strict=True):
        logits = teacher_forced(params, passage, tokens_NxT)
        chosen = np.take_along_axis(logits, tokens_NxT[..., None], -1)[..., 0]
        likelier = (logits > chosen[..., None]).sum(-1)
        real = written(tokens_NxT)
        assert likelier[real].max() < 10
        assert len(np.unique(likelier[real])) > 5  # not only the likeliest
        assert (tokens_NxT[~real] == 0).all()
        batch = {
            "encoder_input_tokens": np.tile(passage, (50, 1)),
            "decoder_input_tokens": np.pad(tokens_NxT, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": tokens_NxT,
            "decoder_loss_weights": real.astype(np.int32),
        }
        np.testing.assert_allclose(scores_N, jax.jit(MODEL.score_batch)(params, batch), rtol=1e-4, atol=1e-4)


def test_samples_end_at_eos(params):
    tokens = np.asarray(sample(params, PASSAGES, np.arange(3), count=200, length=8)[0]).reshape(-1, 8)
    ends = (tokens == EOS).sum(axis=1)
    assert set(ends.tolist()) == {0, 1}
    assert (tokens[~written(tokens)] == 0).all()
    assert len(np.unique(np.argmax(tokens == EOS, axis=1))) > 3  # at many places


def test_a_passages_queries_are_its_own(params):
    """They repeat with the seed, whatever else is in the batch and wherever in it the passage stands."""
    rows = np.array([100, 8_841_822, 2])
    tokens, scores = sample(params, PASSAGES, rows)
    again, _ = sample(params, PASSAGES, rows)
    np.testing.assert_array_equal(tokens, again)
    turned = [2, 0, 1]
    other, other_scores = sample(params, PASSAGES[turned], rows[turned])
    np.testing.assert_array_equal(np.asarray(tokens)[turned], other)
    np.testing.assert_allclose(np.asarray(scores)[turned], other_scores, rtol=1e-5)
    alone, _ = sample(params, PASSAGES[1:2], rows[1:2])
    np.testing.assert_array_equal(np.asarray(tokens)[1:2], alone)

    reseeded, _ = sample(params, PASSAGES, rows, 1)
    assert (np.asarray(reseeded) != tokens).any(axis=(1, 2)).all()
    same_text, _ = sample(params, PASSAGES[[0, 0]], np.array([0, 1]))
    assert (np.asarray(same_text)[0] != np.asarray(same_text)[1]).any()  # another row draws otherwise


def test_t5x_interface(params):
    """Loss and prediction through the names that T5X calls."""
    batch = {
        "encoder_input_tokens": PASSAGES,
        "decoder_input_tokens": np.array([[0, 4, 5], [0, 6, 7], [0, 8, 9]], np.int32),
        "decoder_target_tokens": np.array([[4, 5, 1], [6, 7, 1], [8, 9, 1]], np.int32),
        "decoder_loss_weights": np.ones((3, 3), np.int32),
    }
    loss, metrics = jax.jit(MODEL.eval_fn)(params, batch)
    scores = jax.jit(MODEL.score_batch)(params, batch)
    assert float(loss) == pytest.approx(-float(scores.sum()) / 9, rel=1e-5)
    assert {"loss", "accuracy", "accuracy_at/3"} <= set(metrics)
    predict = jax.jit(MODEL.predict_batch_with_aux, static_argnames=("count", "length"))
    tokens, aux = predict(params, batch, jax.random.key(0), count=2, length=3)
    assert tokens.shape == (3, 2, 3)
    assert aux["scores"].shape == (3, 2)
