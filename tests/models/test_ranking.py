"""Ranking objectives against the formulas of their papers, pair by pair and in float64."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
import small_t5
from scipy.special import softmax
from scipy.stats import entropy
from small_t5 import loss_and_gradients, parameters, random_batch, random_groups
from test_t5 import jit

from retrieval_jax.core.errors import UserError
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.objectives import rdrop
from retrieval_jax.models.ranking import dpo, kl, margin_mse, pairwise_margin
from retrieval_jax.models.t5 import output_kernel
from retrieval_jax.training.optimizers import adamw
from retrieval_jax.training.step import abstract_state, initial_state, make_train_step


class Docid(NamedTuple):
    """A candidate: its tokens, their logits and log-probabilities, and the teacher's score of each prefix."""

    tokens: list[int]
    logits: list[float]
    log_probs: list[float]
    teacher: list[float]

    def score(self, length: int | None = None) -> float:
        """RIPOR's score of a prefix: the sum of its logits."""
        return sum(self.logits[:length])


def pairs(batch: dict, logits: np.ndarray) -> Iterator[tuple[Docid, list[tuple[Docid, Docid]]]]:
    """The first positive of each query, and its pairs of a positive and a negative."""
    for n, grades in enumerate(batch["grade"].tolist()):
        docids = []
        for c in range(len(grades)):
            tokens = [token for token in batch["decoder_target_tokens"][n, c].tolist() if token]
            chosen = [logits[n, c, t, token] for t, token in enumerate(tokens)]
            log_z = [math.log(sum(math.exp(x) for x in logits[n, c, t])) for t in range(len(tokens))]
            log_probs = [x - z for x, z in zip(chosen, log_z, strict=True)]
            docids.append(Docid(tokens, chosen, log_probs, batch["score"][n, c].tolist()))
        good = [docid for docid, grade in zip(docids, grades, strict=True) if grade > 0]
        bad = [docid for docid, grade in zip(docids, grades, strict=True) if grade == 0]
        yield good[0], [(a, b) for a in good for b in bad if a.tokens != b.tokens]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def mixed(
    batch: dict, logits: np.ndarray, of_pairs: Callable[[list[tuple[Docid, Docid]]], float], weight: float
) -> float:
    """The mean over queries of a loss of their pairs, plus a weighted cross-entropy."""
    groups = pairs(batch, logits)
    return mean([of_pairs(some) + weight * -mean(positive.log_probs) for positive, some in groups])


def ripor(pairs: list[tuple[Docid, Docid]], lengths: Sequence[int], weights: Sequence[float]) -> float:
    """RIPOR: ((S_n⁺ - S_n⁻) - (t_n⁺ - t_n⁻))² for two prefixes of length n."""
    total = 0.0
    for n, weight in zip(lengths, weights, strict=True):
        errors = [
            (a.score(n) - b.score(n) - (a.teacher[n - 1] - b.teacher[n - 1])) ** 2
            for a, b in pairs
            if a.tokens[:n] != b.tokens[:n]
        ]
        total += weight * mean([x for x in errors if not math.isnan(x)])
    return total


def pag(pairs: list[tuple[Docid, Docid]], shares: dict[int, float]) -> float:
    """PAG: at each length a share of the whole docids' margin."""
    total = 0.0
    for n, share in shares.items():
        errors = [
            (a.score(n) - b.score(n) - share * (a.teacher[-1] - b.teacher[-1])) ** 2
            for a, b in pairs
            if a.tokens[:n] != b.tokens[:n]
        ]
        total += mean([x for x in errors if not math.isnan(x)])
    return total


def ltrgr(pairs: list[tuple[Docid, Docid]], margin: float, score: Callable[[Docid], float]) -> float:
    """LTRGR: max(0, m - s⁺ + s⁻)."""
    return mean([max(0.0, margin - score(a) + score(b)) for a, b in pairs])


def ddro(pairs: list[tuple[Docid, Docid]], beta: float) -> float:
    """DPO: -log σ(β [log π⁺/π_ref⁺ - log π⁻/π_ref⁻])."""
    gains = [(sum(a.log_probs) - a.teacher[-1]) - (sum(b.log_probs) - b.teacher[-1]) for a, b in pairs]
    return mean([math.log(1 + math.exp(-beta * gain)) for gain in gains if not math.isnan(gain)])


def log_prob(docid: Docid) -> float:
    return sum(docid.log_probs)


CASES = {  # the objective, the loss of a query's pairs, the weight of the cross-entropy, the model's score
    "ripor": (
        functools.partial(margin_mse, prefix_lengths=(1, 2, 5), weights=(0.5, 2.0, 1.0)),
        functools.partial(ripor, lengths=(1, 2, 5), weights=(0.5, 2.0, 1.0)),
        0.0,
        "logits",
    ),
    "whole docids": (
        functools.partial(margin_mse, cross_entropy_weight=0.7),
        functools.partial(ripor, lengths=(5,), weights=(1.0,)),
        0.7,
        "logits",
    ),
    "pag": (
        functools.partial(margin_mse, prefix_lengths=(2, 5), shares=(0.5, 1.0)),
        functools.partial(pag, shares={2: 0.5, 5: 1.0}),
        0.0,
        "logits",
    ),
    "a teacher of another scale": (
        functools.partial(margin_mse, prefix_lengths=(2, 5), shares=(0.5, 1.0), teacher_scale=3.0),
        functools.partial(pag, shares={2: 1.5, 5: 3.0}),
        0.0,
        "logits",
    ),
    "ltrgr": (pairwise_margin, functools.partial(ltrgr, margin=1.0, score=log_prob), 1.0, "log_prob"),
    "ltrgr of logits": (
        functools.partial(pairwise_margin, margin=0.3, cross_entropy_weight=0.0),
        functools.partial(ltrgr, margin=0.3, score=Docid.score),
        0.0,
        "logits",
    ),
    "ddro": (functools.partial(dpo, beta=0.4), functools.partial(ddro, beta=0.4), 0.0, "logits"),
    "ddro and cross-entropy": (
        functools.partial(dpo, cross_entropy_weight=0.2),
        functools.partial(ddro, beta=0.1),
        0.2,
        "log_prob",
    ),
}
BATCH = random_groups(rows=8)
CONFIG = dataclasses.replace(small_t5.CONFIG, num_encoder_layers=1, num_decoder_layers=1)
FLOAT64 = functools.partial(np.asarray, dtype=np.float64)


@pytest.fixture(scope="module")
def params() -> dict:
    return parameters(GenerativeRetriever(CONFIG))


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in CASES), ("ripor", "bfloat16"), ("ddro", "bfloat16")]
)
def test_loss_and_gradient_are_those_of_the_papers_formula(name: str, dtype: str, params: dict):
    """Of the float32 logits of what the network gives, in whichever dtype that is."""
    objective, of_pairs, weight, score = CASES[name]
    config = dataclasses.replace(CONFIG, dtype=dtype)
    model = GenerativeRetriever(config, objective=objective, score=score)
    hidden, kernel = FLOAT64(jit(model.hidden)(params, BATCH)), FLOAT64(output_kernel(config, params))

    def expected(kernel: np.ndarray) -> float:
        return mixed(BATCH, hidden @ kernel, of_pairs, weight)

    loss, gradients = loss_and_gradients(model, params, BATCH)
    assert loss == pytest.approx(expected(kernel), rel=2e-5)
    direction = np.random.default_rng(1).normal(size=kernel.shape)
    slope = (expected(kernel + 1e-5 * direction) - expected(kernel - 1e-5 * direction)) / 2e-5
    found = np.sum(FLOAT64(output_kernel(config, gradients)) * direction)
    assert found == pytest.approx(slope, rel=1e-3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    if dtype == "float32":
        blocks = GenerativeRetriever(config, objective=objective, max_logits_per_block=400, score=score)
        assert jit(blocks.loss_fn)(params, BATCH, None)[0] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("lengths", [(5,), (1, 2, 5)])
def test_kl_is_that_of_two_distributions_over_different_prefixes(lengths: tuple[int, ...], params: dict):
    objective = functools.partial(kl, prefix_lengths=lengths, temperature=0.5)
    model = GenerativeRetriever(CONFIG, objective=objective, score="logits")
    hidden, kernel = FLOAT64(jit(model.hidden)(params, BATCH)), FLOAT64(output_kernel(CONFIG, params))

    def of_query(n: int, logits: np.ndarray, length: int) -> float:
        known = {}  # prefix -> (its score, the teacher's), of the first candidate with it
        for c in np.flatnonzero(BATCH["grade"][n] >= 0).tolist():
            tokens = BATCH["decoder_target_tokens"][n, c, :length].tolist()
            score = sum(logits[n, c, t, token] for t, token in enumerate(tokens) if token)
            known.setdefault(tuple(tokens), (score, BATCH["score"][n, c, length - 1] / 0.5))
        some = np.array([both for both in known.values() if np.isfinite(both[1])]).reshape(-1, 2)
        return entropy(softmax(some[:, 1]), softmax(some[:, 0])) if len(some) > 1 else 0.0

    def expected(kernel: np.ndarray) -> float:
        logits = hidden @ kernel
        return np.mean([sum(of_query(n, logits, length) for length in lengths) for n in range(len(logits))])

    loss, gradients = loss_and_gradients(model, params, BATCH)
    assert expected(kernel) > 0.1
    assert loss == pytest.approx(expected(kernel), rel=2e-5)
    direction = np.random.default_rng(1).normal(size=kernel.shape)
    slope = (expected(kernel + 1e-5 * direction) - expected(kernel - 1e-5 * direction)) / 2e-5
    assert np.sum(FLOAT64(output_kernel(CONFIG, gradients)) * direction) == pytest.approx(slope, rel=1e-3)


def test_metrics_tell_which_pairs_are_ordered_right_and_how_well_positives_are_written(params: dict):
    model = GenerativeRetriever(CONFIG, objective=CASES["ripor"][0], score="logits")
    _, metrics = jit(model.loss_fn)(params, BATCH, None)
    logits = FLOAT64(jit(model.logits)(params, BATCH))
    everything = list(pairs(BATCH, logits))
    assert {name for name in metrics if name.startswith("ordered")} == {
        f"ordered_at/{n}" for n in (1, 2, 4, 5)
    }
    for n in (1, 2, 4, 5):
        differ = [(a, b) for _, some in everything for a, b in some if a.tokens[:n] != b.tokens[:n]]
        right = sum(a.score(n) > b.score(n) for a, b in differ)
        assert [float(x) for x in metrics[f"ordered_at/{n}"]] == [right, len(differ)]
    assert metrics["margin_mse_at/2"][1] < metrics["ordered_at/2"][1]  # some scores are unknown
    nats = [x for positive, _ in everything for x in positive.log_probs]
    total, count = metrics["cross_entropy"]
    assert (float(total), count) == (pytest.approx(-sum(nats), rel=1e-5), len(nats))
    first = [(positive, logits[n, 0, 0]) for n, (positive, _) in enumerate(everything)]
    right = sum(positive.logits[0] == max(outputs) for positive, outputs in first)
    assert [float(x) for x in metrics["accuracy_at/1"]] == [right, len(first)]
    assert metrics["loss"][1] == len(everything)


def test_an_ended_docid_gains_nothing_and_absent_candidates_count_nowhere(params: dict):
    """Whatever stands at the positions after a docid's end, and in what is no candidate."""
    ended = (BATCH["decoder_target_tokens"] == 0) | (BATCH["grade"] < 0)[..., None]
    other = BATCH | {
        "decoder_input_tokens": np.where(np.roll(ended, 1, -1) & ended, 7, BATCH["decoder_input_tokens"])
    }
    other["score"] = np.where((BATCH["grade"] < 0)[..., None], 50, BATCH["score"]).astype(np.float32)
    for name in ("ripor", "ltrgr", "ddro"):
        model = GenerativeRetriever(CONFIG, objective=CASES[name][0])
        loss, again = (jit(model.loss_fn)(params, batch, None)[0] for batch in (BATCH, other))
        assert loss == pytest.approx(float(again), rel=1e-6), name


def test_a_query_without_pairs_adds_its_cross_entropy_alone(params: dict):
    same = (BATCH["decoder_target_tokens"][:, 0] > 0).sum(1) == 3  # so that every docid has as many tokens
    some = {name: x[same] for name, x in BATCH.items()}
    alone = {name: x[:, :1] if name != "encoder_input_tokens" else x for name, x in some.items()}
    flat = {name: x if name == "encoder_input_tokens" else x[:, 0] for name, x in some.items()}
    expected = jit(GenerativeRetriever(CONFIG).loss_fn)(params, flat, None)[0]
    for objective in (margin_mse, pairwise_margin, dpo):
        model = GenerativeRetriever(CONFIG, objective=functools.partial(objective, cross_entropy_weight=1.0))
        assert jit(model.loss_fn)(params, alone, None)[0] == pytest.approx(float(expected), rel=1e-5)


def test_the_whole_docid_is_always_learned(params: dict):
    """As its last token may tell it from another: with the weight 1, and the whole margin."""
    for given, whole in (
        (
            {"prefix_lengths": (1, 2), "weights": (0.5, 2.0)},
            {"prefix_lengths": (1, 2, 5), "weights": (0.5, 2, 1)},
        ),
        ({"prefix_lengths": (2,), "shares": (0.5,)}, {"prefix_lengths": (2, 5), "shares": (0.5, 1.0)}),
    ):
        loss, expected = (
            jit(GenerativeRetriever(CONFIG, objective=functools.partial(margin_mse, **some)).eval_fn)(
                params, BATCH
            )
            for some in (given, whole)
        )
        assert loss[0] == pytest.approx(float(expected[0]), rel=1e-6)
        assert loss[1].keys() == expected[1].keys()


def test_rdrop_may_be_added(params: dict):
    """Without dropout both readings agree, and the loss is the objective's own."""
    config = dataclasses.replace(CONFIG, dropout_rate=0.0)
    for ranked in (margin_mse, pairwise_margin):
        loss, both = (
            jit(GenerativeRetriever(config, objective=objective).loss_fn)(params, BATCH, jax.random.key(0))
            for objective in (ranked, functools.partial(rdrop, objective=ranked))
        )
        assert both[0] == pytest.approx(float(loss[0]), rel=1e-5)
        assert both[1]["rdrop"][0] == pytest.approx(0, abs=1e-5)


def test_what_is_missing_is_named(params: dict):
    def refused(batch: dict, objective: Callable, message: str) -> None:
        with pytest.raises(UserError, match=message):
            jax.eval_shape(GenerativeRetriever(CONFIG, objective=objective).eval_fn, params, batch)

    without = {name: x for name, x in BATCH.items() if name != "score"}
    for objective in (margin_mse, dpo):
        refused(without, objective, rf"^{objective.__name__}: needs a teacher's scores: .*--SCORES=NAME")
    for objective in (margin_mse, dpo, pairwise_margin):
        refused(random_batch(), objective, rf"^{objective.__name__}: .*: set --gin.DataConfig.negatives=N")
    lengths = functools.partial(margin_mse, prefix_lengths=(2, 6))
    refused(BATCH, lengths, "margin_mse.prefix_lengths: 6 is more than a docid's 5 tokens")
    weights = functools.partial(margin_mse, prefix_lengths=(2, 5), shares=(0.5,))
    refused(BATCH, weights, "margin_mse.shares: 1 for 2 prefix_lengths: give one for each")


def steps(parallelism: int = 1, **settings) -> list[float]:
    """Loss, norm of the gradient and two more metrics after two steps on all devices."""
    config = dataclasses.replace(CONFIG, dropout_rate=0.0)
    objective = functools.partial(margin_mse, prefix_lengths=(2, 5), cross_entropy_weight=2.0)
    model = GenerativeRetriever(config, adamw(optax.constant_schedule(1e-2)), objective=objective)
    mesh, shapes = partitioning.all_devices(parallelism), {name: x.shape for name, x in BATCH.items()}
    abstract = abstract_state(model, mesh, shapes)
    state = initial_state(model, abstract, shapes, 0)
    step = make_train_step(model, mesh, abstract, 0, **settings)
    for _ in range(2):
        state, metrics = step(state, jax.device_put(BATCH, partitioning.batch_sharding(mesh)))
    return [float(metrics[name]) for name in ("loss", "gradient_norm", "ordered_at/5", "cross_entropy")]


def test_microbatches_and_eight_devices_give_the_steps_of_one():
    """Though the parts of the batch have different numbers of pairs and of tokens."""
    expected = steps()
    assert steps(microbatches=4) == pytest.approx(expected, rel=1e-4)
    done = subprocess.run(
        [sys.executable, "-c", "import json, test_ranking; print(json.dumps(test_ranking.steps(2)))"],
        env=os.environ
        | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(expected, rel=2e-4)
