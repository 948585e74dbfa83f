"""What a report shows, from a collection and its runs."""

from importlib import metadata
from pathlib import Path

import pytest
from reading import write

from retrieval_jax.core import storage
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.evaluation import comparison
from retrieval_jax.evaluation.report import MethodRow, PassageSnippet
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
    facts = {"family": "lexical", "summary": {"ms_per_query": 2.5}, "parameters": None}
    assert comparison.method_row("m", {"MRR@10": 0.5}, facts) == MethodRow(
        "m", "lexical", {"MRR@10": 0.5}, 2.5, None
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
