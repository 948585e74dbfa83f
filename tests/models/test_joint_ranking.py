"""The joint objective against its formulas, candidate by candidate in float64; gradients by differences."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_t5
from scipy.special import softmax
from scipy.stats import entropy
from small_t5 import parameters, random_batch, random_groups
from test_t5 import jit

from retrieval_jax.core.errors import UserError
from retrieval_jax.models.distillation import dense_kl, dense_margin_mse
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.joint_ranking import joint_ranking
from retrieval_jax.models.objectives import Predictions
from retrieval_jax.models.softmax import softmax_stats

B, C, T, M, E, V = 6, 5, 5, 7, 3, 40


class Inputs(NamedTuple):
    """What a network would compute, and what it learns."""

    kernel: np.ndarray
    weights: np.ndarray


def batch_and_hidden() -> tuple[dict, np.ndarray]:
    """Groups with set docids, some of which are short; the last query is padding, whose weights are large."""
    rng, batch = np.random.default_rng(3), random_groups(rows=B)
    tokens = rng.integers(2, V, (B, C, M)) * (np.arange(M) < rng.integers(1, M + 1, (B, C, 1)))
    impacts = rng.uniform(0.2, 2, (B, C, M)).astype(np.float32)
    batch |= {"set_tokens": tokens.astype(np.int32), "set_impacts": impacts}
    batch["grade"][-1] = -1
    return batch, rng.normal(size=(B, C, T, E)).astype(np.float32)


BATCH, HIDDEN = batch_and_hidden()
INPUTS = Inputs(
    np.random.default_rng(1).normal(size=(E, 24)).astype(np.float32),
    np.maximum(np.random.default_rng(2).normal(size=(B, V)), 0).astype(np.float32),
)


def predictions(inputs: Inputs, batch: dict) -> Predictions:
    logits = HIDDEN @ inputs.kernel
    stats = softmax_stats(logits, batch["decoder_target_tokens"])
    return Predictions(batch, HIDDEN, inputs.kernel, stats, logits, False, inputs.weights)


def loss(inputs: Inputs, batch: dict = BATCH, **settings: object) -> tuple[jax.Array, dict]:
    metrics = joint_ranking(lambda batch, _: predictions(inputs, batch), batch, None, **settings)
    total, count = metrics["loss"]
    return total / count, metrics


def margin_mse(scores: list[float], teacher: list[float], good: list[bool]) -> float:
    pairs = [(i, j) for i in range(len(good)) for j in range(len(good)) if good[i] and not good[j]]
    errors = [((scores[i] - scores[j]) - (teacher[i] - teacher[j])) ** 2 for i, j in pairs]
    return float(np.mean(errors)) if errors else 0.0


def kl(scores: list[float], teacher: list[float], good: list[bool]) -> float:
    return entropy(softmax(np.array(teacher) / 0.5), softmax(np.array(scores))) if len(good) > 1 else 0.0


BY_HAND = {"margin_mse": margin_mse, "kl": kl}
DISTILLATIONS = {"margin_mse": dense_margin_mse, "kl": functools.partial(dense_kl, temperature=0.5)}


def of_query(q: int, inputs: Inputs, compare, weights: dict, lengths: dict[int, float | None]) -> float:
    """The weighted losses of one query."""
    rows = []  # of each candidate: its tokens, sums of logits, lexical score, whether it is a positive
    for c in np.flatnonzero(BATCH["grade"][q] >= 0).tolist():
        tokens = [t for t in BATCH["decoder_target_tokens"][q, c].tolist() if t]
        logits = [
            float(HIDDEN[q, c, n].astype(np.float64) @ inputs.kernel[:, t]) for n, t in enumerate(tokens)
        ]
        named = zip(BATCH["set_tokens"][q, c].tolist(), BATCH["set_impacts"][q, c].tolist(), strict=True)
        lexical = sum(inputs.weights[q, t] * impact for t, impact in named if t)
        rows.append((tokens, logits, lexical, BATCH["grade"][q, c] > 0, BATCH["score"][q, c].tolist()))

    def compared(some: list[tuple[float, float, bool]]) -> float:
        known = [row for row in some if not np.isnan(row[1])]
        return compare(*(list(column) for column in zip(*known, strict=True))) if known else 0.0

    w = weights["sequential_weight"]
    total = compared([(lex, s[-1], good) for _, _, lex, good, s in rows])
    whole = [(w * sum(logits) + lex, s[-1], good) for _, logits, lex, good, s in rows]
    total += compared(whole)
    for n, share in lengths.items():
        first = {}
        for tokens, logits, _, good, s in rows:
            teacher = s[n - 1] if share is None else share * s[-1]
            first.setdefault(tuple(tokens[:n]), (w * sum(logits[:n]), teacher, good))
        total += compared([*first.values()])
    return total


CASES = {
    "pag": ({2: 0.5}, {}),
    "ripor's scores of prefixes": ({1: None, 3: None}, {}),
    "weighted": ({2: None}, {"sequential_weight": 0.3, "flops_weight": 0.2}),
}


@pytest.mark.parametrize("distillation", DISTILLATIONS)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_by_hand(name: str, distillation: str):
    lengths, given = CASES[name]
    shares = [share for share in lengths.values() if share is not None]
    settings = {"distillation": DISTILLATIONS[distillation], "prefix_lengths": tuple(lengths), **given}
    settings |= {"shares": shares} if shares else {}
    weights = {"flops_weight": 0.0, "sequential_weight": 1.0, **given}
    compare = BY_HAND[distillation]

    def expected(inputs: Inputs) -> float:
        flops = np.sum(np.mean(inputs.weights[:-1], axis=0) ** 2)  # the last query is padding
        losses = [of_query(q, inputs, compare, weights, lengths) for q in range(B - 1)]
        return np.mean(losses) + weights["flops_weight"] * flops

    slope_of = jit(jax.value_and_grad(functools.partial(loss, **settings), has_aux=True))
    (found, metrics), gradient = slope_of(Inputs(*map(jnp.asarray, INPUTS)))
    wide = Inputs(*(np.asarray(x, np.float64) for x in INPUTS))
    assert found == pytest.approx(expected(wide), rel=2e-5)
    for field in Inputs._fields:
        direction = np.random.default_rng(5).normal(size=getattr(wide, field).shape)
        moved = [wide._replace(**{field: getattr(wide, field) + h * direction}) for h in (1e-5, -1e-5)]
        slope = (expected(moved[0]) - expected(moved[1])) / 2e-5
        assert np.sum(getattr(gradient, field) * direction) == pytest.approx(slope, rel=1e-3, abs=1e-6)
    assert metrics["loss"][1] == B - 1


@pytest.mark.parametrize("dropout", [False, True])
def test_a_model_gives_the_sets_the_weights_of_its_head(dropout: bool):
    """Both of its scores read one encoding: also with dropout, of which nothing is left without a rate."""
    config = dataclasses.replace(
        small_t5.CONFIG, num_encoder_layers=1, num_decoder_layers=1, lexical_head=True, dropout_rate=0.0
    )
    settings = {"prefix_lengths": (2,), "sequential_weight": 0.5, "flops_weight": 0.1}
    objective = functools.partial(joint_ranking, **settings)
    model = GenerativeRetriever(config, objective=objective, score="logits")
    params = parameters(model)
    params["lexical_head"]["bias"] = jnp.float32(0.5)  # so that many weights are above 0
    weights = jit(model.lexical_weights)(params, BATCH)
    assert 0.2 < np.mean(np.asarray(weights) > 0) < 1
    logits = jit(model.logits)(params, BATCH)
    stats = softmax_stats(logits, BATCH["decoder_target_tokens"])
    made = Predictions(BATCH, np.zeros((B, C, T, 1)), np.ones((1, 24)), stats, logits, False, weights)
    expected = jit(lambda: joint_ranking(lambda *_: made, BATCH, None, **settings))()
    key = jax.random.key(0) if dropout else None
    (found, metrics), gradient = jit(jax.value_and_grad(model.loss_fn, has_aux=True))(params, BATCH, key)
    assert found == pytest.approx(float(expected["loss"][0] / expected["loss"][1]), rel=1e-4)
    assert metrics["lexical_loss"][0] == pytest.approx(float(expected["lexical_loss"][0]), rel=1e-4)
    assert np.abs(gradient["lexical_head"]["gain"]).max() > 0
    without = {name: x for name, x in BATCH.items() if not name.startswith("set")}
    assert jit(lambda params: model.predict(params, without).lexical_BxC)(params) is None


def test_metrics_tell_which_pairs_each_score_orders():
    _, metrics = loss(INPUTS)
    lexical = np.asarray(predictions(INPUTS, BATCH).lexical_BxC)
    right = count = 0
    for q in range(B - 1):
        for i, j in np.ndindex(C, C):
            if BATCH["grade"][q, i] > 0 and BATCH["grade"][q, j] == 0:
                count += 1
                right += lexical[q, i] > lexical[q, j]
    assert [float(x) for x in metrics["lexical_ordered"]] == [right, count]
    assert 0 < right < count


def test_what_is_missing_is_named():
    def refused(message: str, batch: dict = BATCH, **settings: object) -> None:
        with pytest.raises(UserError, match=f"^joint_ranking{message}"):
            loss(INPUTS, batch, **settings)

    def without(name: str) -> dict:
        return {key: x for key, x in BATCH.items() if key != name}

    refused(": needs set docids: `retrieval-jax sets`, then --SETS=NAME", without("set_tokens"))
    refused(": needs a teacher's scores", without("score"))
    refused(": ranks several docids", random_batch())
    refused(".shares: 2 for 1 prefix_lengths", prefix_lengths=(2,), shares=(0.5, 1.0))
    refused(".prefix_lengths: 6 is more than a docid's 5 tokens", prefix_lengths=(6,))
    with pytest.raises(UserError, match=r"^joint_ranking: the model has no lexical head: --gin.T5Config"):
        loss(INPUTS._replace(weights=None))
