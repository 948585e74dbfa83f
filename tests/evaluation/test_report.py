import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from retrieval_jax.core.errors import UserError
from retrieval_jax.evaluation.panels import PANELS, TrainingCurve
from retrieval_jax.evaluation.report import (
    MethodRow,
    PassageSnippet,
    QueryComparison,
    format_count,
    print_table,
    write_report,
)

EVIL = "<script>alert(1)</script>\"'><img src=x> $title & [red]"
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """What a browser would make of the page: elements with their attributes and the text inside them."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        return [e for e in self.elements if e["tag"] == tag and attributes.items() <= e.items()]

    def texts(self, tag, **attributes):
        return [element["text"] for element in self.all(tag, **attributes)]


def report(tmp_path, **changes):
    arguments = {"title": "t", "collection": {}, "rows": [], "curves": [], "examples": [], "footer": {}}
    write_report(tmp_path / "report.html", **(arguments | changes))
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def row(name, parameters=None, **metrics):
    return MethodRow(name, "lexical", metrics, 1.0, parameters)


def curve(name, *keys):
    return TrainingCurve(
        name, [{"step": i, "minutes": i / 2} | dict.fromkeys(keys, 1 / (i + 1)) for i in range(20)]
    )


def test_every_text_is_escaped_and_shown(tmp_path):
    shown = [PassageSnippet(EVIL, EVIL, EVIL, True)]
    page = Page(
        report(
            tmp_path,
            title=EVIL,
            collection={EVIL: EVIL},
            rows=[MethodRow(EVIL, EVIL, {EVIL: 0.5}, 1.0, 7)],
            curves=[TrainingCurve(EVIL, [{"step": 1, "minutes": 1.0, "loss": 2.0}])],
            examples=[QueryComparison(EVIL, shown, {EVIL: shown})],
            footer={EVIL: EVIL},
        )
    )
    assert not page.all("script")
    assert not page.all("img")
    for tag, count in {"title": 1, "h1": 1, "dt": 2, "dd": 2, "h3": 1, "td": 1, "code": 2, "b": 2}.items():
        assert page.texts(tag).count(EVIL) == count, tag
    assert page.texts("th").count(EVIL) == 2  # the method and the metric
    assert EVIL in page.texts("ul", **{"class": "legend"})[0]
    assert EVIL in page.texts("h4")[0]


def test_the_page_loads_nothing_and_ids_are_unique(tmp_path):
    html = report(tmp_path, rows=[row("bm25", MRR=0.5)], curves=[curve("atomic", *PANELS)])
    page = Page(html)
    assert len(page.all("svg")) == len(PANELS)
    assert not {"script", "link", "img", "iframe", "object"} & {element["tag"] for element in page.elements}
    targets = [
        value
        for e in page.elements
        for key, value in e.items()
        if key in ("src", "href", "xlink:href", "data")
    ]
    targets += re.findall(r"url\((.*?)\)", html)
    assert targets
    assert all(target.startswith("#") for target in targets)
    assert "@import" not in html
    ids = [element["id"] for element in page.elements if "id" in element]
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in targets} <= set(ids)


def test_the_same_data_give_the_same_page(tmp_path):
    curves = [curve("atomic", "loss"), curve("naive", "loss", "dev/Hits@1")]
    assert report(tmp_path, curves=curves) == report(tmp_path, curves=curves)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_best_values_are_bold_where_they_print_alike(tmp_path):
    rows = [row("a", MRR=0.41204, Hits=0.9), row("b", MRR=0.41196, Hits=float("nan")), row("c", MRR=0.4)]
    page = Page(report(tmp_path, rows=rows))
    assert page.texts("b") == ["0.412", "0.900", "0.412"]
    assert page.texts("td", **{"class": "bar"}) == ["0.412", "0.900", "0.412", "–", "0.400", "–"]
    assert page.all("td", style="--share:90.0%")[0]["text"] == "0.900"


def test_only_panels_with_points_are_drawn(tmp_path):
    broken = TrainingCurve("late", [{"step": 1, "loss": 1.0}, {"step": 2, "minutes": 1.0, "loss": None}])
    nan = TrainingCurve("nan", [{"step": 1, "minutes": 1.0, "loss": float("nan")}])
    page = Page(
        report(
            tmp_path, curves=[curve("atomic", "loss", "dev/MRR@10"), TrainingCurve("new", []), broken, nan]
        )
    )
    assert [svg["aria-label"].split(" (")[0] for svg in page.all("svg")] == ["Training loss", "MRR@10 on dev"]
    assert {"training time (minutes)", "nats", "mean reciprocal rank"} <= set(page.texts("text"))
    assert page.texts("li") == ["atomic", "new", "late", "nan"]
    assert Page(report(tmp_path, curves=[broken], examples=[])).texts("h2") == []


@pytest.mark.parametrize(
    "losses", [[2.2, 2.1], [9.0, 0.1], [5.0, 0.0], [3.0], [float("nan"), 2.0, 1.0], [float("nan")] * 2]
)
def test_the_loss_axis_has_numbers_for_any_losses(tmp_path, losses):
    points = [{"step": i, "minutes": float(i), "loss": loss} for i, loss in enumerate(losses)]
    page = Page(report(tmp_path, curves=[TrainingCurve("naive", points)]))
    labels = page.texts("text")
    ticks = labels[labels.index("training time (minutes)") + 1 : labels.index("nats")]
    assert len(ticks) >= 3
    assert all(re.fullmatch(r"−?[0-9.e-]+", tick) for tick in ticks)


def test_a_single_point_is_visible_and_a_loss_of_zero_is_drawn(tmp_path):
    one = TrainingCurve("one", [{"step": 1, "minutes": 1.0, "loss": 0.0}])
    # A marker is an SVG <use> in the line's colour; ticks are black or the page's ink.
    uses = Page(report(tmp_path, curves=[one])).all("use")
    assert any("#0072b2" in use.get("style", "") for use in uses)


def test_relevant_passages_stand_out_per_method(tmp_path):
    good, bad = PassageSnippet("p1", "Good", "g", True), PassageSnippet("p2", "Bad", "b", False)
    results = {"exact": [bad, good], "bm25": [bad], "atomic": []}
    page = Page(report(tmp_path, examples=[QueryComparison("why?", [good], results)]))
    assert page.texts("h4") == ["exact relevant at 2", "bm25 none relevant in 1", "atomic no result"]
    assert page.texts("li", **{"class": "relevant"}) == ["2Good p1g"]
    assert page.texts("summary") == ["1 relevant passage"]


def test_facts_and_odd_characters(tmp_path):
    page = Page(report(tmp_path, collection={"passages": 109739, "name": "half a pair \ud800"}))
    assert page.texts("dd") == ["109,739", "half a pair ?"]


def test_an_unwritable_report_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        report(tmp_path / "file")


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
    assert text.splitlines()[2].split() == ["[red]", "dual", "encoder", *["0.250"] * 6, "12", "4.2M"]
    assert text.splitlines()[3].split() == ["bm25", "lexical", *["–"] * 6, "0.50", "–"]
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
    assert printed([row("a")], 80)[1].split() == ["Method", "Family", "/query", "Params"]


def test_the_console_table_has_the_best_in_bold():
    out = io.StringIO()
    print_table([row("a", MRR=0.5), row("b", MRR=0.25)], Console(file=out, force_terminal=True, width=80))
    assert re.search(r"\x1b\[1m *0\.500", out.getvalue())
    assert not re.search(r"\x1b\[1m *0\.250", out.getvalue())
