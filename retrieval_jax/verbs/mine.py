"""The verb `mine`: what a searcher finds for the train queries, and is wrong, becomes hard negatives."""

import types
from collections.abc import Mapping, Sequence
from pathlib import Path

import gin

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import mined
from retrieval_jax.data.collection import Query
from retrieval_jax.data.copies import KnownAnswers
from retrieval_jax.data.records import Collection
from retrieval_jax.mesh.partitioning import make_mesh
from retrieval_jax.search.searcher import RankedList, Searcher, search_in_batches, searcher_manifest


@gin.configurable
def mine(
    source: str,
    work_dir: str | None = None,
    searcher: str = "bm25",
    name: str | None = None,
    depth: int = 100,
    negatives_per_query: int = 30,
    skip_top: int = 0,
    margin: float | None = None,
) -> dict:
    """Writes negatives/NAME/qrels.train.tsv: hard negatives of the train queries, for a dual encoder.

    Train with them by --NEGATIVES=NAME and --gin.TrainingData.negatives=7. To refresh them between
    rounds, mine again with an index of the model that they trained, under the same name or another. What is
    known to answer a query is never its negative: its positives and those of queries with the same text, all
    passages that have the text of one of these, and the passage that the query itself is.

    Args:
      source, work_dir: the collection, and where its work lies.
      searcher: one of searchers/: BM25, or a checkpoint's.
      name: of the negatives; None is the searcher's.
      depth: passages to look at, a query.
      negatives_per_query: negatives to keep, a query, hardest first.
      skip_top: passages to leave out at the top, which are most likely to be unlabelled positives.
      margin: for unlabelled positives too: a negative must score lower than the query's best positive by so
        much. A query whose positives are not among those looked at then has no negatives. None: no limit.
    """
    if negatives_per_query < 1 or not 0 <= skip_top < depth:
        raise UserError(
            f"mine: depth {depth}, skip_top {skip_top}, negatives_per_query {negatives_per_query}: skip less "
            "than depth, keep some"
        )
    work = Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    folder = work.searcher(searcher)
    recipe = {
        "collection": collection.fingerprint,
        "searcher": searcher_manifest(folder, collection)["recipe"],
        "settings": [depth, negatives_per_query, skip_top, margin],
    }
    queries = collection.queries("train")
    answers, copies = KnownAnswers(queries), collection.first_ids
    out = work.negatives(name or searcher)

    def make(tmp: Path) -> dict:
        texts = [query.text for query in queries]
        found = search_in_batches(Searcher.open(folder, make_mesh), texts, depth, f"mine with {searcher}")
        return mined.write(
            tmp,
            (
                (
                    query.id,
                    choose_negatives(
                        query, ranking, negatives_per_query, skip_top, margin, answers.others(query), copies
                    ),
                )
                for query, ranking in zip(queries, found, strict=True)
            ),
        )

    manifest = storage.build_once(out, recipe, make)
    told = ("queries", "with_negatives", "negatives")
    return {"made": str(out / mined.FILE)} | {key: manifest[key] for key in told}


def choose_negatives(
    query: Query,
    ranking: RankedList,
    negatives_per_query: int,
    skip_top: int,
    margin: float | None,
    others: Sequence[str] = (),
    copies: Mapping[str, str] = types.MappingProxyType({}),
) -> list[str]:
    """The hardest of a ranking that are not known to answer the query; see `mine`.

    Args:
      query, ranking: the query and what was found for it.
      negatives_per_query, skip_top, margin: as in `mine`.
      others: passages that answer the query besides its positives; see `KnownAnswers`.
      copies: a passage whose text stands before -> the first one of that text.
    """
    positives = {copies.get(passage, passage) for passage in query.positives}
    answers = positives | {copies.get(passage, passage) for passage in others}
    first = [(passage, copies.get(passage, passage), score) for passage, score in ranking]
    limit = float("inf")
    if margin is not None:
        limit = max((s for _, text, s in first if text in positives), default=float("-inf")) - margin
    wrong = [passage for passage, text, score in first[skip_top:] if text not in answers and score <= limit]
    return wrong[:negatives_per_query]
