"""The stream of batches: examples are shuffled, mixed and shared between hosts; one integer is its position.

Grain does the work: example n of a mixture is a function of n and the seed (its task by a fixed interleaving,
its number by a permutation that differs in each epoch), so that a resumed run seeks instead of skipping, and
each host reads only its own rows. Nothing here imports TensorFlow.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.examples import packing
from retrieval_jax.examples.features import COPY, Batch, Features, pad
from retrieval_jax.examples.targets import Targets

Numbered = Callable[[int, np.random.Generator], Features]  # with a length
Mixture = Mapping[str, tuple[Numbered, float]]  # task -> (its examples, its weight)
Stages = Sequence[tuple[int | None, Mixture]]
T = TypeVar("T")


def batches(
    stages: Stages,
    targets: Targets,
    token_dropout: Mapping[str, float],
    batch_size: int,
    seed: int,
    position: int = 0,
    rows: Sequence[int] | None = None,
    pack: int = 1,
) -> Iterator[Batch]:
    """Yields batches from a position on.

    Args:
      stages: a curriculum of (its batches, mixture); None batches never end.
      targets: makes the features and the batches.
      token_dropout: for each task, the probability that a token of its input is left out, drawn in each
        epoch; the prompt stays.
      batch_size: the examples of a batch, of all hosts together.
      seed: seeds the order and the draws.
      position: the examples before the first batch, of all hosts together. A curriculum counts them in
        batches of this size.
      rows: the rows of each batch to give, ascending (the other hosts give the others); None: all.
      pack: how many examples share a row, see packing.py; each host packs its own examples. 1: a row each.

    Yields:
      {name: int32 array}; see `Targets.to_batch`. The stream is endless if the last stage is.

    Raises:
      UserError: the examples cannot be packed so.
    """
    import grain  # seconds

    tally = packing.Tally()
    own = np.arange(batch_size) if rows is None else np.asarray(rows)

    packing.check(pack, targets)
    if len(own) % pack:
        raise UserError(f"DataConfig.pack: {pack} does not divide the batch of {len(own)}: change one")

    def collate(examples: Sequence[Features]) -> Batch:
        if pack == 1:
            return targets.to_batch(pad(examples, targets.features))
        lengths = packing.row_lengths(targets.features, pack, targets.mean_length)
        return packing.pack_rows(examples, targets.features, len(examples) // pack, lengths, tally)

    def reader(task: str, examples: Numbered) -> Numbered:
        return _reader(examples, token_dropout.get(task, 0.0), targets.prompt)

    first, position = _stage(stages, batch_size, position)
    for number in range(first, len(stages)):
        count, mixture = stages[number]
        mixed = _mixed(number, mixture, seed, reader)

        def pick(i: int, mixed=mixed, position=position) -> Features:
            batch, row = divmod(i, len(own))
            return mixed[position + batch * batch_size + int(own[row])]

        left = 1 << 40 if count is None else -(-(count * batch_size - position) // batch_size)
        length = left * len(own)
        stage = grain.MapDataset.range(length).map(pick).batch(len(own), batch_fn=collate)
        # One thread: the processor's cores are for the training step.
        yield from stage.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
        # What the last batch took of the next stage, after other sizes of batches.
        position = 0 if count is None else position + (left - count) * batch_size


def examples_of(
    stages: Stages,
    batch_size: int,
    seed: int,
    position: int,
    tell: Callable[[str, int, np.random.Generator], T],
) -> list[T]:
    """Tells which examples a batch was made of, without making it.

    Args:
      stages: as `batches` was given.
      batch_size: as `batches` was given.
      seed: as `batches` was given.
      position: the examples before the batch.
      tell: gets the task, the number of the example in it, and a generator which draws what was drawn when
        the batch was made.

    Returns:
      What `tell` gives for each example, row by row.
    """
    number, position = _stage(stages, batch_size, position)

    def teller(task: str, _: Numbered) -> Callable[[int, np.random.Generator], T]:
        return lambda i, rng: tell(task, int(i), rng)

    mixed = _mixed(number, stages[number][1], seed, teller)
    return [mixed[position + row] for row in range(batch_size)]


def _stage(stages: Stages, batch_size: int, position: int) -> tuple[int, int]:
    """(the stage of a position, the examples of that stage before it); (len(stages), 0) after the last."""
    for number, (count, _) in enumerate(stages):
        if count is None or position < count * batch_size:
            return number, position
        position -= count * batch_size
    return len(stages), 0


def _mixed(number: int, mixture: Mixture, seed: int, make: Callable[[str, Numbered], Callable]):
    """The endless sequence of a stage's examples: `make(task, its examples)` is called for each one."""
    import grain

    parts = [
        grain.MapDataset.range(len(examples))
        .seed(zlib.crc32(f"{seed} {number} {name}".encode()))
        .shuffle()
        .repeat()
        .random_map(make(name, examples))
        for name, (examples, _) in mixture.items()
    ]
    weights = [weight for _, weight in mixture.values()]
    return grain.MapDataset.mix(parts, weights) if len(parts) > 1 else parts[0]


def _reader(examples: Numbered, drop_rate: float, prompt: Sequence[int]) -> Numbered:
    def read(i: int, rng: np.random.Generator) -> Features:
        features = examples(int(i), rng)
        tokens, copy = features["inputs"], features.get(COPY)
        # A query with a typo differs from its copy by that alone; all others are the same as theirs.
        if not drop_rate or (copy is not None and list(copy) != list(tokens)):
            return features
        kept = drop(tokens, drop_rate, rng, prompt)
        return {**features, "inputs": kept, **({} if copy is None else {COPY: kept})}

    return read


def drop(
    tokens: Sequence[int], rate: float, rng: np.random.Generator, prompt: Sequence[int] = ()
) -> Sequence[int]:
    """Leaves out each token with probability `rate`, but never all: a chunk then reads like a query.

    Args:
      tokens: of a prompt and a text.
      rate: the probability.
      rng: draws.
      prompt: the tokens of the prompt, which stay; the text may have changed the last ones.
    """
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, tokens, strict=False))
    start = sum(1 for _ in same)
    drawn = rng.random(len(tokens) - start)
    kept = [token for token, x in zip(tokens[start:], drawn, strict=True) if x >= rate]
    return [*tokens[:start], *kept] if kept else tokens
