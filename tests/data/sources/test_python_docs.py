"""python_docs on packages written for the test, and once on what is installed."""

import sys
import textwrap

import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.sources import python_docs as module
from retrieval_jax.data.sources.python_docs import python_docs, split_docstring

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "pink", "brown", "grey", "cyan")


def prose(word: str) -> str:
    """A docstring body of enough words, different for every `word`."""
    return f"The {word} comes first. " + " ".join(f"Then the {colour} {word} is read." for colour in COLOURS)


def function(name: str, summary: str, body: str) -> str:
    return f'def {name}():\n    """{summary}\n\n    {body}\n    """\n\n'


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package: package("name", {"folder/file.py": source}) and makes it importable."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, files):
        for path, source in {"__init__.py": "", **files}.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        return name

    return write


def ids(*packages, **options):
    return [passage.id for passage in python_docs(packages=packages, **options)[0]]


def test_pair_of_a_function(package):
    source = function("parse", "Parses a date from text.", prose("calendar"))
    passages, queries = python_docs(packages=[package("fake_pair", {"dates.py": source})])
    (passage,), (query,) = passages, queries
    assert (passage.id, passage.title) == ("fake_pair.dates.parse", "dates.parse")
    assert passage.text == prose("calendar")
    assert (query.id, query.text) == (passage.id, "Parses a date from text")
    assert query.positives == {passage.id: 1}


def test_package_is_not_imported(package):
    source = "raise RuntimeError('imported')\n" + function("parse", "Parses a date from text.", prose("day"))
    name = package("fake_import", {"__init__.py": source})
    assert ids(name) == ["fake_import.parse"]
    assert name not in sys.modules


def test_private_names_are_skipped_but_not_public_names_in_private_modules(package):
    inner = function("inner", "Defined in a function body.", prose("inner"))
    methods = function("sort", "Sorts the rows by key.", prose("key")) + function(
        "__len__", "Counts rows of the table.", prose("count")
    )
    source = (
        f'"""Docstring of a private module.\n\n{prose("module")}\n"""\n'
        + function("public", "Reads a file from disk.", prose("file"))
        + function("_private", "Writes a file to disk.", prose("disk"))
        + f"def outer():\n{textwrap.indent(inner, '    ')}\n"
        + f"class Table:\n{textwrap.indent(methods, '    ')}\n"
        + f"class _Table:\n{textwrap.indent(methods, '    ')}\n"
    )
    name = package("fake_private", {"_impl/_files.py": source})
    assert ids(name) == ["fake_private.Table.sort", "fake_private.public"]


def test_tests_vendored_copies_and_broken_files_are_skipped(package):
    source = function("parse", "Parses a date from text.", prose("skipped"))
    skipped = [
        "tests/a.py",
        "_vendor/a.py",
        "testing/a.py",
        "test_a.py",
        "a_test.py",
        "a_pb2.py",
        "conftest.py",
    ]
    files = dict.fromkeys(skipped, source) | {"broken.py": "def broken(:\n", "contest.py": source}
    assert ids(package("fake_skip", files)) == ["fake_skip.contest.parse"]


@pytest.mark.parametrize("repeated", ["Parses a date\n    from TEXT.", "parses a `date` from text:"])
def test_summary_never_inside_its_passage(package, repeated):
    body = f"{prose('night')} As said, it {repeated}"
    source = function("bad", "Parses a date from text.", body) + function("good", "Says a date aloud.", body)
    assert ids(package("fake_leak", {"a.py": source})) == ["fake_leak.a.good"]


def test_equal_texts_are_kept_once_and_repeated_queries_dropped(package):
    source = (
        function("a", "Parses a date from text.", prose("same"))
        + function("b", "Reads one day from strings.", prose("same") + " Only the end differs.")
        + function("c", "Gives back the object itself.", prose("one"))
        + function("d", "Gives back the OBJECT itself", prose("two"))
    )
    assert ids(package("fake_twice", {"m.py": source})) == ["fake_twice.m.a"]


@pytest.mark.parametrize(
    ("summary", "body"),
    [
        ("Parses dates.", prose("short")),  # The query is too short,
        ("JAX implementation of :func:`numpy.date`.", prose("template")),  # a template,
        ("parse(text, strict=True) -> date or None", prose("signature")),  # a signature.
        ("Parses a date from text.", "It raises ValueError."),  # The passage is too short,
        ("Parses a date from text.", "1 + 2 = 3; " * 40),  # not prose,
        ("Parses a date from text.", prose("%(name)s")),  # a template.
    ],
)
def test_poor_pairs_are_dropped(package, summary, body):
    good = function("good", "Says a date aloud.", prose("good"))
    name = package("fake_poor", {"m.py": good + function("poor", summary, body)})
    assert ids(name) == ["fake_poor.m.good"]


def test_same_result_in_any_file_order_and_another_one_for_another_seed(package, monkeypatch):
    files = {f"m{i}.py": function("f", f"Opens the file number {i}.", prose(f"number{i}")) for i in range(20)}
    name = package("fake_order", files)
    first = python_docs(size=5, packages=[name])
    walk = module.os.walk
    monkeypatch.setattr(module.os, "walk", lambda root: ((d, s, files[::-1]) for d, s, files in walk(root)))
    assert python_docs(size=5, packages=[name]) == first
    assert [p.id for p in first[0]] == sorted(p.id for p in first[0])
    assert len(first[0]) == 5
    assert ids(name, size=5, seed=1) != [p.id for p in first[0]]
    assert len(ids(name, size=50)) == 20


def test_no_package_fills_the_collection(package):
    def source(name, n):
        return "".join(
            function(f"f{i}", f"Opens the {name} number {i}.", prose(f"{name}{i}")) for i in range(n)
        )

    names = [package(f"fake_cap{p}", {"m.py": source(f"p{p}", 40 if p == 0 else 5)}) for p in range(6)]
    found = ids(*names, size=20)
    assert sum(i.startswith("fake_cap0.") for i in found) == 4  # A fifth of the size,
    assert len(ids(names[0], size=20)) == 20  # unless there is nothing else.


def test_missing_packages_are_skipped_and_nothing_found_is_an_error(package):
    source = function("parse", "Parses a date from text.", prose("calendar"))
    name = package("fake_there", {"m.py": source})
    assert ids("fake_not_there", name) == ["fake_there.m.parse"]
    with pytest.raises(UserError, match="packages") as error:
        python_docs(packages=["fake_not_there"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        (":func:`numpy.sum` and :class:`~a.b.C`.", "numpy.sum and a.b.C."),
        (":meth:`the title <a.b.c>` or `a link <https://x.y>`_.", "the title or a link."),
        ("``code`` and `name` and **bold** and *it*.", "code and name and bold and it."),
        ("It passes *args and **kwargs on.", "It passes *args and **kwargs on."),
        ("As [the paper](https://x.y/z) and [1]_ say.", "As the paper and say."),
        ("An `~.axes.Axes` or `.Figure`.", "An axes.Axes or Figure."),
        ("Old.\n\n.. versionadded:: 1.2\n   With x.\n\nNew.", "Old. New."),
        ("Old.\n\n.. note:: Slow.\n\nNew.", "Old. Note: Slow. New."),
        ("Old.\n\n>>> f(1)\n2\n\nNew.", "Old. New."),
        ("Old.\n\nFor example::\n\n    f(1)\n\nNew.", "Old. New."),
        ("Old.\n\n```python\nf(1)\n```\n\nNew.", "Old. New."),
        ("Old.\n\n====  ====\na     b\n====  ====\n\nNew.", "Old. New."),
        ("Old\n\n* one\n* two\n  lines", "Old. one. two lines."),
        (
            "Parameters\n----------\nx : int, optional\n    A number.",
            "Parameters: x (int, optional): A number.",
        ),
        ("Args:\n  x: A number\n    of rows.\n  y: More.", "Args: x: A number of rows. y: More."),
        (":param x: A number.\n:rtype: int\n:returns: More.", "x: A number. Returns: More."),
        ("Old.\n\nSee Also\n--------\ng : Other.\n\nNotes\n-----\nNew.", "Old. Notes: New."),
        ("Old.\n\nReferences:\n  A paper.\n\nNew.", "Old. New."),
        ("#### Heading\n\nNew.", "Heading: New."),
    ],
)
def test_markup_becomes_plain_text(markup, plain):
    assert split_docstring(f"Summary line.\n\n{markup}") == ("Summary line", plain)


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Parses\n   a date. It may fail.\n\nBody.", ("Parses a date", "It may fail. Body.")),
        ("Parses a date, e.g. Monday.\n\nBody.", ("Parses a date, e.g. Monday", "Body.")),
        ("Parses a date.\nArgs:\n  x: A date.", ("Parses a date", "Args: x: A date.")),
        ("Parses a date::\n\n    parse(x)\n\nBody.", ("Parses a date", "Body.")),
        ("", ("", "")),
    ],
)
def test_summary_is_the_first_sentence(docstring, expected):
    assert split_docstring(docstring) == expected


def test_long_text_is_cut_after_a_sentence():
    text = split_docstring("Summary line.\n\n" + "One sentence of words. " * 200)[1]
    assert 1900 < len(text) <= 2000
    assert text.endswith("words.")
    assert split_docstring("Summary line.\n\n" + "word " * 900)[1].endswith(" word")


def test_installed_packages():
    passages, queries = python_docs(size=200, packages=("absl", "optax", "rich", "not_installed"))
    assert len(passages) == len(queries) >= 150
    for passage, query in zip(passages, queries, strict=True):
        assert query.positives == {passage.id: 1}
        assert len(passage.id.split()) == 1
        assert 4 <= len(query.text.split()) <= 40
        assert len(passage.text) <= 2000
        for text in (query.text, passage.full_text):
            assert text == " ".join(text.split())
        assert query.text.lower() not in passage.full_text.lower()


@pytest.mark.slow
def test_whole_collection():
    passages, queries = python_docs()
    assert len(passages) >= 3000
    assert (
        len({passage.id for passage in passages}) == len({query.text for query in queries}) == len(passages)
    )
    packages = [passage.id.partition(".")[0] for passage in passages]
    assert max(map(packages.count, set(packages))) <= 1000
