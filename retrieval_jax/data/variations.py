"""Variations of queries: how well a searcher copes with other words of the same question, and their files.

    variations/SPLIT~KIND/manifest.json
    variations/SPLIT~KIND/queries.jsonl     {"_id": …, "text": …}: the queries of SPLIT as they were varied

The kinds are those of Penha et al. (ECIR 2022, "Evaluating the Robustness of Retrieval Pipelines with Query
Variation Generators") that need neither a model, as paraphrases do, nor a dictionary, as synonyms do. A
variation has the judgements of its query. Stop words are the English ones of NLTK, as in the lexical search.
"""

import dataclasses
import functools
import json
import re
import string
import types
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.data.query_folder import checked_file
from retrieval_jax.data.sources import json_objects, lines, tsv

VERB = "vary"
VERSION = 1  # of the rules here, a part of the recipes
MARK = "~"  # between the split and the kind: "test~typo"
ALL = "all"  # as a kind: the split and all of its variations
_FILE = "queries.jsonl"
_LETTERS = 4  # a word that gets a typo has so many at least
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_FIELDS = ("_id", "text")


def vary(text: str, kind: str, query_id: str, seed: int = 0) -> str:
    """Varies a query: a function of its arguments alone.

    Args:
      text: the query.
      kind: one of KINDS.
      query_id: the id of the query, which seeds the draws together with the kind and the seed.
      seed: another one gives another variation.

    Returns:
      The variation; the same text where it has no word that can be varied so.
    """
    rng = np.random.default_rng(int(storage.digest([str(seed), kind, query_id]), 16))
    return KINDS[kind](text, rng)


def add_typo(text: str, rng: np.random.Generator) -> str:
    """Puts one typo into a text, of one of the five kinds in TYPOS, drawn anew.

    Args:
      text: the text.
      rng: draws the kind, the word, the place in it and the letter.

    Returns:
      The text with one word changed; the same text where no word has four letters and is no stop word.
    """
    for kind in rng.permutation(len(TYPOS)):  # the first that some word can have
        if (changed := _edit(text, rng, TYPOS[kind])) != text:
            return changed
    return text


def _edit(text: str, rng: np.random.Generator, kind: str) -> str:
    """Makes an edit of a kind at a random place of a random word that can have it."""
    can, edit = _EDITS[kind]
    words = (match.span() for match in re.finditer(r"\S+", text))
    places = [
        [i for i in range(start, end) if _is_letter(text, i) and can(text, i)]
        for start, end in words
        if sum(map(str.isalpha, text[start:end])) >= _LETTERS and not _is_stop_word(text[start:end])
    ]
    places = [some for some in places if some]
    if not places:
        return text
    of_word = places[rng.integers(len(places))]
    return edit(text, of_word[rng.integers(len(of_word))], rng)


def _is_letter(text: str, i: int) -> bool:
    """Returns whether there is a letter without combining marks, which an edit would give to another one."""
    return text[i].isalpha() and unicodedata.category(text[i + 1 : i + 2] or " ")[0] != "M"


def _can_swap(text: str, i: int) -> bool:
    return i + 1 < len(text) and _is_letter(text, i + 1) and text[i] != text[i + 1]


def _swap(text: str, i: int, rng: np.random.Generator) -> str:
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def _slip(text: str, i: int, rng: np.random.Generator) -> str:
    """Types a key beside the right one."""
    return _replaced(text, i, _beside()[text[i].lower()], rng)


def _substitute(text: str, i: int, rng: np.random.Generator) -> str:
    return _replaced(text, i, string.ascii_lowercase.replace(text[i].lower(), ""), rng)


def _replaced(text: str, i: int, letters: Sequence[str], rng: np.random.Generator) -> str:
    letter = letters[rng.integers(len(letters))]
    return text[:i] + (letter.upper() if text[i].isupper() else letter) + text[i + 1 :]


def _insert(text: str, i: int, rng: np.random.Generator) -> str:
    return text[:i] + string.ascii_lowercase[rng.integers(26)] + text[i:]


def _delete(text: str, i: int, rng: np.random.Generator) -> str:
    return text[:i] + text[i + 1 :]


@functools.cache
def _beside() -> Mapping[str, str]:
    """Gives the letters beside each letter on a QWERTY keyboard: each row is half a key further right."""
    places = {letter: (x + y / 2, y) for y, row in enumerate(_ROWS) for x, letter in enumerate(row)}
    return {
        letter: "".join(o for o, (p, q) in places.items() if 0 < max(abs(p - x), abs(q - y)) <= 1)
        for letter, (x, y) in places.items()
    }


def _always(text: str, i: int) -> bool:
    return True


def _on_keyboard(text: str, i: int) -> bool:
    return text[i].lower() in _beside()


# Kind -> (whether a letter of a text can be edited so, the edit of that letter).
_EDITS = {
    "swap": (_can_swap, _swap),
    "qwerty": (_on_keyboard, _slip),
    "substitute": (_always, _substitute),
    "insert": (_always, _insert),
    "delete": (_always, _delete),
}
TYPOS = tuple(_EDITS)


@functools.cache
def _stop_words() -> frozenset[str]:
    from bm25s import stopwords  # slow to import, and only variations need it

    return frozenset(stopwords.STOPWORDS_EN_PLUS)


def _is_stop_word(word: str) -> bool:
    return word.lower().replace("’", "'").strip(string.punctuation + "“”‘…¿¡") in _stop_words()


def _without_stop_words(text: str, rng: np.random.Generator) -> str:
    """Leaves out the stop words, unless there is nothing else."""
    words = text.split()
    kept = [word for word in words if not _is_stop_word(word)]
    return " ".join(kept) if 0 < len(kept) < len(words) else text


def _drop_words(text: str, rng: np.random.Generator) -> str:
    """Leaves out a fifth of the words, at least one, unless there is only one."""
    words = text.split()
    if len(words) < 2:
        return text
    count = max(1, (len(words) + 2) // 5)  # the nearest to a fifth
    dropped = {*rng.choice(len(words), count, replace=False).tolist()}
    return " ".join(word for i, word in enumerate(words) if i not in dropped)


def _shuffle(text: str, rng: np.random.Generator) -> str:
    """Puts the words into another order, where they have one."""
    words = text.split()
    if len({*words}) < 2:
        return text
    order = words
    while order == words:
        order = [words[i] for i in rng.permutation(len(words))]
    return " ".join(order)


KINDS: Mapping[str, Callable[[str, np.random.Generator], str]] = types.MappingProxyType(
    {
        "typo": add_typo,
        **{kind: functools.partial(_edit, kind=kind) for kind in TYPOS},
        "no_stop_words": _without_stop_words,
        "drop_words": _drop_words,
        "shuffle": _shuffle,
    }
)
"""Kind -> the function of a text and a generator."""


def split_queries(work: Workspace, collection: Collection, split: str) -> list[Query]:
    """Reads the judged queries of a split of the collection, or of a variation of one.

    Args:
      work: the work folder.
      collection: its collection.
      split: as "test", or "test~typo".

    Raises:
      UserError: there is no such split or variation, or it was made for another collection.
    """
    base, mark, kind = split.partition(MARK)
    queries = collection.queries(base)
    if not mark:
        return queries
    folder = work.variation(base, kind)
    manifest = storage.read_manifest(folder, VERB)
    recipe, checksum = manifest["recipe"], manifest["fingerprint"]
    texts = read_texts(checked_file(folder / _FILE, VERB, recipe, collection, base, checksum))
    return [dataclasses.replace(query, text=texts[query.id]) for query in queries]


def fingerprint(work: Workspace, split: str) -> str | None:
    """Returns the checksum of a variation's queries; None for a split of the collection itself."""
    base, mark, kind = split.partition(MARK)
    if not mark:
        return None
    folder = work.variation(base, kind)
    return storage.read_manifest(folder, VERB)["fingerprint"] if storage.finished(folder) else ""


def names(work: Workspace) -> list[str]:
    """Returns the names of the splits that were made by variation."""
    return [path.name for path in storage.finished_folders(work.folder / "variations", f"*{MARK}*")]


def expand(work: Workspace, split: str) -> list[str]:
    """Returns the splits that a name stands for: itself, or of "test~all" test and its variations.

    Raises:
      UserError: the split has no variations.
    """
    base, _, kind = split.partition(MARK)
    if kind != ALL:
        return [split]
    if not (varied := of_split(work, base)):
        raise UserError(
            f"{work.folder}/variations: none of split {base!r}: make them with `retrieval-jax {VERB} "
            f"--SPLIT={base}`"
        )
    return [base, *varied]


def base(split: str) -> str:
    """Returns the split of the collection that a split is a variation of, or the split itself."""
    return split.partition(MARK)[0]


def check_single(split: str, setting: str) -> None:
    """Raises UserError if a name stands for a split and all of its variations, as "test~all"."""
    base, _, kind = split.partition(MARK)
    if kind == ALL:
        raise UserError(f"{setting}: {split}: several splits, for `search` alone: name one, as {base}")


def of_split(work: Workspace, split: str) -> list[str]:
    """Returns the names of the variations of a split."""
    return [name for name in names(work) if name.startswith(f"{split}{MARK}")]


def write(folder: Path, queries: Sequence[Query], texts: Iterable[str]) -> dict[str, object]:
    """Writes a variation of queries into a new folder.

    Args:
      folder: a local folder.
      queries: the queries.
      texts: what each of them becomes.

    Returns:
      The facts for the folder's manifest.
    """
    path, changed = folder / _FILE, 0
    with path.open("w", encoding="utf-8") as file:
        for query, text in zip(queries, texts, strict=True):
            file.write(json.dumps({"_id": query.id, "text": text}, ensure_ascii=False) + "\n")
            changed += text != query.text
    return {"fingerprint": storage.checksum(path), "queries": len(queries), "changed": changed}


def read_texts(path: Path) -> dict[str, str]:
    """Reads a file of queries: `id⇥text` by line, or JSON lines as BEIR has them (.jsonl); each may be .gz.

    Returns:
      Query id -> text.

    Raises:
      UserError: the file cannot be read, or a line of it is bad.
    """
    path, errors = paths.ensure_local(path), lines.ErrorLog()
    table = tsv.Table.from_file(path, _FIELDS)

    def parse(line: str) -> list[str]:
        if ".jsonl" not in path.suffixes[-2:]:
            return table(line)
        record = json_objects.json_object(line, _FIELDS)
        return [json_objects.json_id(record.get("_id")), json_objects.string(record, "text", _FIELDS)]

    found: dict[str, str] = {}
    for line, (query_id, text) in lines.parse_lines(path, parse, errors, table.header):
        if query_id in found:
            raise UserError(
                lines.format_error(path, line, f"the query {query_id!r} again", "keep one line of it")
            )
        found[query_id] = text
    if errors.counts:
        raise UserError(str(next(iter(errors.first.values()))[0]))
    return found
