"""A tiny model, its batches, and batches that go wrong, for tests of whole trainings."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.training.loop import train_loop
from retrieval_jax.training.optimizers import adamw
from retrieval_jax.training.settings import TrainSettings

CONFIG = T5Config(64, 16, 2, 8, 32, 1, 1, dropout_rate=0.1)
SHAPES = {"encoder_input_tokens": (8, 6), "decoder_input_tokens": (8, 3)}


def batches(position: int) -> Iterator[dict[str, np.ndarray]]:
    """Random examples, a function of the position alone."""
    while True:
        rng = np.random.default_rng(position)
        inputs, targets = rng.integers(1, 64, (8, 6)), rng.integers(1, 64, (8, 3))
        yield {
            "encoder_input_tokens": inputs.astype(np.int32),
            "decoder_target_tokens": targets.astype(np.int32),
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :3].astype(np.int32),
            "decoder_loss_weights": np.ones((8, 3), np.int32),
        }
        position += 1


def retriever(make=adamw) -> GenerativeRetriever:
    return GenerativeRetriever(CONFIG, make(optax.constant_schedule(1e-2)))


def curve(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "learning_curve.jsonl").read_text().splitlines()]


def train(
    model,
    batches: Callable[[int], Iterator[dict]],
    evaluator: Callable[[dict], dict],
    folder: Path,
    mesh: Mesh | None = None,
    describe_batch: Callable[[int], list[dict]] | None = None,
    **settings: object,
) -> dict:
    """Runs the training loop with these settings. A batch counts as one example, as in `batches`."""
    settings = TrainSettings(**{"batch_size": 1, **settings})
    return train_loop(
        model, batches, evaluator, folder, settings=settings, mesh=mesh, describe_batch=describe_batch
    )


SKIPS = {"LossSpikeGuard.on_spike": "skip", "LossSpikeGuard.window": 2, "LossSpikeGuard.max_skipped": 1}


class Poisoned(GenerativeRetriever):
    """Its loss (1, 2) or only its gradient (3) goes wrong where a batch says so, alike in all rows."""

    def loss_fn(self, params, batch, dropout_rng):
        loss, metrics = super().loss_fn(params, batch, dropout_rng)
        leaf = params["decoder"]["logits_dense"]["kernel"][0, 0]
        wrong = jnp.array([0.0, 7.0, jnp.nan, 0.0])[batch["poison"][0]]
        steep = jax.lax.cond(batch["poison"][0] == 3, lambda x: jnp.sqrt(0 * x), lambda x: 0 * x, leaf)
        total, count = metrics["loss"]
        return loss + wrong + steep, {**metrics, "loss": (total + wrong * count, count)}


def spiky() -> Poisoned:
    return Poisoned(CONFIG, adamw(optax.constant_schedule(1e-2)))


def poisoned(
    position: int, at: int, poison: int, until: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of which those of the steps `at` to `until` (None: `at` alone) are poisoned."""
    for number, batch in enumerate(batches(position), start=position + 1):
        bad = at <= number <= (until or at)
        yield {**batch, "poison": np.full(8, poison if bad else 0, np.int32)}
