"""Where things lie: one folder a collection, with a place for each of the seven nouns."""

import dataclasses
import re
from pathlib import Path

from retrieval_jax import paths


@dataclasses.dataclass(frozen=True)
class Work:
    """The paths under a work folder.

    collection/ · embeddings/NAME/ · docids/KIND/ · cache/TASK/ (examples) · models/NAME/ (checkpoints) ·
    synthetic/NAME/ (generated queries) · negatives/NAME/ (mined ones) · searchers/NAME/ ·
    runs/NAME.SPLIT.trec · report.html, metrics.json · exports/NAME/
    """

    folder: Path

    @classmethod
    def of(cls, collection: str, work_dir: str | None) -> "Work":
        """The given folder (local or gs://…), or `work/NAME` with the name of the collection's source."""
        # A folder's last part is its name; the parts of ir_datasets:beir/scifact/test name it together.
        name = re.sub("[:/,]", "_", collection) if ":" in collection else Path(collection).resolve().name
        folder = paths.of(work_dir) if work_dir else Path("work") / name
        paths.check(folder)
        return cls(folder)

    @property
    def collection(self) -> Path:
        return self.folder / "collection"

    def docids(self, kind: str) -> Path:
        return self.folder / "docids" / kind

    def embeddings(self, name: str) -> Path:
        return self.folder / "embeddings" / name

    def cache(self, task: str) -> Path:
        return self.folder / "cache" / task

    def synthetic(self, name: str) -> Path:
        return self.folder / "synthetic" / name

    def negatives(self, name: str) -> Path:
        return self.folder / "negatives" / name

    def model(self, name: str) -> Path:
        return self.folder / "models" / name

    def searcher(self, name: str) -> Path:
        return self.folder / "searchers" / name

    def export(self, name: str) -> Path:
        return self.folder / "exports" / name

    def run(self, name: str, split: str) -> Path:
        return self.folder / "runs" / f"{name}.{split}.trec"

    def qrels(self, split: str) -> Path:
        return self.folder / "runs" / f"qrels.{split}.trec"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.json"
