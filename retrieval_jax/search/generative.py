"""Searching by decoding docids: the strategy of the docids' kind, for texts and passages."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.checkpoints.model_folder import LoadedModel, load_model
from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.data.vocabulary import EOS, Vocabulary, round_up
from retrieval_jax.docids.search_strategies import STRATEGIES
from retrieval_jax.docids.search_strategy import SearchStrategy
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.mesh import multihost
from retrieval_jax.mesh.partitioning import Partitioner, all_devices
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.search.docid_passages import DocidPassages
from retrieval_jax.search.docid_scores import docids_of, score_in_blocks, scoring_functions
from retrieval_jax.search.index_inputs import IndexInputs
from retrieval_jax.search.searcher import RankedList, Searcher, register_searcher

SETTINGS = ("beams", "batch_size", "recall_target")  # of `IndexSettings`, which the constructor takes


@register_searcher
class GenerativeSearcher(Searcher):
    """Searches a collection with a generative retriever, which decodes the docids of passages.

    Args:
      model: the retriever.
      params: its parameters, which may be replaced between searches without compiling again.
      table: the docids of the collection's passages.
      vocabulary: the text vocabulary of the queries.
      input_length: number of tokens that queries are padded or cut to.
      beams: number of beams, and so of the docids that a search finds. Docids that are found in one step of
        the softmax need no beams: see `SearchStrategy.width`.
      batch_size: number of queries decoded at once, rounded up to a multiple of the mesh's `data` axis.
      mesh: the devices that `params` lie on; None for one device.
      recall_target: None for an exact top-k of single-token docids, else the expected recall of an
        approximate one; see `top_docids`.

    Raises:
      UserError: the model cannot write the docids, or they cannot be searched (see `SearchStrategy.build`).
    """

    kind: ClassVar[str] = "generative"
    family: ClassVar[str] = "generative"
    model_family: ClassVar[str | None] = "generative"

    def __init__(
        self,
        model: GenerativeRetriever,
        params: dict,
        table: DocidTable,
        vocabulary: Vocabulary,
        input_length: int,
        beams: int = 40,
        batch_size: int = 32,
        mesh: Mesh | None = None,
        recall_target: float | None = None,
    ):
        self.model, self.params, self.mesh = model, params, mesh
        self.vocabulary = vocabulary
        self.input_length = input_length
        self.outputs = model.config.outputs
        self.use_batch_sizes([batch_size])
        self.place = functools.partial(_place, mesh)
        self.beams, self.recall_target = beams, recall_target
        self.docids = self.planning = None
        self.replace(table)
        self._decode = search_function(model, mesh)
        self._encode, self._token_scores = scoring_functions(model, mesh)

    @classmethod
    def of_model(
        cls, opened: LoadedModel, table: DocidTable, mesh: Mesh | None, **settings: object
    ) -> "GenerativeSearcher":
        """Makes a searcher with a model that was loaded on a mesh.

        Args:
          opened: the model.
          table: see the class.
          mesh: see the class.
          **settings: the other arguments of the class.
        """
        length = opened.description["input_length"]
        return cls(opened.model, opened.params, table, opened.vocabulary, length, mesh=mesh, **settings)

    def replace(self, table: DocidTable) -> None:
        """Searches another state of the docids from now on, to which passages were added or from it removed.

        If its size is similar (within about a percent), nothing is compiled again.
        """
        if table.output_size > self.outputs:
            raise UserError(
                f"docids/{table.kind}: tokens up to {table.output_size - 1}, and the model writes only those "
                f"below {self.outputs}: search the docids that it was trained on"
            )
        strategy = STRATEGIES[table.search]
        docids, first_N = strategy.build(table, self.outputs, self.docids)  # or all stays as it was
        self.table, self.strategy = table, strategy
        self.find_rows = arrow_ids.RowFinder(table.passage_ids)
        self.docids = self.place(docids, *self.strategy.mesh_axes)
        self.passages = DocidPassages(table, first_N)

    def of_prefixes(self, length: int) -> "GenerativeSearcher":
        """Returns a searcher of the docids' prefixes, with the same parameters; see `DocidTable.prefixes`.

        Args:
          length: tokens of a prefix.
        """
        searcher = copy.copy(self)
        searcher.docids = None  # a trie of other shapes
        searcher.replace(self.table.prefixes(length))
        return searcher

    def truncates(self, query: str) -> bool:
        """See `Searcher.truncates`."""
        return self.vocabulary.exceeds(query, self.input_length)

    def use_batch_sizes(self, sizes: Sequence[int]) -> None:
        """See `Searcher.use_batch_sizes`. They are rounded up to multiples of the mesh's `data` axis."""
        data = self.mesh.shape["data"] if self.mesh else 1
        self.batch_sizes = sorted({round_up(size, data) for size in sizes})

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """See `Searcher.search`. Scores are as the model's `score` says.

        Passages of one docid tie, in the order of their rows. A passage with several docids has the best
        score of those that are found.
        """
        return self.lists_of(queries, self.find_docids(queries, k), k)

    def search_certified(self, queries: Sequence[str], k: int) -> tuple[list[RankedList], list[bool | None]]:
        """See `Searcher.search_certified`: the search pruned no hypothesis as good as the first passage."""
        found = self._found(queries, k)
        ranked_lists = self.lists_of(queries, [(rows, scores) for rows, scores, _ in found], k)

        def is_certain(ranked_list: RankedList, aux: dict) -> bool | None:
            if not ranked_list or not self.strategy.prunes:
                return True if ranked_list and self.recall_target is None else None
            return self.count_certain(aux, ranked_list[:1]) > 0

        pairs = zip(ranked_lists, found, strict=True)
        return ranked_lists, [is_certain(ranked_list, aux) for ranked_list, (*_, aux) in pairs]

    def lists_of(
        self, queries: Sequence[str], found: Sequence[tuple[np.ndarray, list[float]]], k: int
    ) -> list[RankedList]:
        """Lists the best k passages of the docids that were found for each query; see `find_docids`."""
        return [self.passages.ranked_list(rows, scores)[:k] for rows, scores in found]

    def find_docids(self, queries: Sequence[str], k: int) -> list[tuple[np.ndarray, list[float]]]:
        """Finds docids without their passages.

        Args:
          queries: any number of queries, also none.
          k: the number of passages that are wanted, which says how many docids are found where a search has
            no beams.

        Returns:
          For each query (int32, rows of docids as `DocidPassages.ranked_list` takes them; their scores).
        """
        return [(rows, scores) for rows, scores, _ in self._found(queries, k)]

    def _found(self, queries: Sequence[str], k: int) -> list[tuple[np.ndarray, list[float], dict]]:
        """Finds docids as `find_docids` does, each with what else the search of this query gave."""
        if k <= 0:
            return [(np.zeros(0, np.int32), [], {}) for _ in queries]
        results, width = [], self.strategy.width(self.beams, k, self.outputs)
        for some in self.slices(len(queries)):
            texts = list(queries[some])
            found, aux = self._decoded(texts, width)
            aux = {name: np.asarray(value) for name, value in aux.items()}
            for nth, rows in enumerate(np.asarray(found)[: len(texts)]):
                own = {name: value[nth : nth + 1] for name, value in aux.items()}
                results.append((rows, own["scores"][0].tolist(), own))
        return results

    def score(self, queries: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `Searcher.score`. The scores are those of the passages' docids, the best one's of several."""
        results = []
        for some in self.slices(len(queries)):
            docids = [docids_of(self.table, self.find_rows(wanted)) for wanted in candidates[some]]
            scores = self._token_scores_of(list(queries[some]), [rows for rows, _ in docids])
            for wanted, (_, owner_D), scores_DxL in zip(candidates[some], docids, scores, strict=True):
                best = np.full(len(wanted), np.nan, np.float32)
                np.fmax.at(best, owner_D, scores_DxL.sum(axis=-1))
                results.append(best.tolist())
        return results

    def explain(self, query: str, ranked_list: RankedList) -> dict:
        """See `Searcher.explain`: how each docid was written, and how far the ranking is certain.

        Of several docids of a passage it is the one that has the passage's score in the list.

        Returns:
          "certain": how many of the first passages are proven to be those that scoring every docid would rank
          first (the search pruned no better hypothesis); None where nothing is known of it. It is 0 for sums
          of logits, unless there are more beams than docids, or the docids are single tokens, all of which
          are scored. "docids": for each passage {"passage": its id,
          "steps": [{"token", "text", "log_prob" (or "logit", where the model's scores are sums of logits),
          "passages": how many passages have this prefix}, …]}.
        """
        if not ranked_list:
            return {"certain": None, "docids": []}
        certain = len(ranked_list) if self.recall_target is None else None
        if self.strategy.prunes:
            width = self.strategy.width(self.beams, len(ranked_list), self.outputs)
            certain = self.count_certain(self._decoded([query], width)[1], ranked_list)
        return {"certain": certain, "docids": self.explain_docids(query, ranked_list)}

    def explain_docids(self, query: str, ranked_list: RankedList) -> list[dict]:
        """Explains how each docid was written; see `explain`.

        Args:
          query: the query.
          ranked_list: passages and the scores of their docids.
        """
        ids = [passage_id for passage_id, _ in ranked_list]
        rows_D, owner_D = docids_of(self.table, self.find_rows(ids))
        (scores_DxL,) = self._token_scores_of([query], [rows_D])
        off_D = np.abs(scores_DxL.sum(axis=-1) - np.array([score for _, score in ranked_list])[owner_D])
        score_name, docids = "log_prob" if self.model.sums_log_probs else "logit", []
        for nth, passage_id in enumerate(ids):
            own = np.flatnonzero(owner_D == nth)
            written = own[off_D[own].argmin()]
            row = rows_D[written]
            steps = [
                {"token": token, "text": text, score_name: score, "passages": passages}
                for token, text, score, passages in zip(
                    self.table.tokens_NxL[row].tolist(),
                    token_texts(self.table, row, self.vocabulary),
                    scores_DxL[written].tolist(),
                    self.table.prefix_counts(row),
                    strict=False,  # the docid may have ended
                )
            ]
            docids.append({"passage": passage_id, "steps": steps})
        return docids

    @staticmethod
    def count_certain(aux: dict, ranked_list: RankedList) -> int:
        """Counts the passages above the bound that a search of one query gave; see `explain`."""
        bound = float(np.asarray(aux["pruned_upper_bound"])[0])
        return sum(score > bound for _, score in ranked_list)

    def _decoded(self, texts: list[str], width: int) -> tuple[jax.Array, dict]:
        """Searches for a batch of queries; see `search_function`."""
        batch, recall = self._batch(texts), self.recall_target
        return self._decode(
            self.strategy, self.params, batch, self.docids, width, recall, planning=self.planning
        )

    def slices(self, count: int) -> Iterator[slice]:
        """Yields the slices of so many queries that are computed at once."""
        size = self.batch_sizes[-1]
        return (slice(first, first + size) for first in range(0, count, size))

    def _batch(self, texts: list[str]) -> dict:
        """Tokenises a batch of queries, padded to the smallest size, and places it on the devices."""
        size = next(size for size in self.batch_sizes if size >= len(texts))
        tokens = self.vocabulary.batch(texts + [""] * (size - len(texts)), self.input_length)
        return {"encoder_input_tokens": self.place(tokens, "data")}

    def _token_scores_of(self, texts: list[str], docids: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Computes the scores of docids' tokens for the queries of one batch.

        Queries are encoded once, whatever the number of docids.

        Args:
          texts: the queries.
          docids: of each query, rows of the docid table; -1 for none.

        Returns:
          For each query float32, docids × L; NaN where there is none.
        """
        batch = self._batch(texts)
        encoded = self._encode(self.strategy, self.params, batch)

        def token_scores(row_BxK: np.ndarray) -> jax.Array:
            tokens_BxKxL = self.place(self.table.tokens_NxL[row_BxK].astype(np.int32), "data")
            return self._token_scores(self.strategy, self.params, batch, encoded, tokens_BxKxL)

        return score_in_blocks(docids, len(batch["encoder_input_tokens"]), token_scores)

    def measured_recall(self, queries: Sequence[str], k: int) -> float:
        """Returns the share of the exact best k passages that the search finds; see `recall_target`."""
        exact = copy.copy(self)
        exact.recall_target = None
        found, wanted = (
            {(nth, passage) for nth, ranking in enumerate(rankings) for passage, _ in ranking}
            for rankings in (self.search(queries, k), exact.search(queries, k))
        )
        return len(found & wanted) / len(wanted)

    @classmethod
    def recipe(cls, inputs: IndexInputs) -> dict:
        """See `Searcher.recipe`: the docids, and the settings of the search."""
        own = {name: getattr(inputs.settings, name) for name in SETTINGS}
        return own | {"docids_fingerprint": inputs.docids.fingerprint()}

    @classmethod
    def write(cls, folder: Path, inputs: IndexInputs) -> dict:
        """See `Searcher.write`. It writes nothing: the manifest says where the model and the docids lie."""
        table, beams = inputs.docids, inputs.settings.beams
        ratio = len(table.tokens_NxL) / len(table.passage_ids)
        if ratio > 1:
            log(
                f"{inputs.folder.name}: passages have {ratio:.1f} docids each, so that {beams} beams may "
                f"find as few as {beams / ratio:.0f} passages: --gin.make_index.beams={round(beams * ratio)}"
            )
        return {"docids": paths.relative(inputs.docids_folder, inputs.folder)}

    @classmethod
    def open(
        cls, folder: Path, make_partitioner: Callable[[], Partitioner] | None = None
    ) -> "GenerativeSearcher":
        """Opens a searcher's folder.

        Args:
          folder: a folder that `retrieval-jax index` or `export` made.
          make_partitioner: gives the devices to search on; None for all devices.

        Raises:
          UserError: files are missing, or the docids are not those that the searcher was made of.
        """
        return cls._open(folder, storage.read_manifest(folder, "index"), make_partitioner)

    @classmethod
    def _open(cls, folder: Path, manifest: dict, make_partitioner: Callable | None, **settings: object):
        """Opens a searcher of a class whose further arguments are `settings`; see `open`."""
        docids = paths.join(folder, manifest["docids"])
        table = DocidTable.open(docids)
        if table.fingerprint() != manifest["docids_fingerprint"]:
            raise UserError(f"{docids}: not the docids that {folder} was made of: `retrieval-jax index`")
        mesh, rules = make_partitioner() if make_partitioner else Partitioner(all_devices())
        opened = load_model(paths.join(folder, manifest["model"]), manifest["step"], mesh, rules)
        own = {name: manifest[name] for name in SETTINGS}
        return cls.of_model(opened, table, mesh, **own, **settings)


def _place(mesh: Mesh | None, tree: object, *axes: str) -> object:
    """Places arrays on the mesh: their first axis over one of its axes, or whole on every device."""
    return multihost.make_global_arrays(mesh, tree, *axes) if mesh else jax.device_put(tree)


def search_function(model: GenerativeRetriever, mesh: Mesh | None) -> Callable:
    """Makes the jitted search of a batch of queries, which searchers run and preflight compiles.

    Args:
      model: the retriever.
      mesh: the devices that parameters and docids lie on; None for one device.

    Returns:
      (strategy, params, batch, docids, width, recall_target, planning=None) -> (rows, {"scores": …}), as
      `SearchStrategy.decode` gives them; the strategy, the width and the recall are static. The results go
      to every device, so that each process of a mesh of several reads them whole.
    """

    def search(
        strategy: type[SearchStrategy], params, batch, docids, width: int, recall_target, planning=None
    ):
        return strategy.decode(model, params, batch, docids, width, mesh, recall_target, planning)

    whole = NamedSharding(mesh, PartitionSpec()) if mesh else None
    return jax.jit(search, static_argnums=(0, 4, 5), out_shardings=whole)


def token_texts(table: DocidTable, row: int, vocabulary: Vocabulary) -> list[str]:
    """Returns what people may read for each token of a docid: pieces of text, numbers, "end"."""
    tokens = table.tokens_NxL[row]
    tokens = tokens[tokens > 0].tolist()
    texts = map(vocabulary.model.id_to_piece, tokens) if not table.has_docid_vocab else map(str, tokens)
    pairs = enumerate(zip(tokens, texts, strict=True))
    return ["end" if position and token == EOS else text for position, (token, text) in pairs]
