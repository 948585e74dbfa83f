"""Studies that train on a collection by the command line's verbs, with a budget of minutes a training."""

import argparse
import gzip
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from retrieval_jax.core import storage
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.main import run

RATES = {
    **{"dense": 200, "atomic": 500, "naive": 250, "rq_8x256": 250, "rank": 100, "distilled": 160},
    **{"query": 40, "joint": 20},
}
"""Steps a minute of each training on a processor that is busy with other things, too."""
QUICK = (
    "import_collection.docs_size=300",
    "import_collection.vocab_size=2000",
    "import_collection.docs_packages=('optax', 'rich')",
)
"""Bindings of a collection of 300 passages."""
T = TypeVar("T")


class Study:
    """All methods on one collection, with one seed.

    Args:
      here: the bindings that name the collection, its work folder and the seed.
      work: the work folder.
      minutes: the budget.
      bindings: of the command line.
    """

    def __init__(self, here: list[str], work: Workspace, minutes: float, bindings: list[str]):
        self.here, self.work, self.minutes, self.bindings = here, work, minutes, bindings

    def run(self, verb: str, *settings: str, files: tuple[str, ...] = ()) -> dict:
        """Runs a verb as the command line does, in this process."""
        return run(verb, [*files], [*self.here, *settings, *self.bindings])

    def steps(self, training: str, share: float = 1.0) -> int:
        """Gives the steps of the budget, or of a share of it."""
        return max(round(RATES[training] * self.minutes * share), 1)


def add_options(parser: argparse.ArgumentParser, minutes: float, needs_work: bool = True) -> None:
    """Adds the options that `studies` reads."""
    parser.add_argument("collections", nargs="*", default=["python_docs"], metavar="FOLDER[:PASSAGES]")
    parser.add_argument("--work", required=needs_work, type=Path, help="the work folders go here")
    parser.add_argument("--minutes", type=float, default=minutes, help="of training a model")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--quick", action="store_true", help="300 passages: a few minutes")


def studies(
    args: argparse.Namespace, make: Callable[[list[str], Workspace], T]
) -> Iterator[tuple[str, list[T]]]:
    """Yields (the name of a collection, what `make` gives of its bindings and work folder, for each seed)."""
    for given in args.collections:
        source, _, passages = given.partition(":")
        name = Path(source).name
        if passages:
            name = f"{name}_{int(passages)}"
            source = str(cut(Path(source), int(passages), args.work / "cut" / name))
        some = []
        for seed in range(args.seeds):
            work = Workspace(args.work / f"{name}_{seed}")
            here = [f"COLLECTION={source!r}", f"WORK_DIR={str(work.folder)!r}", f"SEED={seed}"]
            some.append(make(here, work))
        yield name, some


def cut(source: Path, passages: int, out: Path) -> Path:
    """Writes a part of a TSV folder: passages chosen by a hash, and train and test queries that ask for them.

    It has no dev queries: the import then holds some train queries out as such.
    """
    if (out / "qrels.test.tsv").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)

    def lines(name: str) -> list[list[str]]:
        path = source / f"{name}.tsv"
        if path.exists():
            return [line.split("\t") for line in path.read_text().split("\n") if line]
        with gzip.open(path.with_name(f"{path.name}.gz"), "rt") as file:
            return [line.rstrip("\n").split("\t") for line in file]

    def write(name: str, rows: Iterable[list[str]]) -> None:
        (out / f"{name}.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))

    docs = sorted(lines("docs"), key=lambda row: storage.hash_fraction(row[0]))[:passages]
    kept = {row[0] for row in docs}
    write("docs", docs)
    for split in ("train", "test"):
        qrels = lines(f"qrels.{split}")
        others = {query for query, passage, *_ in qrels if passage not in kept}
        write(f"queries.{split}", (row for row in lines(f"queries.{split}") if row[0] not in others))
        write(f"qrels.{split}", (row for row in qrels if row[0] not in others))
    return out
