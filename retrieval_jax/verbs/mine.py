"""The verb `mine`: passages that a searcher wrongly finds for the train queries become hard negatives."""

from pathlib import Path

import gin

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import mined
from retrieval_jax.data.records import Collection
from retrieval_jax.mesh.partitioning import make_partitioner
from retrieval_jax.search.batched import search_in_batches
from retrieval_jax.search.searcher import Searcher, searcher_manifest

SUMMARY_KEYS = ("queries", "with_negatives", "negatives")  # of the manifest


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

    qrels.dev.tsv beside it has what is found for the dev queries, for the pool of passages among which a dual
    encoder searches for them while it trains: nothing is skipped, and no margin kept.

    Train with them by --NEGATIVES=NAME and --gin.DataConfig.negatives=7. To refresh them between
    rounds, mine again with an index of the model that they trained, under the same name or another. A passage
    that is known to answer a query is never its negative: these are its positives and those of queries with
    the same text, all passages that have the text of one of these, and the passage that the query itself is.

    Args:
      source: the collection: a folder, `python_docs` or `ir_datasets:ID`.
      work_dir: the folder in which the collection's artefacts lie; None for work/NAME.
      searcher: the name of a searcher, one of searchers/.
      name: the name of the negatives; None for the searcher's.
      depth: passages to search for, for each query.
      negatives_per_query: negatives to keep, hardest first.
      skip_top: passages to leave out at the top, which are the most likely to be unlabelled positives.
      margin: against unlabelled positives, too: a negative must score lower than the query's best positive by
        this much. A query has no negatives if none of its positives is found. None: no limit.
    """
    if negatives_per_query < 1 or not 0 <= skip_top < depth:
        raise UserError(
            f"mine: depth {depth}, skip_top {skip_top}, negatives_per_query {negatives_per_query}: skip less "
            "than depth, keep some"
        )
    work = Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    folder, out = work.searcher(searcher), work.negatives(name or searcher)
    recipe = {
        "collection": collection.fingerprint,
        "searcher": searcher_manifest(folder, collection)["recipe"],
        "settings": [depth, negatives_per_query, skip_top, margin],
        "splits": ["train", *["dev"] * bool(collection.query_counts.get("dev"))],
    }

    def write(tmp: Path) -> dict:
        opened = Searcher.open(folder, make_partitioner)

        def mine_split(split: str, skip_top: int, margin: float | None) -> dict:
            queries = collection.queries(split)
            ranked_lists = search_in_batches(
                opened, [query.text for query in queries], depth, f"{split}: mine with {searcher}"
            )
            negatives = mined.choose_all(
                collection, queries, ranked_lists, negatives_per_query, skip_top, margin
            )
            return mined.write(tmp, split, negatives)

        facts = mine_split("train", skip_top, margin)
        if "dev" in recipe["splits"]:
            facts["dev_fingerprint"] = mine_split("dev", 0, None)["fingerprint"]
        return facts

    manifest = storage.build_once(out, recipe, write)
    return {"made": str(out / mined.file_name("train"))} | {key: manifest[key] for key in SUMMARY_KEYS}
