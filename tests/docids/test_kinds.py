"""A docid kind that is defined outside the package works for every verb; names are those of the registry."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tables import docids_of

from retrieval_jax.core import configuration
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.trec import read_run
from retrieval_jax.data.vocabulary import EOS
from retrieval_jax.docids import kinds
from retrieval_jax.docids.kinds import (
    DocidKind,
    DocidRequest,
    DocidResult,
    docid_kind,
    kind_names,
    register_docid_kind,
)
from retrieval_jax.docids.residual import Residual
from retrieval_jax.docids.search_strategies import SoftmaxSearch, TrieSearch
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.mesh.partitioning import make_mesh
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.verbs.preflight import configured

README = Path(kinds.__file__).parent / "README.md"
(REVERSED_DIGITS,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[DocidKind]]:
    """A copy of the registry, so that the kinds of a test are not those of the next."""
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    return kinds._KINDS


@pytest.fixture
def reversed_digits(registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gin file that imports a module of somebody's own, and chooses the docid kind in it."""
    (tmp_path / "my_docids.py").write_text(REVERSED_DIGITS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_docids", raising=False)
    (tmp_path / "reversed_digits.gin").write_text("import my_docids\nDOCIDS = 'reversed_digits'\n")
    return tmp_path / "reversed_digits.gin"


def test_a_kind_of_ones_own_is_made_trained_indexed_searched_and_planned(
    reversed_digits: Path, cli, arguments: list[str], work, collection
):
    files = ["--gin_file=runs/naive.gin", f"--gin_file={reversed_digits}"]
    tiny = ["T5Config.emb_dim=16", "T5Config.mlp_dim=16", "T5Config.num_heads=1", "T5Config.head_dim=8"]
    given = [*files, *arguments, *(f"--gin.{binding}" for binding in tiny), "--STEPS=2"]

    def verb(name: str, *more: str) -> dict:
        status, made, err = cli(name, *given, *more)
        assert status == 0, err
        return made

    made, count = verb("docids"), collection.passage_count
    table = DocidTable.open(made["docids"])
    digits = len(str(count - 1))
    expected = [(*(2 + int(digit) for digit in f"{row:0{digits}}"[::-1]), EOS) for row in range(count)]
    assert list(docids_of(table).values()) == expected
    assert (table.kind, table.search, table.output_size) == ("reversed_digits", "trie", 128)

    model = f"--gin.MODEL_DIR='{verb('train')['model']}'"
    searcher = verb("index", model)["searcher"]
    run = read_run(Path(verb("search", "--gin.SEARCHER='reversed_digits'", "--K=10")["run"]))
    assert all(len(ranking) == 10 for ranking in run.values())
    # As many beams as passages find them all: the search is along this kind's trie.
    everything = Searcher.open(searcher)
    assert everything.strategy is TrieSearch
    everything.beams = count
    ((*ranking,),) = everything.search(["smooth a noisy signal"], count)
    assert {passage for passage, _ in ranking} == set(collection.ids.to_pylist())

    configuration.configure([file.split("=")[1] for file in files], [*tiny, "DataConfig.input_length=12"])
    assumed = configured(search=True, passages=100_000, vocab_size=1024)
    assert assumed.facts["docids"] == "reversed_digits, 6 tokens, 128 outputs (assumed)"
    program = assumed.program(make_mesh())
    assert program.memory["docids"].length == 6
    assert program.loop_trips == 5

    with pytest.raises(UserError, match="EXTENDS: reversed_digits docids cannot be extended: leave it out"):
        docid_kind("reversed_digits").extend(None)
    status, _, err = cli("docids", *given, "--DOCIDS=magic")
    assert status == 2
    assert "no kind 'magic': choose one of atomic, naive, naive_digits" in err
    assert "reversed_digits" in err


def test_names_find_their_kinds():
    assert [docid_kind(name).name for name in ("naive", "semantic_2d")] == ["naive", "semantic_2d"]
    residual = docid_kind("rq_8x256")
    assert isinstance(residual, Residual)
    assert (residual.name, residual.levels, residual.size) == ("rq_8x256", 8, 256)
    for name in ("rq_8x1", "rq_0x8", "rq_LxV", "naiv", "naive2", "", None):
        with pytest.raises(UserError, match=r"choose one of atomic, naive, naive_digits, .*rq_LxV"):
            docid_kind(name)
    assert kinds.KIND.names() == kind_names()
    assert kinds.KIND.holds("rq_32x256")
    assert not kinds.KIND.holds("rq_8")


def test_atomic_docids_alone_are_found_in_one_step():
    softmax = [name for name in kind_names() if kinds._KINDS[name].search is SoftmaxSearch]
    assert softmax == ["atomic"]


def test_a_kind_may_be_registered_again(registry):
    mine = {"name": "mine", "build": lambda *_: None, "shape": lambda *_: None}
    first, second = (type("Kind", (DocidKind,), mine) for _ in range(2))
    register_docid_kind(first)
    assert type(docid_kind("mine")) is first
    register_docid_kind(second)
    assert type(docid_kind("mine")) is second
    assert kind_names().count("mine") == 1
    with pytest.raises(ValueError, match=r"Kind is the docid kind 'mine'"):
        register_docid_kind(type("Other", (DocidKind,), mine))
    with pytest.raises(TypeError, match="Half: a docid kind needs build, shape"):
        register_docid_kind(type("Half", (DocidKind,), {"name": "half"}))
    assert "half" not in kind_names()


def test_digits_that_numbers_need():
    for base in (2, 10):
        expected = [len(np.base_repr(highest, base)) for highest in range(1, 300)]
        assert [kinds.digits_needed(highest, base) for highest in range(1, 300)] == expected
    assert kinds.digits_needed(0, 10) == 0


@pytest.fixture
def make_as(registry, cli, arguments):
    """`make_as(name, build, …)` runs the verb on a kind of that `build`."""

    def make(name: str, build: Callable[[DocidRequest], DocidResult], *more: str) -> tuple[int, dict, str]:
        own = {"name": name, "build": lambda _, request: build(request), "shape": lambda *_: None}
        register_docid_kind(type(name, (DocidKind,), own))
        return cli("docids", *arguments, f"--DOCIDS={name}", *more)

    return make


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda r: DocidResult(np.full((len(r.rows), 1), -1)), "[-1], docid of passage"),
        (
            lambda r: DocidResult(r.rows[:3, None] + 1),
            "3 rows of tokens for COUNT passages: build gives one",
        ),
        (
            lambda r: DocidResult(r.rows + 1),
            "tokens of shape (COUNT,): build gives passages × length",
        ),
        (lambda r: DocidResult(r.rows[:, None] + 1.0), "tokens are float64: give whole numbers"),
        (
            lambda r: DocidResult(r.rows[:, None] + 1, facts={"mine": 1, "length": 77, "kind": "z"}),
            "facts kind, length: the manifest has entries of these names: choose others",
        ),
    ],
)
def test_docids_that_no_table_can_hold_are_one_line(make_as, work, collection, build, message: str):
    status, _, err = make_as("faulty", build)
    assert status == 2
    assert f"docids/faulty: {message.replace('COUNT', str(collection.passage_count))}" in err
    assert not work.docids("faulty").exists()


def test_docids_at_random_are_made_again_with_another_seed(make_as, work):
    def shuffled(request: DocidRequest) -> DocidResult:
        return DocidResult(1 + np.random.default_rng(request.seed).permutation(len(request.rows))[:, None])

    def tokens(seed: int) -> list[int]:
        assert make_as("shuffled", shuffled, f"--SEED={seed}")[0] == 0
        return DocidTable.open(work.docids("shuffled")).tokens_NxL[:, 0].tolist()

    first, second = tokens(1), tokens(2)
    assert second == (1 + np.random.default_rng(2).permutation(len(first))).tolist() != first
    unseeded = [name for name in kind_names() if not kinds._KINDS[name].uses_seed]
    assert unseeded == ["atomic", "naive", "naive_digits", "file"]
