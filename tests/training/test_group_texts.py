"""Batches whose texts are encoded in groups by length: the same training, in a few compiled steps."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optax
import pytest
from tiny_training import curve, train

from retrieval_jax.mesh import partitioning
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.text_groups import TextGroups
from retrieval_jax.training import loop
from retrieval_jax.training.flops import model_flops
from retrieval_jax.training.group_texts import group_texts
from retrieval_jax.training.optimizers import adamw
from retrieval_jax.training.program import plan_train_step

B, G, S, P = 16, 2, 16, 32
LONGEST = {0: (16, 32), 1: (8, 16), 2: (8, 8)}  # of all but an eighth of the queries and of the passages


def texts(rng: np.random.Generator, shape: tuple[int, ...], most: int) -> np.ndarray:
    """Texts of at most `most` tokens (and one of exactly so many), but for an eighth of any length."""
    *rows, full = shape
    lengths = rng.integers(1, most + 1, rows).ravel()
    chosen = rng.permutation(lengths.size)
    lengths[chosen[0]] = most
    long = chosen[1 : 1 + lengths.size // 8]
    lengths[long] = rng.integers(most, full + 1, len(long))
    real = np.arange(full) < lengths.reshape(*rows, 1)
    return np.where(real, rng.integers(2, 64, shape), 0).astype(np.int32)


def batches(position: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of three kinds of lengths in turn; a position counts batches."""
    for n in itertools.count(position):
        rng = np.random.default_rng(n)
        queries, passages = LONGEST[n % 3]
        yield {
            "left_encoder_input_tokens": texts(rng, (B, S), queries),
            "right_encoder_input_tokens": texts(rng, (B, G, P), passages),
            "passage": rng.permutation(B * G).reshape(B, G).astype(np.int32),
            "grade": np.repeat(np.int32([[1, 0]]), B, axis=0),
            "other_positives": np.full((B, 1), -1, np.int32),
        }


def model(grouped: bool = True, **settings) -> DualEncoder:
    made = DualEncoder(
        T5Config(64, 16, 2, 8, 32, 1, 0, dropout_rate=0.0),
        adamw(optax.constant_schedule(1e-3)),
        vector_dim=6,
        scale=5.0,
        **settings,
    )
    if not grouped:
        made.text_arrays = ()
    return made


def losses(folder: Path) -> list[float]:
    return [point["loss"] for point in curve(folder) if "loss" in point]


def test_the_training_is_the_same_and_compiles_a_step_for_each_kind_of_batch(tmp_path, monkeypatch):
    planned = []

    def recording(*args, **kwargs):
        planned.append(plan_train_step(*args, **kwargs))
        return planned[-1]

    monkeypatch.setattr(loop, "plan_train_step", recording)
    run = {"batches": batches, "evaluator": lambda params: {}, "log_every": 1, "save_every": 5}
    train(model(), folder=tmp_path / "whole", steps=9, **run)
    assert [program.function._cache_size() for program in planned] == [1, 1, 1]
    assert len(losses(tmp_path / "whole")) == 9
    planned.clear()
    train(model(grouped=False), folder=tmp_path / "full", steps=9, **run)
    assert [program.function._cache_size() for program in planned] == [1]
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "full"), rel=1e-4)

    train(model(), folder=tmp_path / "parts", steps=5, **run)
    train(model(), folder=tmp_path / "parts", steps=9, **run)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")  # to the last bit


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_each_part_of_a_batch_fits_the_lengths_chosen_for_it(microbatches: int):
    mesh, arrays = partitioning.all_devices(), DualEncoder.text_arrays
    found = list(itertools.islice(group_texts(batches(0), arrays, mesh, microbatches), 6))
    chosen = [groups.lengths if groups else (S, P) for _, groups in found]
    if microbatches == 1:
        assert chosen == [LONGEST[0], LONGEST[1], LONGEST[2]] * 2
        assert found[0][1] is None
        assert found[1][1] == TextGroups((8, 16), mesh.shape["data"])
    if B % microbatches:
        assert chosen == [(S, P)] * 6
    for n, (batch, _) in enumerate(found):
        for name, length in zip(arrays, chosen[n], strict=True):
            np.testing.assert_array_equal(batch[name], next(batches(n))[name])  # nothing is cut or moved
            for part in range(microbatches):
                tokens = batch[name][part::microbatches].reshape(-1, batch[name].shape[-1])
                assert np.count_nonzero(tokens[:, length:].any(-1)) <= -(-len(tokens) // 8)


def test_there_are_no_more_choices_than_levels():
    """Whatever the lengths of queries and passages are, none is cut."""

    def of(queries: int, passages: int) -> dict[str, np.ndarray]:
        sizes = {"left_encoder_input_tokens": (64, queries), "right_encoder_input_tokens": (256, passages)}
        return {
            name: (np.arange(full) < most).astype(np.int32) * np.ones((8, 1), np.int32)
            for name, (full, most) in sizes.items()
        }

    pairs = [*itertools.product(range(1, 65, 7), range(1, 257, 15)), (64, 256)]
    made = group_texts((of(*pair) for pair in pairs), DualEncoder.text_arrays, partitioning.all_devices())
    chosen = [groups.lengths if groups else (64, 256) for _, groups in made]
    assert all(q <= Q and p <= P for (q, p), (Q, P) in zip(pairs, chosen, strict=True))
    assert set(chosen) == {(16, 64), (24, 96), (40, 160), (64, 256)}
    # An array of a single length never asks for more of the other.
    single = [{"a": np.ones((8, 5), np.int32), "b": of(1, 20)["right_encoder_input_tokens"]}]
    ((_, groups),) = group_texts(iter(single), ("a", "b"), partitioning.all_devices())
    assert groups.lengths == (5, 64)


def test_without_arrays_of_texts_batches_pass_as_they_are():
    made = [{"encoder_input_tokens": np.zeros((2, 3), np.int32)} for _ in range(2)]
    mesh = partitioning.all_devices()
    assert [*group_texts(iter(made), (), mesh)] == [(batch, None) for batch in made]


def test_flops_are_those_of_the_lengths():
    shapes = {name: x.shape for name, x in next(batches(0)).items()}
    full, short = (model_flops(model(), shapes, groups) for groups in (None, TextGroups((8, 8), 1)))
    # 2 of 16 queries and 4 of 32 passages are long. Attention's products grow with the square of the length.
    tokens = (2 * 16 + 14 * 8 + 4 * 32 + 28 * 8) / (16 * 16 + 32 * 32)
    assert 0.5 * tokens < short / full < tokens + 0.02
