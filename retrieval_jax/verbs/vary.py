"""The verb `vary`: variations of a split's queries, which `search` and `evaluate` take as splits."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import gin

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Names, Seed
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import variations
from retrieval_jax.data.collection import Collection, Query


@gin.configurable
def vary(
    source: str,
    work_dir: str | None = None,
    split: str = "test",
    kinds: Sequence[Annotated[str, Names("a kind of variation", tuple(variations.KINDS))]] = (
        *variations.KINDS,
    ),
    file: str | None = None,
    seed: Seed = 0,
) -> dict:
    """Writes variations/SPLIT~KIND/queries.jsonl: the queries of a split, with typos or other words.

    Then search with --SPLIT=test~all, and evaluate with --SPLIT=test: the report compares them. Each is also
    a split of its own, --SPLIT=test~typo and so on, whose judgements are those of the queries.

    Misspelling, in one word of at least four letters that is no stop word: two neighbouring letters change
    places (swap), a key beside the right one (qwerty), a random letter instead (substitute), a random letter
    more (insert), a letter less (delete); or one of these five, drawn for each query (typo). Words: English
    stop words are left out (no_stop_words), a fifth of the words is left out (drop_words), the words are in
    another order (shuffle). A query without a word that can be varied so stays as it is. Synonyms need a
    dictionary, and paraphrases a model: make them elsewhere, and give them as a file.

    Args:
      source: the collection: a folder, `python_docs` or `ir_datasets:ID`.
      work_dir: the folder in which the collection's artefacts lie; None for work/NAME.
      split: the queries to vary.
      kinds: the kinds to make.
      file: the path of queries in other words, made elsewhere: lines `id⇥text`, or JSON lines with "_id" and
        "text", one for each query of the split. It is one more kind, of the file's name: paraphrase.tsv gives
        the split test~paraphrase.
      seed: of what is drawn for each query.

    Returns:
      The splits that there are now, each with its number of queries and how many of them have changed.

    Raises:
      UserError: the file is missing, has the name of another kind, or has no text for a query.
    """
    work = Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    queries = collection.queries(split)
    basis = collection.recipe(split) | {"version": variations.VERSION}
    made = {}

    def build(kind: str, recipe: dict, texts: Callable[[], Sequence[str]]) -> None:
        folder = work.variation(split, kind)

        def write(tmp: Path) -> dict:
            return variations.write(tmp, queries, texts())

        manifest = storage.build_once(folder, basis | recipe, write)
        made[folder.name] = {key: manifest[key] for key in ("queries", "changed")}

    for kind in kinds:
        build(kind, {"seed": seed}, functools.partial(_varied, queries, kind, seed))
    if file:
        path = paths.as_path(file)
        kind = path.name.split(".")[0]
        if kind in (*variations.KINDS, variations.ALL):
            raise UserError(
                f"vary.file: {path}: {kind} is the name of another kind: give the file another name"
            )
        if not path.is_file():
            raise UserError(f"vary.file: {path}: no such file: give the path of one")
        build(kind, {"file": storage.checksum(path)}, functools.partial(_read, path, queries))
    return {"splits": made}


def _varied(queries: Sequence[Query], kind: str, seed: int) -> list[str]:
    return [variations.vary(query.text, kind, query.id, seed) for query in queries]


def _read(path: Path, queries: Sequence[Query]) -> list[str]:
    """Reads what a file says of each query."""
    texts = variations.read_texts(path)
    missing = [query.id for query in queries if not texts.get(query.id, "").strip()]
    if missing:
        raise UserError(
            f"{path}: no text for {len(missing)} of {len(queries)} queries, as {missing[0]!r}: add them"
        )
    if unknown := texts.keys() - {query.id for query in queries}:
        log(f"{path}: {len(unknown)} of {len(texts)} ids are of no query of the split, as {min(unknown)!r}")
    return [texts[query.id] for query in queries]
