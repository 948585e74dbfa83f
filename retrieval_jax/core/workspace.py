"""Where things lie: one folder a collection, with a place for each of the seven nouns."""

import dataclasses
import re
from pathlib import Path

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError

UNFINISHED = ".unfinished"  # ends the name of a folder in which synthetic queries are being made


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The paths under a work folder.

    collection/ · embeddings/NAME/ · docids/KIND/ · cache/TASK/ (examples) · models/NAME/ (checkpoints) ·
    synthetic/NAME/ (generated queries) · negatives/NAME/ (mined ones) · searchers/NAME/ ·
    runs/NAME.SPLIT.trec · report.html, metrics.json · exports/NAME/
    """

    folder: Path

    @classmethod
    def for_source(cls, collection: str, work_dir: str | None) -> "Workspace":
        """The given folder (local or gs://…), or `work/NAME` with the name of the collection's source.

        Raises UserError where `work/NAME` holds the collection of another source of that name.
        """
        # A folder's last part is its name; the parts of ir_datasets:beir/scifact/test name it together.
        name = re.sub("[:/,]", "_", collection) if ":" in collection else paths.absolute(collection).name
        folder = paths.as_path(work_dir) if work_dir else Path("work") / name
        paths.check_bucket(folder)
        work = cls(folder)
        if not work_dir and storage.finished(work.collection):
            held = storage.read_manifest(work.collection, "import").get("source_path")
            if held and held != source_path(collection):
                raise UserError(
                    f"{folder}: holds the collection of {held}, not of {source_path(collection)}: "
                    f"name another folder, --WORK_DIR=work/{name}_2"
                )
        return work

    @property
    def collection(self) -> Path:
        return self.folder / "collection"

    def docids(self, kind: str) -> Path:
        return self.folder / "docids" / checked(kind)

    def embeddings(self, name: str) -> Path:
        return self.folder / "embeddings" / name

    def cache(self, task: str) -> Path:
        return self.folder / "cache" / task

    def synthetic(self, name: str) -> Path:
        return self.folder / "synthetic" / checked(name)

    def negatives(self, name: str) -> Path:
        return self.folder / "negatives" / checked(name)

    def model(self, name: str) -> Path:
        return self.folder / "models" / checked(name)

    def searcher(self, name: str) -> Path:
        return self.folder / "searchers" / checked(name)

    def export(self, name: str) -> Path:
        return self.folder / "exports" / checked(name)

    def run(self, name: str, split: str) -> Path:
        return self.folder / "runs" / f"{checked(name)}.{split}.trec"

    def qrels(self, split: str) -> Path:
        return self.folder / "runs" / f"qrels.{split}.trec"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.json"


def source_path(collection: str) -> str:
    """A collection's source, with the whole path of a folder."""
    return collection if ":" in collection else str(paths.absolute(collection))


def checked(name: str) -> str:
    """The name of an artefact, which becomes a file's name. Raises UserError where it cannot be one."""
    if (
        not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", str(name))
        or name == "qrels"
        or name.endswith(UNFINISHED)
    ):
        raise UserError(
            f"{name!r}: cannot be the name of an artefact: take letters, digits, `_`, `-` and `.`, "
            f"not a leading dot, not 'qrels', and no {UNFINISHED!r} at the end"
        )
    return name
