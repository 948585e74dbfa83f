"""Texts to vectors by a dual encoder, in batches of a few compiled shapes of which little is padding.

A text is computed at the shortest compiled length that has room for its own tokens, together with others of
about its length. Within one shape its vector is the same bit by bit, whatever texts are beside it and
wherever in the batch it stands. Passages have one shape a length on CPUs, so their vectors never depend on
the batch. Where a length has several row counts (queries, and passages on accelerators) the products of
another count round otherwise: vectors of unit length then differ by less than 1e-6.
"""

import bisect
import collections
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.checkpoints.model_folder import LoadedModel
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.mesh import multihost
from retrieval_jax.models.dual_encoder_network import shorten

Shapes = Mapping[int, Sequence[int]]
"""The shapes that may be compiled: a length -> its row counts for each shard of data, both ascending."""
_CPU_TOKENS = 512  # of a shard's batch: more would leave the cache between two products
_ACCELERATOR_TOKENS = 16384  # the same where products should be large
_TOKENISED_AT_ONCE = 256  # texts
_UNDER_WAY = 3  # batches on an accelerator


def lengths_up_to(longest: int, shortest: int, steps: int) -> list[int]:
    """Chooses lengths, with `steps` of them in each doubling from 4 times as many tokens on.

    Args:
      longest: the last of them.
      shortest: the first, and the least distance between two.
      steps: how many there are from a power of two to the next one.
    """
    lengths = [min(shortest, longest)]
    while lengths[-1] < longest:
        power_of_2 = 1 << (lengths[-1].bit_length() - 1)
        lengths.append(min(lengths[-1] + max(shortest, power_of_2 // steps), longest))
    return lengths


def passage_shapes(longest: int, mesh: Mesh | None = None) -> Shapes:
    """Gives the shapes for many texts: about the same number of tokens in every batch, in many lengths.

    Args:
      longest: the tokens that a text is cut to.
      mesh: the mesh to compute on; None for one device.

    Returns:
      On CPUs 20 lengths up to 256, each with one row count: 8% of the tokens of passages of MS MARCO's
      length (75 on average) are padding. On accelerators, where a shape takes longer to compile, 12 lengths
      up to 256, 16 up to 512: 10% of those tokens, 13% where most texts are shorter. Their batches are
      larger, so each length has a second row count, an eighth, for the texts that are left over at the end.
    """
    if (mesh.devices.flat[0] if mesh else jax.devices()[0]).platform == "cpu":
        return {length: (max(_CPU_TOKENS // length, 1),) for length in lengths_up_to(longest, 4, 4)}
    rows = {length: max(_ACCELERATOR_TOKENS // length, 1) for length in lengths_up_to(longest, 16, 4)}
    return {length: sorted({max(count // 8, 1), count}) for length, count in rows.items()}


def query_shapes(longest: int) -> Shapes:
    """Gives the shapes for 1, 8 or 32 texts, in few lengths: a single query waits for no others' rows."""
    return dict.fromkeys(lengths_up_to(longest, 8, 1), (1, 8, 32))


class TextEncoder:
    """Encodes texts as float32 vectors, by a dual encoder's `encode_queries` or `encode_passages`.

    Args:
      encode: (params, int32 tokens B×S) -> vectors B×E.
      params: the model's parameters; the attribute may be replaced between calls.
      vocabulary: tokenizes texts, and puts the model's prompt before each; see `Vocabulary.with_prompt`.
      shapes: those of batches; each is compiled when it is first needed. Texts are cut to the longest.
      mesh: the mesh that `params` lie on; None for one device.
      dimensions: how many of a vector's first dimensions are given; None: all.
      normalize: whether a vector that is shortened gets unit length again, as the model's vectors have.
    """

    def __init__(
        self,
        encode: Callable[[dict, jax.Array], jax.Array],
        params: dict,
        vocabulary: Vocabulary,
        shapes: Shapes,
        mesh: Mesh | None = None,
        *,
        dimensions: int | None = None,
        normalize: bool = False,
    ):
        self.params, self.mesh, self.vocabulary = params, mesh, vocabulary
        self.dimensions, self.normalize = dimensions, normalize
        shards = mesh.shape["data"] if mesh else 1
        self._rows = {length: [shards * rows for rows in counts] for length, counts in shapes.items()}
        self._lengths = sorted(shapes)
        self._compiled: set[tuple[int, int]] = set()
        # A CPU runs batches beside one another: each core is busy while another one's product is not divided.
        device = mesh.devices.flat[0] if mesh else jax.devices()[0]
        self._under_way = max(_UNDER_WAY, os.cpu_count() or 1) if device.platform == "cpu" else _UNDER_WAY
        # The vectors go to every device, so that each process of a mesh of several reads them whole.
        self._encode = jax.jit(encode, out_shardings=NamedSharding(mesh, PartitionSpec()) if mesh else None)

    @property
    def length(self) -> int:
        """The number of tokens that texts are cut to."""
        return self._lengths[-1]

    def use_batch_sizes(self, sizes: Sequence[int]) -> None:
        """Computes batches of these sizes from now on, and compiles them now, at every length.

        Args:
          sizes: numbers of texts for each shard of data, ascending.
        """
        shards = self.mesh.shape["data"] if self.mesh else 1
        for length in self._lengths:
            self._rows[length] = [shards * size for size in sizes]
            for rows in self._rows[length]:
                self._run(np.zeros((rows, length), np.int32))

    def compile_for(self, texts: Sequence[str]) -> None:
        """Compiles the shapes in which these texts, given at once, are encoded."""
        for _, tokens_BxS in self.batches(texts):
            if tokens_BxS.shape not in self._compiled:
                self._run(tokens_BxS)

    def _run(self, tokens_BxS: np.ndarray) -> jax.Array:
        self._compiled.add(tokens_BxS.shape)
        if self.mesh:
            tokens_BxS = multihost.make_global_arrays(self.mesh, tokens_BxS, "data")
        return self._encode(self.params, tokens_BxS)

    def __call__(self, texts: Sequence[str], advance: Callable[[int], None] | None = None) -> np.ndarray:
        """Encodes texts.

        Args:
          texts: any number of texts but none.
          advance: called with the number of texts that are newly done.

        Returns:
          The vectors, float32, len(texts) × vector_dim (or `dimensions`).
        """
        vectors_NxE, running = None, collections.deque()

        def fetch() -> None:
            nonlocal vectors_NxE
            places, found = running.popleft()
            found = np.asarray(found)[: len(places)]
            if self.dimensions:
                found = shorten(found, self.dimensions, self.normalize)
            if vectors_NxE is None:
                vectors_NxE = np.empty((len(texts), found.shape[1]), np.float32)
            vectors_NxE[places] = found
            if advance:
                advance(len(places))

        for places, tokens_BxS in self.batches(texts):
            # The next texts are tokenised and under way before the first vectors are waited for.
            running.append((places, self._run(tokens_BxS)))
            if len(running) > self._under_way:
                fetch()
        while running:
            fetch()
        return vectors_NxE

    def batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Tokenises texts and puts those of about a length together.

        Args:
          texts: the texts.

        Yields:
          (the places in `texts` of the first rows; int32 tokens B×S of one of the shapes), when enough texts
          of a length are there, and in the end what is left over. Other rows are padding.
        """
        waiting = {length: [] for length in self._lengths}
        for first in range(0, len(texts), _TOKENISED_AT_ONCE):
            some = self.vocabulary.tokens(texts[first : first + _TOKENISED_AT_ONCE], self._lengths[-1])
            for place, tokens in enumerate(some, first):
                length = self._lengths[bisect.bisect_left(self._lengths, len(tokens))]
                waiting[length].append((place, tokens))
                if len(waiting[length]) == self._rows[length][-1]:
                    yield _batch(waiting[length], self._rows[length][-1], length)
                    waiting[length] = []
        for length, left in waiting.items():
            while left:
                rows = _rows_for(len(left), self._rows[length])
                yield _batch(left[:rows], rows, length)
                left = left[rows:]


def _rows_for(texts: int, counts: Sequence[int]) -> int:
    """Chooses the row count that holds all texts, or the next smaller one if half of it would be padding."""
    holding = bisect.bisect_left(counts, texts)
    return counts[holding - 1] if holding and 2 * texts < counts[holding] else counts[holding]


def _batch(some: Sequence[tuple[int, list[int]]], rows: int, length: int) -> tuple[list[int], np.ndarray]:
    tokens_BxS = np.zeros((rows, length), np.int32)
    for row, (_, tokens) in zip(tokens_BxS, some, strict=False):
        row[: len(tokens)] = tokens
    return [place for place, _ in some], tokens_BxS


def passage_encoder(opened: LoadedModel, mesh: Mesh) -> TextEncoder:
    """Makes the encoder of passages of a dual encoder that was loaded on a mesh."""
    shapes = passage_shapes(opened.description["passage_length"], mesh)
    vocabulary = opened.vocabulary.with_prompt(opened.model.prompts.passage)
    return TextEncoder(opened.model.encode_passages, opened.params, vocabulary, shapes, mesh)


def query_encoder(
    opened: LoadedModel, mesh: Mesh | None = None, dimensions: int | None = None
) -> TextEncoder:
    """Makes the encoder of queries of a dual encoder.

    Args:
      opened: the model, loaded on `mesh`.
      mesh: the devices; None for one.
      dimensions: see `TextEncoder`.
    """
    model, shapes = opened.model, query_shapes(opened.description["input_length"])
    vocabulary = opened.vocabulary.with_prompt(model.prompts.query)
    cut = {"dimensions": dimensions, "normalize": model.module.normalize}
    return TextEncoder(model.encode_queries, opened.params, vocabulary, shapes, mesh, **cut)
