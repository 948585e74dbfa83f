"""What a report shows, from a collection and its runs."""

from importlib import metadata
from pathlib import Path

import pytest
from reading import write

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.evaluation import comparison
from retrieval_jax.evaluation.method_table import MethodRow
from retrieval_jax.evaluation.metrics import chosen_metrics, evaluate_run
from retrieval_jax.evaluation.report import PassageSnippet
from retrieval_jax.verbs.importing import import_collection

TEXTS = {"d0": "marble " * 60, "d1": "falcon", "d2": "thunder"}


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    folder = tmp_path_factory.mktemp("comparison")
    files = {
        "docs.tsv": "".join(f"{key}\tTitle {key}\t{text}\n" for key, text in TEXTS.items()),
        "queries.test.tsv": "q1\tmarble?\nq2\tfalcon?\n",
        "qrels.test.tsv": "q1\td0\t1\nq1\td1\t2\nq2\td2\t1\n",
    }
    import_collection(str(write(folder / "docs", files)), str(folder / "work"), vocab_size=40)
    return Collection(folder / "work/collection")


@pytest.mark.parametrize("grade", [1, 2])
def test_passages_are_relevant_from_the_grade_on(collection: Collection, grade: int):
    queries = collection.queries("test")
    runs = {"a": {"q1": [("d2", 3.0), ("d1", 2.0), ("d0", 1.0)]}, "b": {"q2": [("elsewhere", 1.0)]}}
    first, second = comparison.compare_queries(collection, queries, runs, grade, 2)

    def snippet(key: str, relevant: bool) -> PassageSnippet:
        return PassageSnippet(key, f"Title {key}", TEXTS[key].strip()[: comparison.SNIPPET], relevant)

    assert first.query == "marble?"
    assert first.relevant == [snippet(key, True) for key in (["d0", "d1"] if grade == 1 else ["d1"])]
    assert first.results == {"a": [snippet("d2", False), snippet("d1", True)], "b": []}
    assert second.relevant == ([snippet("d2", True)] if grade == 1 else [])
    missing = PassageSnippet("elsewhere", "", "not in this collection", False)
    assert second.results == {"a": [], "b": [missing]}


def test_examples_are_the_same_in_every_report(collection: Collection):
    queries = collection.queries("test")
    assert comparison.example_queries(queries, 1) == comparison.example_queries(queries[::-1], 1)
    assert len(comparison.example_queries(queries, 9)) == 2


def test_a_row_says_what_is_known_of_a_run():
    facts = {
        "family": "lexical",
        "summary": {"single_query_ms": 2.5, "queries_per_second": 900.0},
        "parameters": None,
    }
    assert comparison.method_row("m", {"MRR@10": 0.5}, facts) == MethodRow(
        "m", "lexical", {"MRR@10": 0.5}, 2.5, None, 900.0
    )
    assert comparison.method_row("m", {}, None) == MethodRow("m", "other", {}, None, None)


def test_curves_without_points_are_left_out(tmp_path: Path):
    for name, lines in {"b": '{"step": 1, "minutes": 0.5, "loss": 2.0}\n', "a": ""}.items():
        storage.atomic_write(tmp_path / "models" / name / "learning_curve.jsonl", lines.encode())
    (curve,) = comparison.training_curves(Workspace(tmp_path))
    assert (curve.name, [point["loss"] for point in curve.points]) == ("b", [2.0])


def test_the_footer_has_the_installed_versions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comparison, "PACKAGES", (*comparison.PACKAGES, "exists-for-another-system-only"))
    footer = comparison.provenance()
    assert f"jax {metadata.version('jax')}" in footer["versions"]
    assert footer.keys() == {"command", "machine", "versions"}


NAMES = ("nDCG@10", "R@100", "AP", "RR@10")


def test_a_metric_that_looks_further_than_a_run_is_not_compared():
    """The metric without a cut-off looks at the whole of the deepest run; no run can be of more passages."""
    metrics = chosen_metrics(NAMES)
    depths = {"ten": 10, "hundred": 100, "five": 5}
    assert comparison.too_deep(metrics, depths, 1000) == {
        "ten": {"R@100", "AP"},
        "hundred": set(),
        "five": {*NAMES},
    }
    assert comparison.too_deep(metrics, {"ten": 10, "five": 5}, 8) == {"ten": set(), "five": {*NAMES}}
    run = {"q": [("a", 1.0)] * 3, "r": []}
    families = ("lexical", "generative", "planned", "fused")
    ours = [{"family": family, "recipe": {"k": 7}} for family in families]
    depths = [comparison.depth(run, facts) for facts in (None, *ours)]
    assert depths == [3, 7, 3, 3, 3]  # a generative retriever had three beams, a fused one as short lists
    assert comparison.depth({}, None) == 0


def test_differences_are_of_what_both_runs_are_deep_enough_for():
    qrels = {f"q{i}": {f"p{i}": 1} for i in range(12)}
    run = {f"q{i}": [(f"p{i}", 1.0)] for i in range(12)}
    metrics = chosen_metrics([*NAMES, "NumQ", "NumRet"])  # the last two are sums, and are not compared
    values = {
        name: evaluate_run(qrels, found, 1, metrics) for name, found in (("a", run), ("b", {}), ("c", {}))
    }
    without = {"a": frozenset(), "b": frozenset({"R@100"}), "c": frozenset()}
    found = comparison.differences(values, without, "a")
    assert {name: set(of_run) for name, of_run in found.items()} == {"b": {*NAMES} - {"R@100"}, "c": {*NAMES}}
    assert found["b"]["AP"].mean == -1
    assert found["b"]["AP"].p == 2 / 2**12
    assert found["b"]["AP"].p_holm == 2 * found["b"]["AP"].p
    assert found["c"]["R@100"].p_holm == found["c"]["R@100"].p  # b is not compared there
    assert set(comparison.differences(values, without | {"a": {*NAMES}}, "a")["c"]) == set()
    facts = comparison.significance_facts(found, without, "a", 12)
    assert facts["not_comparable"] == {"b": ["R@100"]}
    assert facts["differences"]["b"]["AP"]["p_t_test"] == 0
    shown = comparison.page_comparison(values, found, "a", {})
    assert (shown.metric, shown.query_differences["c"].tolist()) == ("nDCG@10", [-1.0] * 12)
    one = comparison.differences(
        {"a": evaluate_run({"q": {"p": 1}}, {}), "b": evaluate_run({"q": {"p": 1}}, {"q": [("p", 1.0)]})},
        {"a": set(), "b": set()},
        "a",
    )
    assert comparison.significance_facts(one, {}, "a", 1)["differences"]["b"]["MRR@10"]["low"] is None


def test_the_baseline_is_chosen_by_a_rule():
    assert comparison.choose_baseline(["exact", "bm25", "atomic"], None) == "bm25"
    assert comparison.choose_baseline(["exact", "atomic"], None) == "atomic"
    assert comparison.choose_baseline(["exact", "atomic"], "exact") == "exact"
    with pytest.raises(UserError, match=r"evaluate\.baseline: no run 'x': there are exact, atomic"):
        comparison.choose_baseline(["exact", "atomic"], "x")


def test_what_is_found_by_whom():
    """By a count over all sets of methods, of passages from the least grade on, in the first results only."""
    qrels = {"q": {"a": 1, "b": 2, "c": 2, "d": 2}, "r": {"a": 2}}
    runs = {
        "x": {"q": [("b", 3.0), ("a", 2.0), ("c", 1.0)]},
        "y": {"q": [("c", 1.0), ("b", 0.5)], "r": [("a", 1.0)]},
    }
    x, y = frozenset("x"), frozenset("y")
    assert comparison.found_by(qrels, runs, 1, 2) == {x | y: 1, x: 1, y: 2, frozenset(): 1}
    assert comparison.found_by(qrels, runs, 2, 3) == {x | y: 2, y: 1, frozenset(): 1}
