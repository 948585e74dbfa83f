"""The verb `import`: any source of passages and queries becomes a `collection` folder."""

import functools
import itertools
import shutil
from collections.abc import Container, Iterator
from pathlib import Path

import gin

from retrieval_jax import storage
from retrieval_jax.data import vocabulary
from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.data.python_docs import PACKAGES, python_docs
from retrieval_jax.data.records import write_passages, write_queries
from retrieval_jax.data.sources import Source, open_source
from retrieval_jax.progress import say, track
from retrieval_jax.work import Work

PYTHON_DOCS = "python_docs"


@gin.configurable
def import_collection(
    source: str,
    work_dir: str | None = None,
    vocabulary_path: str | None = None,
    vocab_size: int = 8000,
    held_out: float = 0.05,
    docs_size: int = 5000,
    docs_packages: tuple[str, ...] = PACKAGES,
) -> dict:
    """Writes the records and the vocabulary of a collection, once.

    Args:
      source: `python_docs` (embedded), or a folder in BEIR or TSV layout.
      work_dir: where everything made of this collection goes; None is `work/NAME`.
      vocabulary_path: a SentencePiece model to use; None learns one on passages, their ids and train queries.
      vocab_size: pieces of a learned vocabulary.
      held_out: where there are train but no dev queries, this share of them, chosen by a hash of the id,
        becomes dev.
      docs_size, docs_packages: most passages of `python_docs`, and the packages that they come from.
    """
    embedded = source == PYTHON_DOCS
    opened = embedded_source(docs_size, docs_packages) if embedded else open_source(source)
    # Size and time of the files stand for their contents. The embedded collection has no files: once made,
    # it stays as it is, also when packages are upgraded.
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in opened.files]
    recipe = {"source": opened.name, "files": stats, "held_out": held_out}
    recipe["vocabulary"] = vocabulary_path or vocab_size
    if embedded:
        recipe |= {"docs_size": docs_size, "docs_packages": docs_packages}

    def make(folder: Path) -> dict:
        ids: dict[str, None] = {}
        parts: list[str] = []

        def passages() -> Iterator[Passage]:
            for passage in track(opened.passages(), "passages"):
                ids[passage.id] = None
                parts.append(storage.digest([passage.id, passage.title, passage.text]))
                yield passage

        write_passages(folder, opened.name, passages())
        queries = with_dev(opened.queries(ids), held_out)
        write_queries(folder, opened.name, queries)
        parts += [storage.digest([q.id, q.text, *q.positives]) for judged in queries.values() for q in judged]
        model = folder / "sentencepiece.model"
        if vocabulary_path:
            vocabulary.Vocabulary(vocabulary_path)  # says what is wrong with it, if anything
            shutil.copyfile(vocabulary_path, model)
        else:
            say(f"learning a vocabulary of {vocab_size} pieces")
            texts = (p.full_text for p in opened.passages())
            train = (q.text for q in queries.get("train", []))
            vocabulary.learn(itertools.chain(train, ids, texts), vocab_size, model)
        return {
            "name": opened.name,
            "passages": len(ids),
            "queries": {split: len(judged) for split, judged in queries.items()},
            "fingerprint": storage.digest(parts),
        }

    path = Work.of(source, work_dir).collection
    manifest = storage.build(path, recipe, make)
    return {"collection": str(path), **{key: manifest[key] for key in ("name", "passages", "queries")}}


def embedded_source(size: int, packages: tuple[str, ...]) -> Source:
    """`python_docs` as a source: 80% of its queries train, 10% dev and 10% test, by a hash of the id."""

    @functools.cache
    def docs() -> tuple[list[Passage], list[Query]]:
        say("reading the docstrings of the installed packages (half a minute)")
        return python_docs(size, packages=packages)

    def split(query: Query) -> str:
        fraction = storage.hash_fraction(query.id)
        return "train" if fraction < 0.8 else "dev" if fraction < 0.9 else "test"

    def by_split(_: Container[str]) -> dict[str, list[Query]]:
        return {name: [q for q in docs()[1] if split(q) == name] for name in ("train", "dev", "test")}

    return Source(PYTHON_DOCS, (), lambda: iter(docs()[0]), by_split)


def with_dev(queries: dict[str, list[Query]], held_out: float) -> dict[str, list[Query]]:
    """Takes dev queries out of the train queries, unless there are dev queries or no train queries."""
    if "dev" in queries or "train" not in queries:
        return queries
    held = [storage.hash_fraction(q.id) < held_out for q in queries["train"]]
    split = {
        "train": [q for q, dev in zip(queries["train"], held, strict=True) if not dev],
        "dev": [q for q, dev in zip(queries["train"], held, strict=True) if dev],
    }
    return {name: judged for name, judged in {**queries, **split}.items() if judged}
