"""Packing: several short examples share a row of a batch, which would be padding for the most part.

A row holds the inputs of a few examples one behind the other, and their targets likewise. Segment ids keep
them apart (see models/t5.py), so that each is learned as if it were alone. Which row an example of a batch
gets depends on the examples of that batch only: batch n remains a function of n.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.examples.features import Batch, Feature, Features, trim
from retrieval_jax.examples.targets import Targets


class Tally:
    """Counts the examples that packing leaves out or cuts, and logs them after 10, 100, 1,000, … batches."""

    def __init__(self):
        self.batches = self.examples = self.left_out = self.cut = 0
        self.next_told = 10

    def add(self, examples: int, left_out: int, cut: int) -> None:
        """Adds the counts of a batch."""
        self.batches += 1
        self.examples += examples
        self.left_out += left_out
        self.cut += cut
        if self.batches == self.next_told:
            self.next_told *= 10
            if self.left_out or self.cut:
                log(
                    f"packing left out {self.left_out:,} and cut {self.cut:,} of {self.examples:,} examples: "
                    "fewer do with a smaller DataConfig.pack"
                )


def check(pack: int, targets: Targets | type[Targets]) -> None:
    """Checks that examples with these targets, or targets of this class, may share a row.

    Raises:
      UserError: they may not.
    """
    if pack > 1 and targets.mean_length is None:
        raise UserError(
            f"DataConfig.pack: {pack}: only queries with one docid each are packed, not groups to be ranked "
            "nor queries to be written: set it to 1"
        )


def row_lengths(features: Mapping[str, Feature], pack: int, mean_target: float) -> tuple[int, int]:
    """Gives the lengths of a row that `pack` examples share.

    Args:
      features: the features of an example.
      pack: the number of examples.
      mean_target: the mean tokens of a target.

    Returns:
      (tokens of the inputs: the longest input of an example; tokens of the targets: their mean length with an
      eighth to spare, a multiple of 8, but at least the longest).
    """
    targets = -(-int(pack * mean_target * 1.125) // 8) * 8
    return features["inputs"].length, max(targets, features["targets"].length)


def pack_rows(
    examples: Sequence[Features],
    features: Mapping[str, Feature],
    rows: int,
    lengths: tuple[int, int],
    tally: Tally | None = None,
) -> Batch:
    """Packs examples into the rows of a batch.

    The longest inputs go first, each to the row with the most room left among those with room for its target.
    An input that is longer than this room is cut to it, and an example is left out if no row has room for two
    tokens. Neither happens if there are a few more rows than the mean lengths ask for.

    Args:
      examples: the inputs and targets of each example.
      features: the lengths of both, and which ends with an end of sequence.
      rows: the number of rows.
      lengths: tokens of a row's inputs and of its targets; see `row_lengths`.
      tally: counts what is cut and what is left out.

    Returns:
      Int32 arrays: encoder_input_tokens and encoder_segment_ids rows × lengths[0]; decoder_input_tokens,
      decoder_target_tokens, decoder_loss_weights, decoder_segment_ids and decoder_positions, each
      rows × lengths[1].
    """
    trimmed = [
        (trim(e["inputs"], features["inputs"]), trim(e["targets"], features["targets"])) for e in examples
    ]
    batch = {
        name: np.zeros((rows, length), np.int32)
        for side, length in zip(("encoder", "decoder"), lengths, strict=True)
        for name in NAMES[side]
    }
    used = np.zeros((rows, 2), int)
    count = np.zeros(rows, int)
    cut = 0
    for inputs, targets in sorted(trimmed, key=lambda pair: -len(pair[0])):
        room = np.where(lengths[1] - used[:, 1] >= len(targets), lengths[0] - used[:, 0], 0)
        row = int(room.argmax())
        if room[row] < min(2, len(inputs)):
            continue
        if len(inputs) > room[row]:
            inputs = [*inputs[: room[row] - 1], inputs[-1]]
            cut += 1
        count[row] += 1
        at = slice(used[row, 0], used[row, 0] + len(inputs))
        batch["encoder_input_tokens"][row, at] = inputs
        batch["encoder_segment_ids"][row, at] = count[row]
        at = slice(used[row, 1], used[row, 1] + len(targets))
        batch["decoder_target_tokens"][row, at] = targets
        batch["decoder_input_tokens"][row, at] = [0, *targets[:-1]]
        batch["decoder_loss_weights"][row, at] = 1
        batch["decoder_segment_ids"][row, at] = count[row]
        batch["decoder_positions"][row, at] = np.arange(len(targets))
        used[row] += (len(inputs), len(targets))
    if tally:
        tally.add(len(examples), len(examples) - int(count.sum()), cut)
    return batch


NAMES = {  # of the arrays of a packed batch, by the side of the model that reads them
    "encoder": ("encoder_input_tokens", "encoder_segment_ids"),
    "decoder": (
        "decoder_input_tokens",
        "decoder_target_tokens",
        "decoder_loss_weights",
        "decoder_segment_ids",
        "decoder_positions",
    ),
}
