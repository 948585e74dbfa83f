"""The embedded collection `python_docs`: API documentation of the Python packages that the install brings.

Every docstring gives one pair: its summary line is a query, and the rest of it the relevant passage. So there
is a real collection, written by people, on every machine and without a download. Sources are read with `ast`,
and packages are never imported; the same versions of the packages always give the same collection.
"""

import ast
import collections
import dataclasses
import hashlib
import importlib.util
import inspect
import itertools
import math
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Passage, Query

# What the install requires, directly or not; no development tools, or having them would change the result.
# fmt: off
PACKAGES = (
    "PIL", "absl", "attr", "bm25s", "clu", "contourpy", "dateutil", "einops", "etils", "flax", "fontTools",
    "fsspec", "gin", "grpc", "h5py", "humanize", "ir_measures", "jax", "keras", "markdown", "markdown_it",
    "matplotlib", "ml_collections", "mpl_toolkits", "numpy", "opt_einsum", "optax", "optree", "orbax",
    "packaging", "pasta", "prometheus_client", "psutil", "pyarrow", "pyglove", "pygments", "pyparsing",
    "requests", "rich", "safetensors", "scann", "scipy", "sentencepiece", "seqio", "simple_parsing",
    "simplejson", "tensorboard", "tensorflow", "tensorflow_datasets", "tensorflow_text", "tqdm", "treescope",
    "urllib3", "werkzeug", "wrapt", "yaml",
)
# fmt: on
MAX_SHARE = 0.2  # of the collection, for any one package: tensorflow alone could fill it.
MAX_CHARS = 2000
MIN_WORDS = 25

Pair = tuple[str, Passage]  # A query and its only relevant passage.

# Tests, copies of other packages, and trees that are generated or repeat the public API of another tree.
_SKIPPED_DIRS = re.compile(
    r"(_?tests?|_?testing|_?vendor(ed)?|_?extern(als?)?|third_party|examples|benchmarks)$"
)
_SKIPPED_TREES = {"keras/api", "keras/_tf_keras", "scipy/_lib", "tensorflow/_api", "tensorflow/python/keras"}
_SKIPPED_FILES = re.compile(r"(test_.*|gen_.*|conftest|setup|.*_(tests?|pb2|pb2_grpc|generated))\.py$")

_UNDERLINE = re.compile(r"""^\s*([-=~^"#*+])\1{2,}\s*$""")
_NOISE = re.compile(r"(\|.*\||: .*:|[-=+~ |:^*]{3,}|@@?\w+(\(\w+\))?|:r?type\b.*:.*)$")
_BLOCK = re.compile(r">>>|=+ +=")  # The first line of a doctest or of a table; a blank line ends both.
_NO_PROSE = re.compile(r"(see also|references|(code )?examples?|usages?|(example )?usage):?$", re.I)
_DROPPED = re.compile(rf"\.\.( |$)|{_NO_PROSE.pattern}", re.I)  # A line and the block indented below it.
_ITEM = re.compile(r"([-*+•] |\d+[.)] |[\w*`]+( \([^()]*\))?: |[A-Z][\w ]*:$)")
_ANNOUNCEMENT = re.compile(r"(?:^|(?<=[.!?:] ))(?:(?![.!?:] ).)*:$")  # "...:" before an example.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!k\.a\.)(?<! al\.)(?<! vs\.) (?=[A-Z])")
_ADMONITION = r"^( *)\.\. (note|warning|tip|hint|important|caution|attention)::"
_FIELD = r"^( *):(param|parameter|arg|key|keyword|raises?|returns?|yields?|[ci]?var)\b ?([^:`\n]*):(?!`) *"
_LINE_MARKUP = (  # Headings, admonitions, fields and NumPy's `x : type` -> `Name:`, as in Google's style.
    (re.compile(r"^#+ (.+?)[#: ]*$", re.M), r"\1:"),
    (re.compile(_ADMONITION, re.M | re.I), lambda match: f"{match[1]}{match[2].capitalize()}:"),
    (re.compile(_FIELD, re.M), lambda match: f"{match[1]}{match[3] or match[2].capitalize()}: "),
    (re.compile(r"^( *\*{0,2}\w[\w.*, ]*) : (?!.*\. )(\S.{,60}[^.:\n])$", re.M), r"\1 (\2):"),
)
_INLINE_MARKUP = (  # -> plain text, in this order.
    (re.compile(r"^[-*+•] ", re.M), ""),
    (re.compile(r"(?<=`)\\ ?(?=\w)"), ""),
    (re.compile(r"(?<!`)`(~\.?|\.(?=[A-Z]|\w+\.))"), "`"),
    (re.compile(r"<!--.*?-->|</?(a|b|br|code|div|em|h\d|i|img|li|ol|p|pre|span|strong|ul)\b[^<>]*>"), ""),
    (re.compile(r":[\w:+-]+:`[~!]?([^`\n]*?)\s*(?:<[^`<>\n]*>)?`"), r"\1"),
    (re.compile(r"`([^`<\n]+?)\s*<[^`\n]*>`__?"), r"\1"),
    (re.compile(r"!?\[([^\[\]\n]+)\] ?\(\s*(?:https?:|[./#])[^()\s]*\s*\)"), r"\1"),
    (re.compile(r" ?\[[\w.+-]+\]_"), ""),
    (re.compile(r"``?([^`\n]+)``?_{0,2}"), r"\1"),
    (re.compile(r"(?<![\w*])(\*\*?)([A-Za-z]|[A-Za-z][^*\n]*?[\w.:?!)])\1(?![\w*])"), r"\2"),
    (re.compile(r"(?<!\w)_([A-Z][^_\n]*)_(?!\w)|\b([A-Z][a-zA-Z]+)_(?!\w)"), r"\1\2"),
    (re.compile(r"\\([*_`|\\ ])"), r"\1"),
    (re.compile(r"(?:[^\S\n]|`)+"), " "),
    (re.compile(r" ([.,;:])(?= |$)", re.M), r"\1"),
)
_POOR_QUERY = re.compile(  # Templates, pointers to other documentation, signatures, cut sentences.
    r"^(jax implementation of|lax-backend|see |refer to|alias |todo|base class|copyright|same as|override"
    r"|this (class|module|function) (is|was) |inherit|internal )"
    r"|->|>>>|[{}\\|=$<>@]|%\(|https?:|deprecated|\bself\b(?!-)|(e\.g|i\.e|such as)$",
    re.I,
)
_POOR_TEXT = re.compile(r"copyright|licensed under|%\(|\{\w+\}|^(deprecated|see base class)", re.I)


def _modules(package: str) -> Iterator[tuple[str, str]]:
    """Yields (dotted name, source path) of a package's modules, in any order, without importing it."""
    spec = importlib.util.find_spec(package)
    for root in (spec and spec.submodule_search_locations) or ():
        for folder, subfolders, files in os.walk(root):
            here = "/".join([package, *pathlib.Path(folder).relative_to(root).parts])
            subfolders[:] = (
                s for s in subfolders if not _SKIPPED_DIRS.match(s) and f"{here}/{s}" not in _SKIPPED_TREES
            )
            for file in files:
                if file.endswith(".py") and not _SKIPPED_FILES.match(file):
                    name = f"{here}/{file}".removesuffix(".py").removesuffix("/__init__")
                    yield name.replace("/", "."), os.path.join(folder, file)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yields (qualified name, docstring) of a node and of the public API inside it (not inside functions)."""
    if docstring := ast.get_docstring(node):
        yield name, docstring
    for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
        is_api = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_api and not child.name.startswith("_"):
            yield from _docstrings(child, f"{name}.{child.name}")


def _package_docstrings(package: str) -> Iterator[tuple[str, str]]:
    """Yields (passage id, docstring); private modules hold public API, but have no part in its id."""
    for module, path in _modules(package):
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Invalid escapes in other people's docstrings.
            try:
                tree = ast.parse(file.read())
            except (SyntaxError, ValueError):  # Templates, and sources for another Python.
                continue
        public = ".".join(part for part in module.split(".") if not part.startswith("_"))
        # A private module's own docstring would stand under the name of its parent.
        yield from (pair for pair in _docstrings(tree, public) if pair[0] != public or public == module)


def _replace(markup: Sequence[tuple[re.Pattern, str | Callable]], text: str) -> str:
    for pattern, replacement in markup:
        text = pattern.sub(replacement, text)
    return text


def _prose_lines(docstring: str) -> Iterator[tuple[int, str | None]]:
    """(indent, text) of each line; None for the text of code, directives, tables and lists of references."""
    lines = _replace(_LINE_MARKUP, inspect.cleandoc(docstring)).splitlines()
    deeper_than = math.inf  # Lines with a larger indent belong to a block to drop.
    in_block = in_fence = in_dropped_section = False
    for line, following in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        text, indent, is_fence = line.strip(), len(line) - len(line.lstrip()), line.count("```") % 2 == 1
        if text and _UNDERLINE.match(following):
            in_dropped_section, text = bool(_NO_PROSE.match(text)), f"{text}:"
        if text and indent <= deeper_than:
            deeper_than = math.inf
        in_block = bool(_BLOCK.match(text) or (in_block and text))
        in_fence ^= is_fence
        if in_dropped_section or in_block or in_fence or is_fence or indent > deeper_than:
            yield indent, None
        elif _DROPPED.match(text):
            deeper_than = indent
            yield indent, None
        elif not _UNDERLINE.match(line):
            if text.endswith("::"):  # The indented block below is code.
                deeper_than, text = indent, text.rstrip(": ") + ":"
            yield indent, None if _NOISE.match(text) else text


def _paragraphs(docstring: str) -> list[str]:
    """Paragraphs and list items of a docstring as plain text, each with a punctuation mark at its end."""
    paragraphs, is_new, previous = [], True, 0
    for indent, text in _prose_lines(docstring):
        if text is None and paragraphs:
            without = _ANNOUNCEMENT.sub("", paragraphs[-1]).strip()
            paragraphs[-1] = without or (paragraphs[0] if len(paragraphs) == 1 else "")
        if text and (is_new or indent < previous or _ITEM.match(text)):
            paragraphs.append(text)
        elif text:
            paragraphs[-1] += f" {text}"
        is_new, previous = not text, indent
    plain = map(str.strip, _replace(_INLINE_MARKUP, "\n".join(paragraphs)).split("\n"))
    return [text if text.rstrip(")\"'")[-1:] in {*".:;,!?"} else f"{text}." for text in plain if text]


def _shorten(text: str) -> str:
    """At most MAX_CHARS characters, cut after a sentence where there is one, else between words."""
    head = text[:MAX_CHARS]
    end = head.rfind(". ", MAX_CHARS // 2) + 1 or head.rfind(" ")
    return text if text == head else head[:end]


def split_docstring(docstring: str) -> tuple[str, str]:
    """Splits a docstring into (summary sentence, text of the passage), both plain text."""
    summary, *body = _paragraphs(docstring) or [""]
    summary, *rest = _SENTENCE_END.split(summary, maxsplit=1)
    return summary.rstrip(".:;, "), _shorten(" ".join(rest + body))


def _normalise(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _is_good(query: str, passage: Passage) -> bool:
    """Returns whether a person would accept the pair: a meaningful query, and a passage of English prose."""
    return (
        4 <= len(query.split()) <= 40
        and len(passage.text.split()) >= MIN_WORDS
        and query.isascii()
        and not _POOR_QUERY.search(query)
        and not _POOR_TEXT.search(passage.text)
        and len(re.sub(r"[^a-zA-Z ]+", "", passage.text)) > 0.85 * len(passage.text)
        and _normalise(query) not in _normalise(passage.full_text)
    )


def _package_pairs(package: str) -> Iterator[Pair]:
    for name, docstring in _package_docstrings(package):
        if len(docstring.split()) >= MIN_WORDS:  # Few have: this saves most of the cleaning.
            query, text = split_docstring(docstring)
            passage = Passage(name, title=".".join(name.split(".")[-2:]), text=text)
            if _is_good(query, passage):
                yield query, passage


def _distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Pairs whose id and text (its first 200 characters) are new and whose query belongs to them alone."""
    seen, kept = set(), []
    for query, passage in sorted(pairs, key=lambda pair: (pair[1].id, pair[0], pair[1].text)):
        keys = {passage.id, _normalise(passage.text)[:200]}
        if not keys & seen:
            kept.append((query, passage))
            seen |= keys
    counts = collections.Counter(_normalise(query) for query, _ in kept)
    return [(query, passage) for query, passage in kept if counts[_normalise(query)] == 1]


def _sample(pairs: Sequence[Pair], size: int, seed: int) -> list[Pair]:
    """`size` pairs by a stable hash; no package has more than its share."""
    packages = {passage.id.partition(".")[0] for _, passage in pairs}
    limit = math.ceil(size * max(MAX_SHARE, 1 / len(packages)))  # Of few packages each has an equal share.
    ranked = sorted(pairs, key=lambda pair: hashlib.sha256(f"{seed}:{pair[1].id}".encode()).digest())
    taken, chosen = collections.Counter(), []
    for query, passage in ranked:
        taken[package := passage.id.partition(".")[0]] += 1
        if taken[package] <= limit:
            chosen.append((query, passage))
    return chosen[:size]


def _short_ids(pairs: Sequence[Pair]) -> list[Pair]:
    """Names a passage by package and title where no other has that name: shorter docids to write.

    `keras.src.utils.io_utils.enable_interactive_logging` is `keras.io_utils.enable_interactive_logging`.
    """
    short = [f"{p.id.partition('.')[0]}.{p.title}" if p.id.count(".") > 1 else p.id for _, p in pairs]
    counts = collections.Counter(short)
    named = [
        (query, dataclasses.replace(passage, id=name if counts[name] == 1 else passage.id))
        for (query, passage), name in zip(pairs, short, strict=True)
    ]
    return sorted(named, key=lambda pair: pair[1].id)


def python_docs(size: int = 5000, seed: int = 0, packages=PACKAGES) -> tuple[list[Passage], list[Query]]:
    """Returns up to `size` passages, ordered by id, and one query for each, which has the passage's id.

    Args:
      size: the most passages.
      seed: the seed by which pairs are chosen if there are more.
      packages: the packages to read. Those that are not installed are skipped.

    Raises:
      UserError: no documentation was found.
    """
    pairs = _distinct(pair for package in packages for pair in _package_pairs(package))
    if not pairs:
        raise UserError("python_docs: no documented sources found; pass `packages` that are installed")
    chosen = _short_ids(_sample(pairs, size, seed))
    return [p for _, p in chosen], [Query(p.id, query, {p.id: 1}) for query, p in chosen]
