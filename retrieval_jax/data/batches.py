"""From examples to a model's batches: shuffled, mixed, shared between hosts, and found again by one integer.

Grain does the work: example n of a mixture is a function of n and the seed (its task by a fixed interleaving,
its number by a permutation that differs in each epoch), so that a resumed run seeks instead of skipping, and
a host reads only its own rows. Nothing here imports TensorFlow.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from retrieval_jax.data.examples import Features, PassageTargets, Targets, pad

Batch = dict[str, np.ndarray]
Numbered = Callable[[int, np.random.Generator], Features]  # with a length
Mixture = Mapping[str, tuple[Numbered, float]]  # task -> (its examples, its share)


def encoder_decoder(features: Batch) -> Batch:
    """As seqio's EncDecFeatureConverter: the decoder reads the targets one position late, begun with 0."""
    targets = features["targets"]
    shifted = np.zeros_like(targets)
    shifted[:, 1:] = targets[:, :-1]
    return {
        "encoder_input_tokens": features["inputs"],
        "decoder_target_tokens": targets,
        "decoder_input_tokens": shifted,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }


def dual_encoder(features: Batch) -> Batch:
    """Queries B×S, candidates B×G×P, and their rows and grades B×G (see PassageTargets)."""
    rows, group = features["passage"].shape
    return {
        "left_encoder_input_tokens": features["inputs"],
        "right_encoder_input_tokens": features["targets"].reshape(rows, group, -1),
        "passage": features["passage"],
        "grade": features["grade"],
    }


def batches(
    stages: Sequence[tuple[int | None, Mixture]],
    targets: Targets,
    drop_rates: Mapping[str, float],
    batch_size: int,
    seed: int,
    position: int = 0,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[Batch]:
    """Batches of int32 arrays, from the given position on; endless where the last stage is.

    Args:
      stages: (batches, mixture) one after the other, a curriculum; None batches never end.
      targets: what the examples are answered with.
      drop_rates: task -> the probability that a token of its input is left out, anew in each epoch.
      batch_size: examples of all hosts together.
      seed: of order and draws.
      position: batches that came before.
      host, hosts: which rows of each batch to give: the host-th of equal parts.
    """
    import grain  # seconds

    to_batch = dual_encoder if isinstance(targets, PassageTargets) else encoder_decoder

    def collate(examples: Sequence[Features]) -> Batch:
        return to_batch(pad(examples, targets.features))

    for number, (count, mixture) in enumerate(stages):
        if count is not None and position >= count:
            position -= count
            continue
        parts = [
            grain.MapDataset.range(len(examples))
            .seed(zlib.crc32(f"{seed} {number} {name}".encode()))
            .shuffle()
            .repeat()
            .random_map(_reader(examples, drop_rates.get(name, 0.0)))
            for name, (examples, _) in mixture.items()
        ]
        shares = [share for _, share in mixture.values()]
        mixed = grain.MapDataset.mix(parts, shares) if len(parts) > 1 else parts[0]
        some = mixed.batch(batch_size // hosts, batch_fn=collate)
        some = some[position * hosts + host : None if count is None else count * hosts : hosts]
        # One thread: the processor's cores are for the training step.
        yield from some.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
        position = 0


def _reader(examples: Numbered, drop_rate: float) -> Numbered:
    def read(i: int, rng: np.random.Generator) -> Features:
        features = examples(int(i), rng)
        return {**features, "inputs": drop(features["inputs"], drop_rate, rng)} if drop_rate else features

    return read


def drop(tokens: Sequence[int], rate: float, rng: np.random.Generator) -> Sequence[int]:
    """Leaves out each token with probability `rate`, but never all: it reads more like a query then."""
    kept = [token for token, x in zip(tokens, rng.random(len(tokens)), strict=True) if x >= rate]
    return kept or tokens
