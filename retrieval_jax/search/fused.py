"""A searcher made of others: their ranked lists are fused, or one finds passages and the others re-rank them.

Its folder holds a manifest alone, which names its parts, by their folders and by the recipes that they had
when the weights were chosen, and how they are fused. An exported one holds its parts, in parts/NAME.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar, log
from retrieval_jax.data.collection import Query
from retrieval_jax.mesh.partitioning import Partitioner
from retrieval_jax.search import fusion
from retrieval_jax.search.batched import BATCH_SIZE
from retrieval_jax.search.fit_queries import check_fit_split, fit_queries, fit_recipe
from retrieval_jax.search.fusion import DEPTHS, NORMALISATIONS, RERANK, Candidates, Fusion
from retrieval_jax.search.index_inputs import IndexInputs, IndexSettings
from retrieval_jax.search.manifest import searcher_manifest
from retrieval_jax.search.searcher import (
    RankedList,
    Searcher,
    check_scores,
    class_and_manifest,
    register_searcher,
    searcher_class,
)
from retrieval_jax.search.varied import asked_as, can_score_passages, searcher_name

VERSION = 1  # of what is computed from the same settings
EQUAL = "all parts have the same weight"


@register_searcher
class FusedSearcher(Searcher):
    """Searches with several searchers; see `fusion`.

    With the method "rerank" the first part finds passages, the others score those (`Searcher.score`), and
    the passages are ranked by the weighted sum of all parts' scores. With the other methods each part finds
    its own passages.

    Args:
      parts: the searchers.
      fusion: how their results become one list.
      names: what explanations call the parts; None: "part 1", ….
    """

    kind: ClassVar[str] = "fused"
    family: ClassVar[str] = "fused"
    reads_settings: ClassVar[tuple[str, ...]] = ("parts", "fusion", "weights", "depth", "fit_split")

    def __init__(self, parts: Sequence[Searcher], fusion: Fusion, names: Sequence[str] | None = None):
        self.parts, self.fusion = parts, fusion
        self.names = names or [f"part {number}" for number in range(1, len(parts) + 1)]
        self.finders = parts[:1] if fusion.method == RERANK else parts

    def truncates(self, query: str) -> bool:
        """See `Searcher.truncates`: by any of the parts."""
        return any(part.truncates(query) for part in self.parts)

    def compile_for(self, queries: Sequence[str]) -> None:
        """See `Searcher.compile_for`: all parts."""
        for part in self.parts:
            part.compile_for(queries)

    @property
    def is_shared(self) -> bool:
        """See `Searcher`: whether a part is."""
        return any(part.is_shared for part in self.parts)

    def use_batch_sizes(self, sizes: Sequence[int]) -> None:
        """See `Searcher.use_batch_sizes`: of all parts."""
        for part in self.parts:
            part.use_batch_sizes(sizes)
        if self.fusion.method == RERANK:  # a search would compile this only if the first part finds something
            for part, size in itertools.product(self.parts[1:], sizes):
                part.score([""] * size, [[""]] * size)

    def search(self, queries: Sequence[str], k: int) -> list[RankedList]:
        """See `Searcher.search`.

        Equal scores are in the order in which the parts' lists, one after the other, have the passages. At
        most `fusion.depth` passages of each part count, for any k. A re-ranked list goes on with what the
        first part found below that depth; those passages have scores below 0.
        """
        if not queries or k <= 0:
            return [[] for _ in queries]
        depth, reranks = self.fusion.depth, self.fusion.method == RERANK
        found = [part.search(queries, max(k, depth) if reranks else depth) for part in self.finders]
        ranked = map(self.fusion.rank, self._gather(queries, found))
        if not reranks:
            return [ranked_list[:k] for ranked_list in ranked]
        rest = [
            [(passage_id, -float(rank)) for rank, (passage_id, _) in enumerate(below, start=depth + 1)]
            for below in (ranked_list[depth:] for ranked_list in found[0])
        ]
        return [(best + below)[:k] for best, below in zip(ranked, rest, strict=True)]

    def _gather(self, queries: Sequence[str], found: Sequence[Sequence[RankedList]]) -> list[Candidates]:
        """Gathers each query's candidates of what the finders found, down to the depth that counts."""
        cut = [[ranked_list[: self.fusion.depth] for ranked_list in lists] for lists in found]
        return collect(self.parts, queries, cut)

    def explain(self, query: str, ranked_list: RankedList) -> dict:
        """See `Searcher.explain`: what each part adds to a passage's score.

        Returns:
          "certain": None; "fusion": the method; "docids": for each passage {"passage": its id, "parts": one
          {"part": its name, "rank": in what the part found, from 1, "score": the part's own, "adds": to the
          fused score} for each part}. Rank and score are None where the part did not find the passage, the
          rank also of a part that only scores what another one found. "parts" is empty for a passage of a
          re-ranked list's rest.
        """
        found = [part.search([query], self.fusion.depth) for part in self.finders]
        (candidates,) = self._gather([query], found)
        ranks_CxP = candidates.ranks_CxP.copy()
        ranks_CxP[:, len(self.finders) :] = np.nan
        rows = [ranks_CxP.tolist(), candidates.scores_CxP.tolist(), self.fusion.weigh(candidates).tolist()]
        parts = {
            passage_id: [
                {
                    "part": name,
                    "rank": int(rank) if math.isfinite(rank) else None,
                    "score": score if math.isfinite(score) else None,
                    "adds": adds,
                }
                for name, rank, score, adds in zip(self.names, *of_passage, strict=True)
            ]
            for passage_id, *of_passage in zip(candidates.ids, *rows, strict=True)
        }
        docids = [{"passage": passage, "parts": parts.get(passage, [])} for passage, _ in ranked_list]
        return {"certain": None, "fusion": self.fusion.method, "docids": docids}

    def score(self, queries: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `Searcher.score`: the weighted sum of all parts' scores, on the scale of what `search` finds.

        A passage that a part does not find within its depth has the score that this part gives it when asked
        (`Searcher.score`), on the scale of what it found: mostly below that. Where a part cannot score (a
        scann one, which finds approximately), and with "reciprocal_rank", which reads no scores, it has what
        a search adds for a passage that was not found. A passage that no part knows has NaN.
        """
        if not queries:
            return []
        found = [part.search(queries, self.fusion.depth) for part in self.finders]
        gathered = collect(self.parts, queries, found)
        can_score = [can_score_passages(part) for part in self.parts]
        given = [
            part.score(queries, candidates) if can else [None] * len(queries)
            for part, can in zip(self.parts, can_score, strict=True)
        ]
        results = []
        for some, wanted, *scores in zip(gathered, candidates, *given, strict=True):
            some = some.and_also(wanted, scores)
            known_C = ~np.isnan(some.scores_CxP).all(axis=1) | (not any(can_score))
            known = dict(zip(some.ids, known_C.tolist(), strict=True))
            ranked = dict(self.fusion.rank(some))
            results.append([ranked[passage] if known[passage] else math.nan for passage in wanted])
        return results

    @classmethod
    def recipe(cls, inputs: IndexInputs) -> dict:
        """See `Searcher.recipe`: the parts as they are now, and the settings."""
        settings = inputs.settings
        check(settings)
        found = [(name, inputs.work.searcher(searcher_name(name))) for name in settings.parts]
        for name, folder in found:
            if paths.absolute(inputs.folder) in made_of(folder):
                raise UserError(
                    f"make_index.name: {inputs.folder.name} would be a part of itself"
                    + (f" (by {name})" if name != inputs.folder.name else "")
                    + ": give the fused searcher another name"
                )
        manifests = [searcher_manifest(folder, inputs.collection) for _, folder in found]
        if settings.fusion == RERANK:
            for name, manifest in list(zip(settings.parts, manifests, strict=True))[1:]:
                check_scores(searcher_class(manifest["kind"]), name, "make_index.parts")
        return {
            "parts": [
                {"name": name, "folder": paths.relative(folder, inputs.folder), "recipe": manifest["recipe"]}
                for (name, folder), manifest in zip(found, manifests, strict=True)
            ],
            "settings": {
                name: getattr(settings, name) for name in ("fusion", "weights", "depth", "fit_split")
            },
            "version": VERSION,
            **({} if settings.weights else fit_recipe(inputs.collection, settings.fit_split)),
        }

    @classmethod
    def prepare(cls, inputs: IndexInputs, recipe: dict) -> contextlib.AbstractContextManager:
        """See `Searcher.prepare`. All processes search together, and choose the same."""
        return contextlib.nullcontext(choose_fusion(inputs))

    @classmethod
    def write(cls, folder: Path, inputs: IndexInputs) -> dict:
        """See `Searcher.write`. It writes nothing: the manifest says what was chosen."""
        folders = map(paths.absolute, map(inputs.work.searcher, map(searcher_name, inputs.settings.parts)))
        parts = [{"folder": str(part)} for part in folders]
        counts = models(inputs.folder, inputs.prepared | {"parts": parts}).values()
        return {"parameters": sum(filter(None, counts)) or None} | inputs.prepared

    @classmethod
    def open(cls, folder: Path, make_partitioner: Callable[[], Partitioner] | None = None) -> "FusedSearcher":
        """See `Searcher.open`. Parts that have no weight, and find nothing, are not opened."""
        manifest = storage.read_manifest(folder, "index")
        fused_by = Fusion(**manifest["fused_by"])

        @functools.cache  # parts that ask one searcher in several ways share it
        def opened(where: Path) -> Searcher:
            kind, _ = class_and_manifest(where)
            return kind.open(where, make_partitioner)

        needed = searched(manifest)
        parts = [asked_as(part["name"], opened(paths.join(folder, part["folder"]))) for part, _ in needed]
        weights = tuple(weight for _, weight in needed)
        names = [part["name"] for part, _ in needed]
        return cls(parts, dataclasses.replace(fused_by, weights=weights), names)


def searched(manifest: dict) -> list[tuple[dict, float]]:
    """Returns the facts and the weight of each part that a fused searcher's search needs."""
    fused_by = manifest["fused_by"]
    return [
        (part, weight)
        for nth, (part, weight) in enumerate(zip(manifest["parts"], fused_by["weights"], strict=True))
        if weight or (nth == 0 and fused_by["method"] == RERANK)
    ]


def models(folder: Path, manifest: dict) -> dict[str, int | None]:
    """Returns the models that a searcher searches with: checksum (or folder) -> number of parameters."""
    if "fused_by" not in manifest:
        return {manifest["recipe"].get("checksum") or str(folder): manifest.get("parameters")}
    places = [paths.join(folder, part["folder"]) for part, _ in searched(manifest)]
    parts = [(place, storage.read_manifest(place, "index")) for place in places]
    return {key: count for part in parts for key, count in models(*part).items()}


def made_of(folder: Path) -> set[Path]:
    """Returns the absolute path of a searcher's folder and those of its parts, and of their parts."""
    places, known = [folder], set()
    while places:
        place = paths.absolute(places.pop())
        if place not in known and storage.finished(place):
            manifest = storage.read_manifest(place, "index")
            places += [paths.join(place, part["folder"]) for part in manifest.get("parts", ())]
        known.add(place)
    return known


def check(settings: IndexSettings) -> None:
    """Raises UserError if the settings of a fused searcher do not go together."""
    parts, weights, method = settings.parts, settings.weights, settings.fusion
    if len(parts) < 2 or len({*parts}) < len(parts):
        raise UserError(
            "make_index.parts: a fused searcher is made of two or more different ones: "
            "--gin.make_index.parts=\"('bm25', 'exact')\""
        )
    if weights and (len(weights) != len(parts) or not any(weights)):
        raise UserError(f"make_index.weights: {weights}: give {len(parts)} numbers, one for each part")
    if weights and not method:
        raise UserError("make_index.weights: of which fusion? set make_index.fusion, too")
    check_fit_split(settings.fit_split)


def choose_fusion(inputs: IndexInputs) -> dict:
    """Chooses what the settings leave open with queries of `fit_split`, and reports it.

    Returns:
      Facts for the manifest: "fused_by" (a Fusion) and, if there were such queries, "fitted".
    """
    settings, names, facts = inputs.settings, inputs.settings.parts, {}
    queries = [] if settings.weights else fit_queries(inputs.collection, settings.fit_split, "fused", EQUAL)
    if queries:
        opened = functools.cache(
            lambda name: Searcher.open(inputs.work.searcher(name), inputs.new_partitioner)
        )
        parts = [asked_as(name, opened(searcher_name(name))) for name in names]
        chosen, values = fit(parts, queries, settings)
        fused, alone = chosen.fusion, dict(zip(names, values, strict=True))
        fitted = {
            "split": settings.fit_split,
            "queries": len(queries),
            "nDCG@10": chosen.ndcg,
            "alone": alone,
        }
        facts["fitted"] = fitted
        shown = ", ".join(f"{name} {value:.4f}" for name, value in alone.items())
        log(f"fused: nDCG@10 {chosen.ndcg:.4f} on {len(queries)} {settings.fit_split} queries; {shown}")
    else:
        method = settings.fusion or next(iter(NORMALISATIONS))
        weights = settings.weights or [1 / len(names)] * len(names)
        fused = Fusion(method, tuple(weights), settings.depth or max(DEPTHS[method]))
    shown = ", ".join(f"{name} {weight:g}" for name, weight in zip(names, fused.weights, strict=True))
    log(f"fused: {fused.method}, weights {shown}, depth {fused.depth}")
    return {"fused_by": dataclasses.asdict(fused)} | facts


def collect(
    parts: Sequence[Searcher], queries: Sequence[str], found: Sequence[Sequence[RankedList]]
) -> list[Candidates]:
    """Gathers each query's candidates, of which parts that did not search give their scores.

    Args:
      parts: the searchers.
      queries: the queries.
      found: the ranked lists of each query, for the parts that searched: all parts, or the first one alone.
    """
    if len(found) == len(parts):
        return [Candidates.of(lists) for lists in zip(*found, strict=True)]
    wanted = [[passage_id for passage_id, _ in ranked_list] for ranked_list in found[0]]
    scores = [part.score(queries, wanted) for part in parts[1:]]
    gathered = []
    for nth, ranked_list in enumerate(found[0]):
        candidates = Candidates.of([ranked_list, *([] for _ in parts[1:])])
        for part, of_queries in enumerate(scores, start=1):
            candidates.scores_CxP[:, part] = of_queries[nth]
            candidates.ranks_CxP[:, part] = candidates.ranks_CxP[:, 0]  # of the list that depths cut
        gathered.append(candidates)
    return gathered


def fit(
    parts: Sequence[Searcher], queries: Sequence[Query], settings: IndexSettings
) -> tuple[fusion.Choice, list[float]]:
    """Chooses what the settings leave open (method, weights, depth) by nDCG@10 on these queries.

    Args:
      parts: the searchers.
      queries: the queries, each with relevant passages.
      settings: the user's choices, without weights. If no method is given, it is the best one of those that
        fuse lists.

    Returns:
      The choice, and the mean nDCG@10 of what each part finds alone.
    """
    methods = [settings.fusion] if settings.fusion else [name for name in NORMALISATIONS if name != RERANK]
    depths = (settings.depth,) if settings.depth else None
    enough = fusion.CUTOFF + 1  # for the nDCG, if one of them is the query itself
    deepest = max(enough, *(depths or (max(DEPTHS[method]) for method in methods)))
    finders = 1 if methods == [RERANK] else len(parts)
    owns = [query.id if query.is_passage else None for query in queries]
    gathered, alone_P = [], np.zeros(len(parts))
    with bar("choosing weights", len(queries)) as advance:
        for first in range(0, len(queries), BATCH_SIZE):
            some = slice(first, first + BATCH_SIZE)
            texts = [query.text for query in queries[some]]
            found = [part.search(texts, deepest) for part in parts[:finders]]
            gathered += collect(parts, texts, found)
            found += [part.search(texts, enough) for part in parts[finders:]]
            for query, own, *lists in zip(queries[some], owns[some], *found, strict=True):
                alone_P += [fusion.list_ndcg(ranked_list, query.relevant, own) for ranked_list in lists]
            advance(len(texts))
    grades: list[Mapping[str, int]] = [query.relevant for query in queries]
    return fusion.choose(gathered, grades, owns, methods, depths), (alone_P / len(queries)).tolist()
