import re
from html.parser import HTMLParser

import numpy as np
import pytest

from retrieval_jax.evaluation.method_table import MethodRow
from retrieval_jax.evaluation.panels import PANELS, TrainingCurve
from retrieval_jax.evaluation.report import Comparison, PassageSnippet, QueryComparison, write_report
from retrieval_jax.evaluation.significance import compare

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


def test_differences_and_what_each_method_finds(tmp_path):
    """The numbers of the page are those of the tests; the marks stand in the table of results, too."""
    values = {"a": np.linspace(0, 1, 40), "b": np.linspace(0, 0.5, 40)}
    differences = compare(values["a"], {"b": values["b"]})
    rows = [
        row("a", MRR=0.5),
        MethodRow(
            "b", "lexical", {"MRR": 0.25, "R": 0.9}, 2.5, None, 800.0, {"R"}, {"MRR": differences["b"]}
        ),
    ]
    found = {frozenset("ab"): 7, frozenset("b"): 3, frozenset(): 2}
    shown = Comparison("a", "MRR", {"b": values["b"] - values["a"]}, found, 10)
    page = Page(report(tmp_path, rows=rows, comparison=shown))
    cells = page.texts("td")
    assert {"▼0.250", "*0.900", "2.50", "800"} <= set(cells)
    assert page.texts("b") == ["0.500"]  # a value with a star is not the best
    d = differences["b"]
    assert f"▼{d.mean:+.3f}{d.low:+.3f} to {d.high:+.3f}p < 0.001" in cells
    (svg,) = page.all("svg")
    assert svg["aria-label"] == "b minus a, MRR: better in 0 queries, worse in 39, equal in 1"
    table = cells[cells.index("●") :]
    assert table == ["●", "●", "7", "·", "●", "3", "·", "·", "2", "●", "·", "0"]
    assert page.texts("th")[-4:] == ["", "b alone", "none of them", "a alone"]
    assert any("counted in one row" in text and "12 relevant" in text for text in page.texts("p"))
    page = Page(report(tmp_path, rows=rows[:1], comparison=Comparison("a", "", {}, {frozenset("a"): 1}, 10)))
    assert page.texts("h2") == ["Results"]
