"""What is asked of a way in which a generative retriever finds docids; see search_strategies.py for the two.

A docid kind names its strategy, a docid table keeps the name on disk, and everything that searches (the
searcher, preflight, exported programs, T5X) asks the strategy.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.decoding.atomic import DocidTokens
from retrieval_jax.decoding.bonuses import DocidArrays, Planning
from retrieval_jax.decoding.planning import place_sets
from retrieval_jax.decoding.trie import Trie
from retrieval_jax.docids.table import DocidShape, DocidTable
from retrieval_jax.docids.token_sets import SetShape, TokenSets
from retrieval_jax.models.generative import GenerativeRetriever


class SearchStrategy:
    """How a generative retriever finds docids. A strategy has no state: its class is used, not an instance.

    The docids are a tree of arrays (a Trie or DocidTokens), which compiled programs take as an argument:
    nothing that grows with the collection is a constant in them.

    Attributes:
      name: what a docid table's manifest calls the strategy.
      mesh_axes: the mesh axes over which the arrays' first axes are divided; () where every device has all.
      set_axes: the mesh axes over which the token sets of a search that plans are divided.
      prunes: whether `decode` drops hypotheses, so that it may miss a docid; it then also gives
        "pruned_upper_bound", above which no docid that it missed scores.
    """

    name: str
    mesh_axes: tuple[str, ...] = ()
    set_axes: tuple[str, ...] = ("data",)
    prunes: bool = False

    @classmethod
    def build(
        cls, table: DocidTable, outputs: int, reuse_shapes_of: Trie | DocidTokens | None = None
    ) -> tuple[Trie | DocidTokens, np.ndarray]:
        """Makes the arrays that a search for a table's docids takes.

        Args:
          table: the docids.
          outputs: number of tokens of the model's softmax.
          reuse_shapes_of: the arrays of an earlier state of the table: where the new ones fit into their
            shapes, a search that was compiled for those takes the new ones.

        Returns:
          (docids; first_N int: for each row of the table the first row with the same docid).

        Raises:
          UserError: the docids cannot be searched in this way.
        """
        raise NotImplementedError

    @classmethod
    def abstract(cls, shape: DocidShape, passages: int, outputs: int) -> Trie | DocidTokens:
        """Makes what `build` does for docids that are not made yet, rather too large than too small.

        Args:
          shape: of the docids.
          passages: how many there are.
          outputs: number of tokens of the model's softmax.

        Returns:
          The docids, with jax.ShapeDtypeStruct in the place of arrays.

        Raises:
          UserError: there are too many docids to be searched in this way.
        """
        raise NotImplementedError

    @classmethod
    def width(cls, beams: int, k: int, outputs: int) -> int:
        """Returns how many docids a search finds for each query.

        Args:
          beams: the beams of a beam search.
          k: how many passages are wanted.
          outputs: number of tokens of the model's softmax.
        """
        raise NotImplementedError

    @classmethod
    def steps(cls, docids: Trie | DocidTokens) -> int:
        """Returns the number of decoding steps in the loop of the search, at most."""
        raise NotImplementedError

    @classmethod
    def decode(
        cls,
        model: GenerativeRetriever,
        params: dict,
        batch: Mapping[str, jax.Array],
        docids: Trie | DocidTokens,
        width: int,
        mesh: Mesh | None = None,
        recall_target: float | None = None,
        planning: Planning | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Finds the docids of highest score for each query. Pure: it may be compiled, with `width` static.

        Args:
          model: the retriever.
          params: its parameters.
          batch: "encoder_input_tokens", int32 B×S.
          docids: as `build` gives them.
          width: number of docids to find per query.
          mesh: the devices that `params` and `docids` lie on; None for one device.
          recall_target: None for an exact search; else the expected recall of an approximate top-k, where
            the strategy has one.
          planning: as `build_planning` gives it, to search with lexical scores; None to search without.

        Returns:
          (rows int32 B×width: rows of the table, best first, -1 where there are no more docids; {"scores":
          float32 B×width, of the docids, as the model's `score` says, …}). Of passages that share a docid the
          first one's row is found.
        """
        raise NotImplementedError

    @classmethod
    def planned_docids(
        cls,
        table: DocidTable,
        docids: Trie | DocidTokens,
        first_N: np.ndarray,
        reuse_shapes_of: DocidArrays | None = None,
    ) -> DocidArrays | None:
        """Makes `Planning.docids`.

        Args:
          table: the docids.
          docids: as `build` gives them.
          first_N: as `build` gives it.
          reuse_shapes_of: what was made for an earlier state of the table.

        Returns:
          NumPy arrays; None where docids are single tokens, of which a plan needs no more than the sets.
        """
        return None

    @classmethod
    def abstract_planned_docids(cls, shape: DocidShape, passages: int) -> DocidArrays | None:
        """Makes what `planned_docids` does for docids that are not made yet.

        Args:
          shape: of the docids.
          passages: how many there are.

        Returns:
          The same with jax.ShapeDtypeStruct in the place of arrays.
        """
        return None

    @classmethod
    def build_planning(
        cls,
        table: DocidTable,
        docids: Trie | DocidTokens,
        first_N: np.ndarray,
        sets: TokenSets,
        size: int,
        shards: int = 1,
        reuse_shapes_of: Planning | None = None,
    ) -> Planning:
        """Makes what a search that plans ahead takes besides the docids. Its `sequential_weight` is 1.

        Args:
          table: the docids.
          docids: as `build` gives them.
          first_N: as `build` gives it.
          sets: the token sets of the same passages, in the same order.
          size: how many passages a plan keeps.
          shards: devices along the mesh's axis `data`.
          reuse_shapes_of: what was made for an earlier state of the table.
        """
        raise NotImplementedError

    @classmethod
    def place_planning(cls, planning: Planning, place: Callable) -> Planning:
        """Places what `build_planning` gives on the devices.

        Args:
          planning: NumPy arrays.
          place: (tree, axes of the first dimension…) -> the tree on the devices.
        """
        sets = place_sets(planning.sets, place, *cls.set_axes)
        rest = place((planning.sequential_weight, planning.docids))
        return Planning(sets, *rest, planning.size)

    @classmethod
    def abstract_planning(
        cls,
        docids: DocidArrays | None,
        passages: int,
        outputs: int,
        vocab_size: int,
        sets: SetShape,
        size: int,
        shards: int,
    ) -> Planning:
        """Makes what `build_planning` does for sets that are not made yet, of jax.ShapeDtypeStruct.

        Args:
          docids: `Planning.docids`: of `planned_docids`, or of `abstract_planned_docids`.
          passages: how many there are.
          outputs: number of tokens of the model's softmax.
          vocab_size: of the text vocabulary.
          sets: the shape of the sets.
          size: how many passages a plan keeps.
          shards: devices along the mesh's axis `data`.
        """
        raise NotImplementedError

    @classmethod
    def encode(cls, model: GenerativeRetriever, params: dict, batch: Mapping[str, jax.Array]) -> object:
        """Computes what `token_scores` needs once for a batch of queries. Pure: it may be compiled.

        Args:
          model: the retriever.
          params: its parameters.
          batch: "encoder_input_tokens", int32 B×S.

        Returns:
          A tree of arrays.
        """
        raise NotImplementedError

    @classmethod
    def token_scores(
        cls,
        model: GenerativeRetriever,
        params: dict,
        batch: Mapping[str, jax.Array],
        encoded: object,
        tokens_BxKxL: jax.Array,
    ) -> jax.Array:
        """Computes the scores that `decode` gives to docids' tokens. Pure: it may be compiled.

        Args:
          model: the retriever.
          params: its parameters.
          batch: "encoder_input_tokens", int32 B×S.
          encoded: what `encode` made of the batch.
          tokens_BxKxL: int32, K docids of each query, as the table has them.

        Returns:
          Float32 B×K×L; 0 after a docid's end. The sums over L are the docids' scores.
        """
        raise NotImplementedError
