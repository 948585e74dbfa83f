"""Shapes without data: a batch's arrays, and what docids of a kind come to for so many passages."""

from typing import NamedTuple

import jax
import numpy as np

from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.decoding.trie import Trie, edge_dtypes
from retrieval_jax.docids import residual, semantic
from retrieval_jax.docids.kinds import maker_of
from retrieval_jax.examples import packing
from retrieval_jax.examples.targets import Feature, Targets
from retrieval_jax.examples.training_data import DataConfig

EDGES = 2  # of the trie, a docid: where every node has several children there are no more


class DocidShape(NamedTuple):
    """What a model needs to know of a docid table; named as DocidTable names it.

    `symbols`: at most so many different tokens stand at one position.
    """

    length: int
    output_size: int
    has_docid_vocab: bool
    symbols: int


def docid_shape(kind: str, passages: int, vocab_size: int) -> DocidShape:
    """Docids of a kind for passages that are numbered from 0 on, without making any; where in doubt, longer.

    - atomic: a token a passage.
    - naive: the vocabulary writes a number in at most one piece a digit (T5's takes 5 for 7 digits), of at
      most three digits each, and an end.
    - naive_digits: a token a digit, and an end.
    - semantic, semantic_2d: a path twice as deep as in a tree of even clusters, a number in the leaf, and an
      end. (A simulated tree of uneven clusters took 12 tokens for 8.8 million passages; this says 13.)
    - rq_LxV: the codes, and a number where passages may share all of them.
    """
    make, settings_class = maker_of(kind)
    digits = len(str(passages - 1))
    if kind == "atomic":
        return DocidShape(1, round_up(passages + 1, 128), True, passages)
    if kind == "naive":
        return DocidShape(digits + 1, vocab_size, False, 1 + 10 + 100 + 1000)
    if kind == "naive_digits":
        return DocidShape(digits + 1, 128, True, 1 + 10)
    settings, options = settings_class(), make.keywords
    if settings_class is semantic.Settings:
        k = settings.clusters_per_node
        depth = residual.digits_needed(-(-passages // settings.leaf_size) - 1, k)
        length = 2 * depth + residual.digits_needed(settings.leaf_size - 1, k) + 1
        return DocidShape(length, semantic.output_size(length, k, options["two_d"]), True, 1 + k)
    length = options["levels"] + (settings.shared_codes == "token")
    return DocidShape(length, residual.output_size(length, options["size"]), True, options["size"])


def trie_shape(docids: DocidShape, passages: int) -> Trie:
    """The trie of so many such docids, of jax.ShapeDtypeStruct instead of arrays; rather too large."""

    def array(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    symbols = round_up(docids.symbols, 8)
    bits, edges = (symbols - 1).bit_length(), EDGES * passages
    words = round_up(passages, 32) // 32 * (docids.length - 1) * bits
    max_branching = (symbols,) * docids.length
    return Trie(
        array(np.int32, docids.length, symbols),
        *(array(dtype, edges) for dtype in edge_dtypes(symbols, max_branching)),
        array(np.int32, edges),
        array(np.uint32, words),
        array(np.int32),
        max_branching=max_branching,
        suffix_start=1,
        local_id_bits=bits,
    )


def batch_shapes(
    target_type: type[Targets], config: DataConfig, batch_size: int, docid_length: int | None
) -> dict[str, tuple[int, ...]]:
    """Gives the shapes of the int32 arrays of a training batch of all hosts.

    Args:
      target_type: the class of the targets; see `RetrieverFamily`.
      config: the lengths.
      batch_size: the examples of a batch.
      docid_length: tokens of a docid, where docids are written. Packed rows have room for docids of the full
        length.

    Returns:
      {name of an array: its shape}.
    """
    lengths = target_type.lengths(config, docid_length)
    if config.pack > 1:
        features = {name: Feature(length) for name, length in lengths.items()}
        inputs, targets = packing.row_lengths(features, config.pack, docid_length)
        sides = (("encoder", inputs), ("decoder", targets))
        rows = batch_size // config.pack
        return {name: (rows, length) for side, length in sides for name in packing.NAMES[side]}
    zero = np.int32(0)
    features = {name: np.broadcast_to(zero, (batch_size, length)) for name, length in lengths.items()}
    return {name: array.shape for name, array in target_type.to_batch(features).items()}
