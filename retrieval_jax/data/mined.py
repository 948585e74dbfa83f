"""Mined hard negatives: how they are chosen, and their files, which are qrels of grade 0.

    negatives/NAME/manifest.json
    negatives/NAME/qrels.train.tsv        query, passage, 0; a query's hardest first
    negatives/NAME/qrels.dev.tsv          the same of the dev queries, if there are any: a dual encoder
                                          searches among these passages, and others, while it trains

`verbs/mine.py` makes them.
"""

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Query
from retrieval_jax.data.copies import KnownAnswers
from retrieval_jax.data.records import Collection
from retrieval_jax.data.sources import lines

VERB = "mine"


class MinedNegatives:
    """The mined negatives of a finished folder `negatives/NAME`.

    Args:
      folder: the folder, local or remote.

    Attributes:
      collection: the fingerprint of the collection that they were mined for.
      fingerprint: the checksum of the train queries' file.
    """

    def __init__(self, folder: str | Path):
        self.folder = paths.as_path(folder)
        manifest = storage.read_manifest(folder, VERB)
        self.collection: str = manifest["recipe"]["collection"]
        self.fingerprint: str = manifest["fingerprint"]
        self._dev_fingerprint: str | None = manifest.get("dev_fingerprint")

    def fingerprint_of(self, split: str) -> str | None:
        """Returns the checksum of a split's file, train or dev; None where there is none."""
        return self.fingerprint if split == "train" else self._dev_fingerprint

    def of_queries(self, collection: Collection, split: str = "train") -> dict[str, tuple[str, ...]]:
        """Reads the negatives of all queries of a split.

        Args:
          collection: the collection.
          split: train or dev. There may be none for dev.

        Returns:
          Query id -> passage ids, hardest first.

        Raises:
          UserError: they were mined for another collection, or the file is missing or damaged.
        """
        hint = f"make it again with `retrieval-jax {VERB}`"
        if self.collection != collection.fingerprint:
            raise UserError(
                f"{self.folder}: of another collection (or an earlier one) than {collection.folder}: {hint}"
            )
        fingerprint = self.fingerprint_of(split)
        if fingerprint is None:
            return {}
        path = self.folder / file_name(split)
        if not path.is_file() or storage.checksum(path) != fingerprint:
            raise UserError(f"{path}: missing or altered: {hint}")
        path = paths.ensure_local(path)
        found: dict[str, list[str]] = {}
        fields = ("query", "passage", "grade")
        for _, (query, passage, _) in lines.parse_lines(
            path, lambda x: lines.columns(x, fields), lines.ErrorLog()
        ):
            found.setdefault(query, []).append(passage)
        return {query: tuple(passages) for query, passages in found.items()}


def file_name(split: str) -> str:
    """Gives the name of the file of a split's negatives."""
    return f"qrels.{split}.tsv"


def write(folder: Path, split: str, negatives: Iterable[tuple[str, Sequence[str]]]) -> dict[str, object]:
    """Writes the negatives of a split into a new folder.

    Args:
      folder: a local folder.
      split: train or dev.
      negatives: (query id, passage ids) of each query, hardest passage first.

    Returns:
      The facts for the folder's manifest, of the train queries.
    """
    path, counts = folder / file_name(split), []
    with path.open("w") as file:
        for query, passages in negatives:
            file.writelines(f"{query}\t{passage}\t0\n" for passage in passages)
            counts.append(len(passages))
    return {
        "fingerprint": storage.checksum(path),
        "queries": len(counts),
        "with_negatives": sum(map(bool, counts)),
        "negatives": sum(counts),
    }


def choose_all(
    collection: Collection,
    queries: Sequence[Query],
    ranked_lists: Iterable[Sequence[tuple[str, float]]],
    limit: int,
    skip_top: int,
    margin: float | None,
) -> Iterator[tuple[str, list[str]]]:
    """Yields (query id, its hard negatives) of each query; see `choose_negatives`.

    Args:
      collection: the collection, which knows the copies of each passage.
      queries: all queries whose positives are known; those of one text share them.
      ranked_lists: the passages that were found for each of these queries, in their order.
      limit: see `choose_negatives`.
      skip_top: see `choose_negatives`.
      margin: see `choose_negatives`.
    """
    answers, first_copies = KnownAnswers(queries), collection.first_ids
    for query, ranked_list in zip(queries, ranked_lists, strict=True):
        others = answers.others(query)
        yield query.id, choose_negatives(query, ranked_list, limit, skip_top, margin, others, first_copies)


def choose_negatives(
    query: Query,
    ranked_list: Sequence[tuple[str, float]],
    limit: int,
    skip_top: int,
    margin: float | None,
    other_positives: Sequence[str] = (),
    first_copies: Mapping[str, str] = types.MappingProxyType({}),
) -> list[str]:
    """Chooses the hardest passages that are not known to answer a query.

    Args:
      query: the query.
      ranked_list: (passage id, score) of the passages that were found for it, best first.
      limit: the number of negatives, at most.
      skip_top: passages to leave out at the top of the list.
      margin: how much lower than the query's best positive a negative must score; without a positive in the
        list there are then no negatives. None: no limit.
      other_positives: passages that answer the query besides its positives; see `KnownAnswers`.
      first_copies: passage id -> the first passage with the same text, for passages that are a later copy.

    Returns:
      Passage ids, hardest first.
    """
    positives = {first_copies.get(passage, passage) for passage in query.positives}
    answers = positives | {first_copies.get(passage, passage) for passage in other_positives}
    originals = [(passage, first_copies.get(passage, passage), score) for passage, score in ranked_list]
    ceiling = float("inf")
    if margin is not None:
        best = max((score for _, original, score in originals if original in positives), default=-ceiling)
        ceiling = best - margin
    negatives = [
        passage
        for passage, original, score in originals[skip_top:]
        if original not in answers and score <= ceiling
    ]
    return negatives[:limit]
