"""Mined hard negatives on disk, as the qrels of an ordinary collection: grade 0.

    negatives/NAME/manifest.json
    negatives/NAME/qrels.train.tsv        query, passage, 0; a query's hardest first

`verbs/mine.py` makes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.records import Collection
from retrieval_jax.data.sources import lines

VERB = "mine"
FILE = "qrels.train.tsv"


class MinedNegatives:
    """A finished `negatives/NAME` folder. `fingerprint`: of the file."""

    def __init__(self, folder: str | Path):
        self.folder = paths.as_path(folder)
        manifest = storage.read_manifest(folder, VERB)
        self.collection: str = manifest["recipe"]["collection"]
        self.fingerprint: str = manifest["fingerprint"]

    def of_queries(self, collection: Collection) -> dict[str, tuple[str, ...]]:
        """Query id -> ids of its negatives. UserError where they are another collection's, or damaged."""
        hint = f"make it again with `retrieval-jax {VERB}`"
        if self.collection != collection.fingerprint:
            raise UserError(
                f"{self.folder}: of another collection (or an earlier one) than {collection.folder}: {hint}"
            )
        path = self.folder / FILE
        if not path.is_file() or storage.checksum(path) != self.fingerprint:
            raise UserError(f"{path}: missing or altered: {hint}")
        path = paths.ensure_local(path)
        found: dict[str, list[str]] = {}
        fields = ("query", "passage", "grade")
        for _, (query, passage, _) in lines.parsed(
            path, lambda x: lines.columns(x, fields), lines.ErrorLog()
        ):
            found.setdefault(query, []).append(passage)
        return {query: tuple(passages) for query, passages in found.items()}


def write(folder: Path, negatives: Iterable[tuple[str, Sequence[str]]]) -> Mapping[str, object]:
    """Writes (query, its negatives) into a new folder; gives what its manifest shall say of them."""
    path, counts = folder / FILE, []
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
