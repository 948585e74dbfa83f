"""The workspace: where the artefacts of one collection lie, in one work folder."""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log

PYTHON_DOCS = "python_docs"  # the source that is embedded, whatever folder has this name
UNFINISHED = ".unfinished"  # ends the name of a folder of parts; see `unfinished`


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The paths in a work folder.

    collection/ · embeddings/NAME/ · docids/KIND/ · sets/NAME/ (of tokens) · cache/TASK/ (examples) ·
    models/NAME/ (checkpoints) · synthetic/NAME/ (generated queries) · negatives/NAME/ (mined ones) ·
    scores/NAME/ (a teacher's) · searchers/NAME/ · variations/SPLIT~KIND/ (of queries) ·
    runs/NAME.SPLIT.trec · report.html, metrics.json, significance.json, robustness.json · exports/NAME/

    Methods that take a name raise UserError if it cannot be the name of a file.

    Attributes:
      folder: the work folder, local or remote.
    """

    folder: Path

    @classmethod
    def for_source(cls, collection: str, work_dir: str | None, imports: bool = False) -> "Workspace":
        """Returns the workspace of a collection. A line says so if its source has changed since the import.

        Args:
          collection: the name of its source, as `import` takes it.
          work_dir: the work folder, local or gs://…; None is `work/NAME`, with the last part of the source's
            name.
          imports: whether the source is to be imported.

        Raises:
          UserError: the bucket cannot be read, or the folder holds the collection of another source, and
            both are on this machine. A `work_dir` whose source has moved is taken, and so is one alone: with
            `python_docs`, which is the default, or a name of no folder.
        """
        name = default_name(collection)
        folder = paths.as_path(work_dir) if work_dir else Path("work") / name
        paths.check_bucket(folder)
        work = cls(folder)
        if not storage.finished(work.collection):
            return work
        manifest = storage.read_manifest(work.collection, "import")
        held, given = manifest.get("source_path"), source_path(collection)
        if manifest.get("source") == PYTHON_DOCS:  # earlier versions noted a path
            held = PYTHON_DOCS
        if held and not _is_same(held, given):
            is_meant = _is_there(given) and (imports or given != PYTHON_DOCS)
            if not work_dir or (is_meant and _is_there(held)):
                raise UserError(
                    f"{folder}: holds the collection of {held}, not of {given}: "
                    f"name another folder, --WORK_DIR=work/{name}_2"
                )
        elif not imports:
            for file in _changed(manifest.get("recipe", {}).get("files", ())):
                _log_once(f"{file}: changed since the import: `retrieval-jax import` reads it again")
        return work

    @property
    def collection(self) -> Path:
        """The folder of passages, queries, judgements and the vocabulary."""
        return self.folder / "collection"

    def docids(self, kind: str) -> Path:
        """Returns the folder of the docids of a kind."""
        return self.folder / "docids" / checked(kind)

    def sets(self, name: str) -> Path:
        """Returns the folder of sets of tokens, one of each passage."""
        return self.folder / "sets" / checked(name)

    def embeddings(self, name: str) -> Path:
        """Returns the folder of vectors of the passages."""
        return self.folder / "embeddings" / name

    def cache(self, task: str) -> Path:
        """Returns the folder of the cached examples of a task."""
        return self.folder / "cache" / task

    def synthetic(self, name: str) -> Path:
        """Returns the folder of generated queries."""
        return self.folder / "synthetic" / checked(name)

    def negatives(self, name: str) -> Path:
        """Returns the folder of mined negatives."""
        return self.folder / "negatives" / checked(name)

    def scores(self, name: str) -> Path:
        """Returns the folder of a teacher's scores."""
        return self.folder / "scores" / checked(name)

    def variation(self, split: str, kind: str) -> Path:
        """Returns the folder of the queries of a split, varied; its name is that of a split."""
        return self.folder / "variations" / f"{split}~{checked(kind)}"

    def model(self, name: str) -> Path:
        """Returns the folder of a model and its checkpoints."""
        return self.folder / "models" / checked(name)

    def searcher(self, name: str) -> Path:
        """Returns the folder of a searcher."""
        return self.folder / "searchers" / checked(name)

    def export(self, name: str) -> Path:
        """Returns the folder of an exported model or searcher."""
        return self.folder / "exports" / checked(name)

    def run(self, name: str, split: str) -> Path:
        """Returns the file of a searcher's run on a split."""
        return self.folder / "runs" / f"{checked(name)}.{split}.trec"

    def qrels(self, split: str) -> Path:
        """Returns the file of the judgements of a split, in TREC's format."""
        return self.folder / "runs" / f"qrels.{split}.trec"

    @property
    def report(self) -> Path:
        """The report, a page of HTML."""
        return self.folder / "report.html"

    @property
    def metrics(self) -> Path:
        """The metrics of all searchers that were evaluated."""
        return self.folder / "metrics.json"

    @property
    def robustness(self) -> Path:
        """What variations of the queries do to the searchers that were evaluated."""
        return self.folder / "robustness.json"

    @property
    def significance(self) -> Path:
        """The differences between the searchers that were evaluated, with their significance."""
        return self.folder / "significance.json"


def default_name(collection: str) -> str:
    """Returns the name of a collection's work folder where none is given, from the name of its source.

    A folder's last part is its name; the parts of ir_datasets:beir/scifact/test name it together.
    """
    return re.sub("[:/,]", "_", collection) if ":" in collection else paths.absolute(collection).name


def source_path(collection: str) -> str:
    """Returns the name of a collection's source; a folder by its absolute path."""
    is_folder = collection != PYTHON_DOCS and ":" not in collection
    return str(paths.absolute(collection)) if is_folder else collection


def _is_same(held: str, given: str) -> bool:
    """Tells whether two sources are one; a folder may have several paths."""
    return held == given or (":" not in held + given and os.path.realpath(held) == os.path.realpath(given))


def _is_there(source: str) -> bool:
    # Path.exists raises where a folder may not be read.
    return source == PYTHON_DOCS or ":" in source or os.path.exists(source)


def _changed(files: Sequence[tuple[str, int, int]]) -> Iterator[str]:
    """Yields those of a source's files, as the import found them, that are there and are others now."""
    for file, size, time in files:
        with contextlib.suppress(OSError):
            stat = Path(file).stat()
            if (stat.st_size, stat.st_mtime_ns) != (size, time):
                yield file


@functools.cache
def _log_once(line: str) -> None:
    log(line)


def checked(name: str) -> str:
    """Returns the name of an artefact. Raises UserError if it cannot be the name of a file."""
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
