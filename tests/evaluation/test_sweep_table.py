"""The table of a sweep: means, marks, and what is left out, on the console and in files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from retrieval_jax.evaluation.significance import compare, compare_collections
from retrieval_jax.evaluation.sweep_table import CollectionValues, SweepTable

RANDOM = np.random.default_rng(0)
LOW, HIGH = RANDOM.random(50) / 2, RANDOM.random(50) / 2 + 0.5
SMALL = RANDOM.random((2, 6))


@pytest.fixture
def table() -> SweepTable:
    collections = [
        CollectionValues("one", "path/one", "test", {"bm25": LOW, "dense": HIGH}),
        CollectionValues("two", "path/two", "test", dict(zip(("bm25", "dense"), SMALL, strict=True))),
        CollectionValues("half", "path/half", "test", {"bm25": SMALL[0]}, errors=["dense: a|b <is> gone"]),
        CollectionValues("deep", "path/deep", "test", {"bm25": LOW, "dense": HIGH}, {"dense"}),
        CollectionValues("none", "path/none", errors=["import: no such folder"]),
    ]
    return SweepTable("nDCG@10", ["bm25", "dense"], "bm25", collections)


def test_the_mean_is_that_of_the_collections_with_all_methods(table: SweepTable):
    facts = json.loads(json.dumps(table.facts()))
    assert facts["mean_of"] == ["one", "two"]
    assert facts["mean"] == pytest.approx(
        {"bm25": (LOW.mean() + SMALL[0].mean()) / 2, "dense": (HIGH.mean() + SMALL[1].mean()) / 2}
    )
    expected = compare_collections([LOW, SMALL[0]], {"dense": [HIGH, SMALL[1]]})["dense"]
    assert facts["mean_differences"] == {"dense": expected.facts()}
    one = facts["collections"]["one"]
    assert one["values"] == pytest.approx({"bm25": LOW.mean(), "dense": HIGH.mean()})
    assert one["differences"] == {"dense": compare(LOW, {"dense": HIGH})["dense"].facts()}
    assert one["differences"]["dense"]["significant"]
    assert (one["queries"], one["errors"], one["source"]) == (50, [], "path/one")
    assert facts["collections"]["deep"]["differences"] == facts["collections"]["none"]["values"] == {}


def test_what_is_printed_is_what_is_written(table: SweepTable, tmp_path: Path):
    low, high, small = f"{LOW.mean():.3f}", f"{HIGH.mean():.3f}", [f"{v:.3f}" for v in SMALL.mean(1)]
    best = [f"**{v}**" if v == max(small) else v for v in small]
    lines = table.markdown().splitlines()
    assert lines[2:7] == [
        f"| one | 50 | {low} | **▲{high}** |",
        f"| two | 6 | {best[0]} | {best[1]} |",
        f"| half | 6 | **{small[0]}** | – |",
        f"| deep | 50 | **{low}** | *{high} |",
        "| none | – | – | – |",
    ]
    notes = "\n".join(table.notes)
    assert "half: failed: dense: a|b <is> gone\nnone: failed: import: no such folder" in notes
    assert "The mean is of the 2 collections that have all methods, each as deep as the measure." in notes
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table.print(console)
    printed = console.export_text()
    assert re.search(rf"^one +50 +{low} +▲{high}$", printed, re.MULTILINE)
    table.write_page(tmp_path / "sweep.html", {"one": "one/report.html"}, {"command": "x"})
    page = (tmp_path / "sweep.html").read_text()
    assert '<a href="one/report.html">one</a>' in page
    assert f"<b>▲{high}</b>" in page
    assert "failed: dense: a|b &lt;is&gt; gone" in page
    assert '<td class="failed" colspan="2"><small>failed: import: no such folder</small></td>' in page


def test_rows_are_added_and_the_mean_is_tested_at_last(table: SweepTable):
    one = SweepTable(table.measure, table.methods, table.baseline, missing=len(table.collections))
    for found in table.collections:
        assert not one.mean or not one.mean.differences
        one.add(found)
    assert one.facts() == table.facts()
    assert one.notes == table.notes


def test_the_best_is_the_largest_number():
    values = {"a": np.array([10.0]), "b": np.array([9.0])}
    (row, _) = SweepTable(
        "NumRel", ["a", "b"], "a", [CollectionValues("one", "one", "test", values)]
    ).all_rows
    assert row.cells(["a", "b"]) == [("10.000", True), ("9.000", False)]


def test_nothing_measured_is_a_table_without_a_mean(tmp_path: Path):
    table = SweepTable("nDCG@10", ["bm25"], "bm25", [CollectionValues("none", "none", errors=["x"])], 3)
    assert table.facts()["mean"] == {}
    assert "The mean" not in table.markdown()
    assert "3 collections are still to come." in table.markdown()
    table.write_page(tmp_path / "sweep.html", {}, {})
