"""Searching by planning ahead: lexical scores of all passages guide the search, and count (PAG)."""

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar, log
from retrieval_jax.decoding.bonuses import Planning
from retrieval_jax.decoding.planning import score_all, score_rows
from retrieval_jax.docids import token_sets
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.docids.token_sets import TokenSets
from retrieval_jax.mesh.partitioning import Partitioner
from retrieval_jax.search import fusion
from retrieval_jax.search.docid_scores import score_in_blocks
from retrieval_jax.search.fit_queries import check_fit_split, fit_queries, fit_recipe
from retrieval_jax.search.generative import SETTINGS, GenerativeSearcher
from retrieval_jax.search.heaviest_tokens import heaviest_tokens
from retrieval_jax.search.index_inputs import IndexInputs
from retrieval_jax.search.searcher import RankedList, register_searcher

VERSION = 1  # of what is computed from the same settings
WEIGHTS = (1, 2, 0.5, 4, 0.25, 8, 0.125, 0.0625, 0)  # times that of the training, the nearest ones first
QUERIES = 200  # that the weight is chosen with, at most
SHOWN = 10  # tokens and passages of a plan that an explanation lists


@register_searcher
class PlannedSearcher(GenerativeSearcher):
    """A generative search that plans ahead; see `decoding.planning`.

    A passage's score is sequential_weight · (the score of its docid) + (its own lexical score). Passages that
    share a docid are ordered by their lexical scores; of a passage's several docids the best one counts.

    Args:
      model: as GenerativeSearcher takes it, with a lexical head.
      params: see GenerativeSearcher.
      table: see GenerativeSearcher.
      vocabulary: see GenerativeSearcher.
      input_length: see GenerativeSearcher.
      sets: the token sets of the passages, which may be in another order than the table's.
      plan_size: how many passages the plan keeps.
      sequential_weight: not negative; `replace_weight` changes it.
      **others: see GenerativeSearcher.
    """

    kind: ClassVar[str] = "planned"
    family: ClassVar[str] = "planned"
    reads_settings: ClassVar[tuple[str, ...]] = ("sets", "plan_size", "sequential_weight", "fit_split")

    def __init__(
        self,
        model,
        params,
        table,
        vocabulary,
        input_length,
        *,
        sets: TokenSets,
        plan_size: int = 1000,
        sequential_weight: float = 1.0,
        **others: object,
    ):
        self.all_sets, self.plan_size, self.sequential_weight = sets, plan_size, sequential_weight
        super().__init__(model, params, table, vocabulary, input_length, **others)
        # On all devices, so that each process of a mesh of several reads them whole.
        whole = NamedSharding(self.mesh, PartitionSpec()) if self.mesh else None
        self._weights = jax.jit(model.lexical_weights, out_shardings=whole)
        self._scores = jax.jit(self._scores_of_rows, out_shardings=whole)

    def replace(self, table: DocidTable) -> None:
        """See GenerativeSearcher. The sets must have all of the table's passages."""
        super().replace(table)
        self.sets = aligned(self.all_sets, table)
        planning = self.strategy.build_planning(
            table,
            self.docids,
            self.passages.first_rows,
            self.sets,
            self.plan_size,  # also where there are fewer passages: with one more, nothing is compiled again
            self.mesh.shape["data"] if self.mesh else 1,
            self.planning,
        )
        self.planning = self.strategy.place_planning(planning, self.place)
        self.replace_weight(self.sequential_weight)

    def replace_weight(self, sequential_weight: float) -> None:
        """Searches with another weight from now on. Nothing is compiled again."""
        self.sequential_weight = sequential_weight
        weight = self.place(np.float32(sequential_weight))
        self.planning = dataclasses.replace(self.planning, sequential_weight=weight)

    def of_prefixes(self, length: int) -> "PlannedSearcher":
        """See GenerativeSearcher: with the same plan. The lexical part of a prefix's score is its bonus."""
        made = copy.copy(self)
        made.docids = None  # a trie of other shapes
        GenerativeSearcher.replace(made, self.table.prefixes(length))
        docids = made.place(made.strategy.planned_docids(made.table, made.docids, made.passages.first_rows))
        made.planning = dataclasses.replace(self.planning, docids=docids, of_prefixes=True)
        return made

    def lists_of(
        self, queries: Sequence[str], found: Sequence[tuple[np.ndarray, list[float]]], k: int
    ) -> list[RankedList]:
        """See GenerativeSearcher. Equal scores are in the order of the docids found, then in row order."""
        if self.passages.one_to_one:
            return super().lists_of(queries, found, k)
        passages = [self._passages_of(rows) for rows, _ in found]
        names = [[self.table.passage_ids[row].as_py() for row in rows] for rows, _ in passages]
        results = []
        for ids, lexical, (_, docid_P), (_, scores) in zip(
            names, self.lexical_scores(queries, names), passages, found, strict=True
        ):
            lexical_P, best_D = np.array(lexical), np.full(len(scores), -np.inf)
            np.maximum.at(best_D, docid_P, lexical_P)  # what the docids' scores have in them
            total_P = np.array(scores)[docid_P] + (lexical_P - best_D[docid_P])
            best = {}
            for passage, total in zip(ids, total_P.tolist(), strict=True):
                best[passage] = max(total, best.get(passage, -np.inf))
            results.append(sorted(best.items(), key=lambda pair: -pair[1])[:k])
        return results

    def _passages_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds the passages of docids that a search found: (their rows, the index of the docid of each)."""
        groups = self.passages.of_docids(rows)
        owner = np.repeat(np.arange(len(groups)), [*map(len, groups)])
        return np.concatenate([*groups, np.zeros(0, int)]).astype(int), owner

    def score(self, queries: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `Searcher.score`: the weighted sum of docids' scores and lexical ones."""
        sequential, lexical = super().score(queries, candidates), self.lexical_scores(queries, candidates)
        return [
            (self.sequential_weight * np.array(a) + np.array(b)).tolist()
            for a, b in zip(sequential, lexical, strict=True)
        ]

    def explain(self, query: str, ranked_list: RankedList) -> dict:
        """See `Searcher.explain`: as GenerativeSearcher does, and how the plan led there.

        Returns:
          "certain" and "docids" as there. Each docid also has "lexical" (the passage's lexical score),
          "tokens" ([{"text", "score"}, …], what its tokens add to that, the largest first) and, unless docids
          are single tokens, "plan_rank" (its passage's rank in the plan, from 1; None if it is not in it).
          "plan": {"sequential_weight", "tokens": [{"text", "score"}, …], the query's heaviest ones, and,
          unless docids are single tokens, "passages" (how many the plan has), "lowest" (the lexical score of
          the last one) and "first": of the plan's first passages [{"passage", "lexical", "tokens" (of its
          docid), "followed" (how many of these beams have written: if not all, beams left it there)}, …]}.
        """
        if not ranked_list:
            return {"certain": None, "docids": [], "plan": None}
        ids = [passage for passage, _ in ranked_list]
        (lexical,) = self.lexical_scores([query], [ids])
        weights_V = np.asarray(self._weights(self.params, self._batch([query])))[0]
        weight = self.sequential_weight  # where it is 0, a passage's docid of largest score is shown
        own = [
            (passage, (score - a) / weight if weight else 1e9)
            for (passage, score), a in zip(ranked_list, lexical, strict=True)
        ]
        docids = self.explain_docids(query, own)
        rows_C = np.array(self.find_rows(ids), int)
        added_CxM = self.sets.contributions(weights_V, rows_C)
        for docid, score, row, added_M in zip(docids, lexical, rows_C, added_CxM, strict=True):
            docid["lexical"] = score
            docid["tokens"] = heaviest_tokens(self.vocabulary, self.sets.tokens_PxM[row], added_M, SHOWN)
        pieces = self.vocabulary.model.get_piece_size()  # the network's table may be padded
        plan = {
            "sequential_weight": self.sequential_weight,
            "tokens": heaviest_tokens(self.vocabulary, np.arange(pieces), weights_V[:pieces], SHOWN),
        }
        certain = len(ids) if self.recall_target is None else None
        if self.strategy.prunes:
            _, aux = self._decoded([query], self.strategy.width(self.beams, len(ids), self.outputs))
            certain = self.count_certain(aux, ranked_list)
            plan |= self._followed({name: np.asarray(x)[0] for name, x in aux.items()})
            ranks = plan.pop("ranks")
            for docid in docids:
                docid["plan_rank"] = ranks.get(docid["passage"])
        return {"certain": certain, "docids": docids, "plan": plan}

    def _followed(self, aux: dict) -> dict:
        """Says of a search's plan how far beams have followed its first passages; see `explain`."""
        rows = aux["plan_rows"][aux["plan_rows"] >= 0]
        ids = [self.table.passage_ids[int(row)].as_py() for row in rows]
        steps_nxD, first = aux["plan_steps"].reshape(len(aux["plan_rows"]), -1), []
        for nth, row in enumerate(rows[:SHOWN].tolist()):
            docids = self.table.docids_of(row)
            best = int(steps_nxD[nth, : len(docids)].argmax())
            tokens = int(np.count_nonzero(self.table.tokens_NxL[docids[best]]))
            passage = {"passage": ids[nth], "lexical": float(aux["plan_scores"][nth]), "tokens": tokens}
            first.append(passage | {"followed": min(int(steps_nxD[nth, best]), tokens)})
        return {
            "passages": len(rows),
            "lowest": float(aux["plan_scores"][len(rows) - 1]),
            "first": first,
            "ranks": {passage: nth for nth, passage in enumerate(ids, start=1)},
        }

    def lexical_scores(
        self, queries: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Returns the lexical scores of each query's candidates; those that it does not know have NaN."""
        results = []
        for some in self.slices(len(queries)):
            rows = [*map(self.find_rows, candidates[some])]
            results += [scores_C.tolist() for scores_C in self._lexical_scores_of(list(queries[some]), rows)]
        return results

    def _lexical_scores_of(self, texts: list[str], rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Computes the lexical scores of passages for the queries of one batch.

        Args:
          texts: the queries.
          rows: of each query, rows of the docid table; -1 for none.
        """
        batch = self._batch(texts)
        weights_BxV = self._weights(self.params, batch)

        def lexical_scores(row_BxK: np.ndarray) -> jax.Array:
            if self.planning.docids is None:  # the sets are by token of the softmax
                row_BxK = self.table.tokens_NxL[row_BxK, 0].astype(np.int32)
            return self._scores(weights_BxV, self.planning, self.place(row_BxK, "data"))

        return score_in_blocks(rows, len(batch["encoder_input_tokens"]), lexical_scores)

    def _scores_of_rows(self, weights_BxV: jax.Array, planning: Planning, row_BxC: jax.Array) -> jax.Array:
        """Computes lexical scores B×C of rows of the sets that lie on the devices. Pure."""
        if planning.docids is None:
            return jnp.take_along_axis(score_all(weights_BxV, planning.sets, self.mesh), row_BxC, axis=1)
        return score_rows(weights_BxV, planning.sets, row_BxC, self.mesh)

    @classmethod
    def recipe(cls, inputs: IndexInputs) -> dict:
        """See `Searcher.recipe`: what a generative search depends on, the sets, and the plan's settings."""
        settings = inputs.settings
        if not inputs.model.model.config.lexical_head:
            raise UserError(
                f"{inputs.model_dir}: has no lexical head, by which a search plans ahead: train one with "
                "`--gin_file=runs/pag.gin`, or search without: --gin.make_index.kind=\"'generative'\""
            )
        fitted = {}
        if settings.sequential_weight is None:
            check_fit_split(settings.fit_split)
            fitted = fit_recipe(inputs.collection, settings.fit_split)
        names = ("plan_size", "sequential_weight", "fit_split")
        return super().recipe(inputs) | {
            "sets_fingerprint": inputs.token_sets.fingerprint(),
            "planned_by": {name: getattr(settings, name) for name in names},
            "planned_version": VERSION,
            **fitted,
        }

    @classmethod
    def prepare(cls, inputs: IndexInputs, recipe: dict) -> contextlib.AbstractContextManager:
        """See `Searcher.prepare`: chooses the weight. All processes search for all queries."""
        return contextlib.nullcontext(choose_weight(inputs))

    @classmethod
    def write(cls, folder: Path, inputs: IndexInputs) -> dict:
        """See `Searcher.write`. It writes nothing: the manifest says where everything lies."""
        facts = super().write(folder, inputs)
        sets = token_sets.chosen(inputs.work, inputs.settings.sets)
        return facts | {"sets": paths.relative(sets, inputs.folder)} | inputs.prepared

    @classmethod
    def open(
        cls, folder: Path, make_partitioner: Callable[[], Partitioner] | None = None
    ) -> "PlannedSearcher":
        """See GenerativeSearcher."""
        manifest = storage.read_manifest(folder, "index")
        sets = TokenSets.open(paths.join(folder, manifest["sets"]))
        if sets.fingerprint() != manifest["sets_fingerprint"]:
            raise UserError(
                f"{paths.join(folder, manifest['sets'])}: not the sets that {folder} was made of: "
                "`retrieval-jax index`"
            )
        plan = {"plan_size": manifest["planned_by"]["plan_size"]}
        weight = manifest["sequential_weight"]
        return cls._open(folder, manifest, make_partitioner, sets=sets, sequential_weight=weight, **plan)


def aligned(sets: TokenSets, table: DocidTable) -> TokenSets:
    """Returns the sets of a docid table's passages, in its order.

    Raises:
      UserError: a passage has no set.
    """
    if sets.passage_ids.equals(table.passage_ids):
        return sets
    rows = arrow_ids.find_rows(sets.passage_ids, table.passage_ids)
    if len(rows) and rows.min() < 0:
        missing = table.passage_ids[int(rows.argmin())].as_py()
        raise UserError(f"sets: passage {missing!r} has none: make the sets again, `retrieval-jax sets`")
    impacts = None if sets.impacts_PxM is None else sets.impacts_PxM[rows]
    return dataclasses.replace(
        sets, tokens_PxM=sets.tokens_PxM[rows], impacts_PxM=impacts, passage_ids=table.passage_ids
    )


def choose_weight(inputs: IndexInputs) -> dict:
    """Chooses `sequential_weight` with queries of `fit_split`, unless the settings give it, and reports it.

    Each of WEIGHTS, times the weight that the model was trained with, is tried by searching with it; of
    equally good ones the one nearest to that of the training is taken.

    Returns:
      Facts for the manifest: "sequential_weight" and, if there were such queries, "fitted".
    """
    settings = inputs.settings
    if settings.sequential_weight is not None:
        return {"sequential_weight": settings.sequential_weight}
    trained = trained_weight(inputs.model_dir)
    otherwise = f"the sequential weight is {trained:g}"
    queries = fit_queries(inputs.collection, settings.fit_split, "planned", otherwise)[:QUERIES]
    if not queries:
        return {"sequential_weight": trained}
    weights = [trained * factor for factor in WEIGHTS]
    own = {name: getattr(settings, name) for name in (*SETTINGS, "plan_size")}
    searcher = PlannedSearcher.of_model(
        inputs.model, inputs.docids, inputs.mesh, sets=inputs.token_sets, **own
    )
    texts, ndcgs = [query.text for query in queries], {}
    with bar("choosing the sequential weight", len(weights)) as advance:
        for weight in weights:
            searcher.replace_weight(weight)
            found = searcher.search(texts, fusion.CUTOFF + 1)  # one of them may be the query itself
            ndcgs[weight] = float(
                np.mean(
                    [
                        fusion.list_ndcg(ranked, query.relevant, query.id if query.is_passage else None)
                        for ranked, query in zip(found, queries, strict=True)
                    ]
                )
            )
            advance(1)
    chosen = max(weights, key=lambda weight: round(ndcgs[weight], 9))
    shown = ", ".join(f"{weight:g} {ndcgs[weight]:.4f}" for weight in sorted(weights))
    by = f"nDCG@10 of {len(queries)} {settings.fit_split} queries"
    log(f"planned: sequential weight {chosen:g}; {by}: {shown}")
    fitted = {"split": settings.fit_split, "queries": len(queries), "nDCG@10": ndcgs[chosen]}
    return {"sequential_weight": float(chosen), "fitted": fitted}


def trained_weight(model_dir: str | Path) -> float:
    """Returns `joint_ranking.sequential_weight` of a model's training; 1 where it had another objective."""
    path = paths.as_path(model_dir) / "settings.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    return float(settings.get("joint_ranking.sequential_weight", 1)) or 1.0
