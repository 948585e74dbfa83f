"""Shapes of a training batch's arrays, without data."""

import numpy as np

from retrieval_jax.docids.token_sets import SetShape
from retrieval_jax.examples import packing
from retrieval_jax.examples.features import Feature
from retrieval_jax.examples.targets import Targets, set_lengths
from retrieval_jax.examples.training_data import DataConfig


def batch_shapes(
    target_type: type[Targets],
    config: DataConfig,
    batch_size: int,
    docid_length: int | None,
    sets: SetShape | None = None,
) -> dict[str, tuple[int, ...]]:
    """Gives the shapes of the arrays of a training batch of all hosts.

    Args:
      target_type: the class of the targets; see `RetrieverFamily`.
      config: the lengths.
      batch_size: the examples of a batch.
      docid_length: tokens of a docid, where docids are written. Packed rows have room for docids of the full
        length.
      sets: the sets of tokens that come with the candidates of a query.

    Returns:
      {name of an array: its shape}.

    Raises:
      UserError: such examples cannot be packed.
    """
    lengths = target_type.lengths(config, docid_length)
    if target_type.has_groups:
        of_sets = set_lengths(sets, config.positives + config.negatives)
        lengths |= {name: feature.length for name, feature in of_sets.items()}
    packing.check(config.pack, target_type)
    if config.pack > 1:
        features = {name: Feature(length) for name, length in lengths.items()}
        inputs, targets = packing.row_lengths(features, config.pack, docid_length)
        sides = (("encoder", inputs), ("decoder", targets))
        rows = batch_size // config.pack
        return {name: (rows, length) for side, length in sides for name in packing.NAMES[side]}
    zero = np.int32(0)
    features = {name: np.broadcast_to(zero, (batch_size, length)) for name, length in lengths.items()}
    return {name: array.shape for name, array in target_type.to_batch(features).items()}
