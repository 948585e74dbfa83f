"""Searching by writing docids: constrained beam search, or top-k over the docid softmax (atomic)."""

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_jax.checkpoints.model_folder import LoadedModel, load_model
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import Vocabulary, round_up
from retrieval_jax.decoding.trie import Trie, build_trie
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.mesh import multihost
from retrieval_jax.mesh.partitioning import all_devices
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.search.searcher import IndexInputs, RankedList, Searcher, register_searcher


@register_searcher
class GenerativeSearcher(Searcher):
    """A generative retriever and the docids of a collection.

    Args:
      model, params: the retriever; `params` may be replaced between searches (nothing recompiles).
      table: the docids.
      vocabulary, input_length: how queries become tokens.
      beams: beams of the search; a search finds at most so many docids. Without effect on atomic docids.
      batch_size: queries decoded at once, rounded up to share them over the mesh's `data`.
      mesh: where `params` lie; None for one device. The docids are on every device.
      recall_target: of atomic docids: None for the exact top-k, else that of an approximate one; see
        `top_docids`.

    Raises UserError where the docids cannot be written by the model, or one is a prefix of another.
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
        self.outputs = model.config.output_size or model.config.vocab_size
        self.batch_size = round_up(batch_size, mesh.shape["data"] if mesh else 1)
        self.place = functools.partial(_place, mesh)
        self.trie: Trie | None = None
        self.replace(table)
        # B×K results go to every device, so that each process of a mesh of several reads them whole.
        self._whole = NamedSharding(mesh, PartitionSpec()) if mesh else None
        decode = functools.partial(model.predict_batch_with_aux, beams=beams, mesh=mesh)
        self._decode = jax.jit(decode, out_shardings=self._whole)
        self._rank = self._compiled_rank(recall_target)

    def replace(self, table: DocidTable) -> None:
        """Searches another state of the docids from now on: passages added or removed.

        Where it is of similar size (within about a percent) nothing recompiles.
        """
        if table.output_size > self.outputs:
            raise UserError(
                f"docids/{table.kind}: tokens up to {table.output_size - 1}, and the model writes only those "
                f"below {self.outputs}: search the docids that it was trained on"
            )
        self.table, self.atomic = table, table.kind == "atomic"
        rows = np.arange(len(table.tokens_NxL))
        if self.atomic:
            self.token_to_passage_V = table.row_of_tokens(self.outputs)
            self.valid_mask_V = self.place(self.token_to_passage_V >= 0, "model")
            return
        try:
            trie, first_N = build_trie(table.tokens_NxL, reuse_shapes_of=self.trie)
        except ValueError as error:
            raise UserError(f"docids/{table.kind}: {error}: `retrieval-jax docids` makes them anew") from None
        self.trie = self.place(trie)
        # Passages whose docid an earlier row has too: (those rows, ascending; the passages' own).
        duplicates = np.flatnonzero(first_N != rows)
        by_first = np.argsort(first_N[duplicates], kind="stable")
        self.duplicates = first_N[duplicates][by_first], duplicates[by_first]

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """See Searcher. Scores are log-probabilities; passages that share a docid tie, in row order."""
        results = []
        for first in range(0, len(queries), self.batch_size):
            some = list(queries[first : first + self.batch_size])
            tokens = self.vocabulary.batch(some + [""] * (self.batch_size - len(some)), self.input_length)
            batch = {"encoder_input_tokens": self.place(tokens, "data")}
            if self.atomic:
                k_found = min(k, self.outputs)
                found, aux = self._rank(self.params, batch, self.valid_mask_V, k_found)
            else:
                found, aux = self._decode(self.params, batch, trie=self.trie)
            pairs = zip(np.asarray(found), np.asarray(aux["scores"]).tolist(), strict=True)
            results += [self.ranked_list(docids, scores)[:k] for docids, scores in [*pairs][: len(some)]]
        return results

    def ranked_list(self, docids: np.ndarray, scores: Sequence[float]) -> RankedList:
        """The passages of docids (tokens if atomic, else rows); negative ones, which are last, name none."""
        docids = docids[docids >= 0]
        if self.atomic:
            rows = [[row] for row in self.token_to_passage_V[docids].tolist()]
        else:
            firsts, duplicates = self.duplicates
            begin, end = (np.searchsorted(firsts, docids, side).tolist() for side in ("left", "right"))
            rows = [
                [row, *duplicates[a:b].tolist()]
                for row, a, b in zip(docids.tolist(), begin, end, strict=True)
            ]
        ids = self.table.passage_ids
        return [(ids[row].as_py(), score) for some, score in zip(rows, scores, strict=False) for row in some]

    def _compiled_rank(self, recall_target: float | None):
        rank = functools.partial(self.model.rank_atomic, mesh=self.mesh, recall=recall_target)
        return jax.jit(rank, static_argnums=3, out_shardings=self._whole)

    def measured_recall(self, queries: Sequence[str], k: int) -> float:
        """The share of the exact best k passages that an approximate search (see `recall_target`) finds."""
        exact = copy.copy(self)
        exact._rank = self._compiled_rank(recall_target=None)
        found, wanted = (
            {(nth, passage) for nth, ranking in enumerate(rankings) for passage, _ in ranking}
            for rankings in (self.search(queries, k), exact.search(queries, k))
        )
        return len(found & wanted) / len(wanted)

    @classmethod
    def recipe(cls, inputs: IndexInputs) -> dict:
        """See `Searcher.recipe`: the docids, and the settings of the search."""
        docids = inputs.work.docids(inputs.model.description["docids"])
        return {
            "beams": inputs.settings.beams,
            "batch_size": inputs.settings.batch_size,
            "recall_target": inputs.settings.recall_target,
            "docids_fingerprint": check_docids(inputs.model, inputs.collection, docids, inputs.model_dir),
        }

    @classmethod
    def write(cls, folder: Path, inputs: IndexInputs) -> dict:
        """See `Searcher.write`. It writes nothing: the manifest says where the model and the docids lie."""
        docids = inputs.work.docids(inputs.model.description["docids"])
        return {"docids": paths.relative(docids, inputs.folder)}

    @classmethod
    def open(cls, folder: Path, make_mesh: Callable[[], Mesh] | None = None) -> "GenerativeSearcher":
        """Opens a folder that `index` made, on a mesh."""
        manifest = storage.read_manifest(folder, "index")
        table = DocidTable.open(paths.join(folder, manifest["docids"]))
        if table.fingerprint() != manifest["docids_fingerprint"]:
            docids = paths.join(folder, manifest["docids"])
            raise UserError(f"{docids}: not the docids that {folder} was made of: `retrieval-jax index`")
        mesh = (make_mesh or all_devices)()
        opened = load_model(paths.join(folder, manifest["model"]), manifest["step"], mesh)
        return cls(
            opened.model,
            opened.params,
            table,
            opened.vocabulary,
            opened.description["input_length"],
            manifest["beams"],
            manifest["batch_size"],
            mesh,
            manifest["recall_target"],
        )


def check_collection(opened: LoadedModel, collection: Collection, model_dir: str | Path) -> None:
    """Raises UserError if a model was trained on another collection."""
    if opened.description["collection"] != collection.fingerprint:
        raise UserError(
            f"{model_dir}: trained on another collection ({opened.description['collection_name']}, or an "
            f"earlier version) than {collection.folder}: name that model's collection, or train a new one"
        )


def check_docids(opened: LoadedModel, collection: Collection, docids: Path, model_dir: str | Path) -> str:
    """Returns the fingerprint of the docids that a model is to search.

    Raises:
      UserError: they are neither the docids that the model was trained on nor an extension of them, or they
        are of another collection.
    """
    if not storage.finished(docids):
        check_collection(opened, collection, model_dir)
    table = DocidTable.open(docids)
    if table.collection != collection.fingerprint:
        raise UserError(f"{docids}: of another collection than {collection.folder}: `retrieval-jax docids`")
    if opened.description["docids_fingerprint"] not in (table.fingerprint(), *table.ancestors):
        check_collection(opened, collection, model_dir)
        raise UserError(f"{docids}: not the docids that {model_dir} was trained on: train it again")
    return table.fingerprint()


def _place(mesh: Mesh | None, tree: object, *axes: str) -> object:
    """Arrays on the mesh, their first axis over one of its axes, or (without) alike on every device."""
    return multihost.make_global_arrays(mesh, tree, *axes) if mesh else jax.device_put(tree)
