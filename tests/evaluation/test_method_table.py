import io
import re

import pytest
from rich.console import Console

from retrieval_jax.evaluation.method_table import MethodRow, format_count, print_table, table_notes
from retrieval_jax.evaluation.significance import Difference


def row(name, parameters=None, **metrics):
    return MethodRow(name, "lexical", metrics, 1.0, parameters)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "–"),
        (0, "0"),
        (999, "999"),
        (1000, "1.0K"),
        (999_950, "1.0M"),
        (4_213_120, "4.2M"),
        (10**10, "10.0B"),
    ],
)
def test_format_count(number, text):
    assert format_count(number) == text


def test_the_console_table_fits_80_columns_and_takes_names_literally():
    metrics = dict.fromkeys(("MRR@10", "Recall@10", "Recall@100", "Hits@1", "Hits@10", "nDCG@10"), 0.25)
    rows = [
        MethodRow("[red]", "dual encoder", metrics, 12.3, 4_200_000),
        MethodRow("bm25", "lexical", {}, 0.5, None),
    ]
    out = io.StringIO()
    print_table(rows, Console(file=out, width=80, force_terminal=True, color_system=None))
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert text.splitlines()[2].split() == ["[red]", "dual", "encoder", *["0.250"] * 6, "12", "–", "4.2M"]
    assert text.splitlines()[3].split() == ["bm25", "lexical", *["–"] * 6, "0.50", "–", "–"]
    assert "…" not in text


def printed(rows: list[MethodRow], width: int) -> list[str]:
    out = io.StringIO()
    print_table(rows, Console(file=out, width=width, color_system=None))
    lines = out.getvalue().splitlines()
    assert "…" not in out.getvalue()
    assert max(map(len, lines)) <= width
    return lines


def test_metrics_that_do_not_fit_follow_in_another_table():
    names = [
        f"{metric}@{cut}" for metric in ("MRR", "Recall", "nDCG", "Judged", "Success") for cut in (10, 100)
    ]
    methods = ["semantic_2d", "rq_8x256_bf16", "dual_encoder_scann"]
    rows = [
        MethodRow(
            method, "dual encoder", {name: (i + j / 10) / 10 for j, name in enumerate(names)}, 12.3, 4_200_000
        )
        for i, method in enumerate(methods)
    ]
    lines = printed(rows, 80)
    assert [line.split()[0] for line in lines if line.split(" ")[0] in methods] == methods * 2
    headings = " ".join(lines).split()
    assert [headings.count(name) for name in ("Family", "ms", "Params")] == [1, 1, 1]
    for i, method in enumerate(methods):
        values = [word for line in lines if line.startswith(method) for word in line.split() if "0." in word]
        assert values == [f"{(i + j / 10) / 10:.3f}" for j in range(10)]
    assert [headings.count(word) for word in ("Recall", "nDCG", "@10", "@100")] == [2, 2, 5, 5]


def test_a_long_name_is_broken_and_not_cut():
    lines = printed([row("w" * 50, MRR=0.5)], 60)
    assert "".join(lines).count("w") == 2 * 50  # MRR has a table of its own
    assert "".join(lines).count("0.500") == 1
    assert printed([row("a")], 80)[1].split() == ["Method", "Family", "ms", "q/s", "Params"]


def test_the_console_table_has_the_best_in_bold():
    out = io.StringIO()
    print_table([row("a", MRR=0.5), row("b", MRR=0.25)], Console(file=out, force_terminal=True, width=80))
    assert re.search(r"\x1b\[1m *0\.500", out.getvalue())
    assert not re.search(r"\x1b\[1m *0\.250", out.getvalue())


def test_marks_and_stars_fit_80_columns():
    """What differs from the baseline is marked; what the run is too short for is not the best."""
    names = ("MRR@10", "Recall@10", "Recall@100", "Hits@1", "Hits@10", "nDCG@10")
    better, unsure = (
        Difference(0.1, 0.05, 0.15, 0.001, 0.001, 0.002),
        Difference(0.1, 0, 0.2, 0.03, 0.03, 0.06),
    )
    worse = Difference(-0.1, -0.15, -0.05, 0.001, 0.001, 0.002)
    rows = [
        MethodRow("bm25", "lexical", dict.fromkeys(names, 0.5), 0.31, None, 4_000.0),
        MethodRow(
            *("exact", "dual encoder", dict.fromkeys(names, 0.6), 12.3, 4_200_000, 926.0, {"Recall@100"}),
            {"MRR@10": better, "Recall@10": unsure, "Hits@1": worse} | dict.fromkeys(names[4:], better),
        ),
    ]
    out = io.StringIO()
    print_table(rows, Console(file=out, force_terminal=True, width=80))
    assert len(re.findall(r"\x1b\[1m", out.getvalue())) == 6
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()
    assert len(lines) == 4  # one table
    assert lines[2].split() == ["bm25", "lexical", *["0.500"] * 6, "0.31", "4,000", "–"]
    values = ["▲0.600", "0.600", "*0.600", "▼0.600", "▲0.600", "▲0.600"]
    assert lines[3].split() == ["exact", "dual", "encoder", *values, "12", "926", "4.2M"]
    notes = table_notes(rows, "bm25")
    assert "worse than bm25" in notes
    assert "*: not comparable" in notes
    assert "▲" not in table_notes(rows[:1], "bm25")
