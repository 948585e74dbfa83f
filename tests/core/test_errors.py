"""The command line ends with one line and the status of each exception that is meant for its user."""

import sys
import types

import pytest

from retrieval_jax.core.errors import Diverged, Preempted, UserError, first_line
from retrieval_jax.main import VERBS, main


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("file.tsv:3: wrong: the remedy"), 2),
        (Diverged("step 5: the loss is nan: lower it"), 3),
        (Preempted("step 5 of 9 is saved"), 143),
    ],
)
def test_an_error_is_one_line_and_its_status(error: Exception, status: int, monkeypatch, capsys):
    def verb() -> None:
        raise error

    monkeypatch.setitem(sys.modules, "verb_that_fails", types.SimpleNamespace(verb=verb))
    monkeypatch.setitem(VERBS, "search", ("verb_that_fails", "verb"))
    monkeypatch.setattr("retrieval_jax.main.parse", lambda argv: ("search", [], [], False))
    assert main(["search"]) == status
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == [f"retrieval-jax: {error}"]


def test_any_other_error_keeps_its_traceback(monkeypatch):
    def verb() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setitem(sys.modules, "verb_that_fails", types.SimpleNamespace(verb=verb))
    monkeypatch.setitem(VERBS, "search", ("verb_that_fails", "verb"))
    monkeypatch.setattr("retrieval_jax.main.parse", lambda argv: ("search", [], [], False))
    with pytest.raises(ZeroDivisionError):
        main(["search"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("  bad name\nand a page of advice"), "bad name"),
        (OSError("\nbelow an empty line"), "below an empty line"),
        (OSError(2, "No such file", "a"), "[Errno 2] No such file: 'a'"),
        (ValueError(), "ValueError"),
        (RuntimeError(" \n"), "RuntimeError"),
        (ValueError("x" * 300), "x" * 200),
    ],
)
def test_the_first_line_of_another_librarys_error(error: Exception, line: str):
    assert first_line(error) == line
