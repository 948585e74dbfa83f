"""Prints the table of methods, and writes the HTML report (one self-contained page)."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from html import escape
from string import Template

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from retrieval_jax.core.storage import atomic_write
from retrieval_jax.evaluation import panels
from retrieval_jax.evaluation.panels import TrainingCurve


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """A method's row in the table of results.

    Attributes:
      name: the method's name.
      family: the label of its searcher's kind ("generative", "dual encoder", "lexical"); "other" for a run of
        another tool.
      metrics: name -> value; larger is better.
      ms_per_query: wall time in milliseconds; None if it is not known.
      parameters: the number of the model's parameters; None without a model.
    """

    name: str
    family: str
    metrics: dict[str, float]
    ms_per_query: float | None
    parameters: int | None


@dataclasses.dataclass(frozen=True)
class PassageSnippet:
    """A passage as the page shows it.

    Attributes:
      passage_id: the passage's id.
      title: its title.
      snippet: the beginning of its text.
      relevant: whether it is relevant to the query beside which it is shown.
    """

    passage_id: str
    title: str
    snippet: str
    relevant: bool


@dataclasses.dataclass(frozen=True)
class QueryComparison:
    """The passages that the methods found for one query.

    Attributes:
      query: the query's text.
      relevant: its relevant passages.
      results: method -> the passages that it found, best first.
    """

    query: str
    relevant: list[PassageSnippet]
    results: dict[str, list[PassageSnippet]]


def print_table(rows: Sequence[MethodRow], console: Console) -> None:
    """Prints a line for each method, with the best value of each metric in bold.

    No name or value is cut: metrics that the console is too narrow for follow in further tables.

    Args:
      rows: the methods.
      console: where to print.
    """
    best = _best(rows)
    unlimited = console.options.update_width(1 << 16)
    left, printed = list(best), False
    while left or not printed:
        # A table of one metric at least, but for the first, which has other columns.
        for count in range(len(left), 0 if printed else -1, -1):
            table = _table(
                rows, {name: best[name] for name in left[:count]}, console.width, costs=not printed
            )
            if Measurement.get(console, unlimited, table).minimum <= console.width:
                break
        console.print(*[""] * printed, table, sep="\n")
        left, printed = left[count:], True


def _table(rows: Sequence[MethodRow], best: dict[str, str], width: int, costs: bool) -> Table:
    """Returns the table of these metrics; with `costs`, that of families, times and parameters, too."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    # Only a name that is wider than half of the console is broken, into several lines.
    longest = max((cell_len(row.name) for row in rows), default=0)
    table.add_column("Method", width=max(len("Method"), min(longest, width // 2)), overflow="fold")
    if costs:
        table.add_column("Family")
    for heading in (*best, *(("ms/query", "Params") if costs else ())):
        # In two lines, so that all columns of the usual metrics fit a terminal of 80.
        table.add_column(re.sub("(?=[@/])", "\n", heading, count=1), justify="right", no_wrap=True)
    for row in rows:
        values = [_value(row, name) for name in best]
        styles = ["bold" if value == best[name] else "" for name, value in zip(best, values, strict=True)]
        family = [Text(row.family)] if costs else []
        spent = [_milliseconds(row.ms_per_query), format_count(row.parameters)] if costs else []
        # Text, not str: a name in square brackets is no markup.
        table.add_row(Text(row.name), *family, *map(Text, values, styles), *spent)
    return table


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    collection: dict[str, object],
    rows: Sequence[MethodRow],
    curves: Sequence[TrainingCurve],
    examples: Sequence[QueryComparison],
    footer: dict[str, str],
) -> None:
    """Writes the report: one HTML file without scripts or external resources, whole or not at all.

    Sections without data are left out.

    Args:
      path: the file.
      title: the heading.
      collection: facts under the heading, label -> value; whole numbers get thousands separators.
      rows: the table of results.
      curves: the models' learning curves.
      examples: queries, with the passages that the methods found for them.
      footer: how the report was made, label -> text, such as "command" and "machine".

    Raises:
      UserError: the path cannot be written.
    """
    sections = (
        ("Results", _results(rows) if rows else ""),
        ("Training", panels.figure(curves)),
        ("Queries side by side", "".join(map(_example, examples))),
    )
    page = _PAGE.substitute(
        title=escape(title),
        style=_STYLE,
        facts=_pairs(collection),
        sections="".join(f"<section><h2>{name}</h2>{html}</section>" for name, html in sections if html),
        footer=_pairs(footer),
    )
    # Texts from the web hold halves of surrogate pairs, which UTF-8 cannot: "?" instead.
    atomic_write(path, page.encode("utf-8", "replace"))


def format_count(number: int | None) -> str:
    """Formats a number for people: 4_200_000 as "4.2M", None as "–"."""
    if number is None:
        return "–"
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.99995 * size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _milliseconds(ms: float | None) -> str:
    if ms is None:
        return "–"
    return f"{ms:.2f}" if ms < 10 else f"{ms:,.0f}"


def _value(row: MethodRow, name: str) -> str:
    return f"{row.metrics[name]:.3f}" if math.isfinite(row.metrics.get(name, math.nan)) else "–"


def _best(rows: Sequence[MethodRow]) -> dict[str, str]:
    """Returns metric -> its best value as printed (equal values look equal), or "" if no row has one."""
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    values = {name: {_value(row, name) for row in rows} - {"–"} for name in names}
    return {name: max(found, key=float, default="") for name, found in values.items()}


def _pairs(pairs: dict) -> str:
    def text(value: object) -> str:
        return f"{value:,}" if type(value) is int else str(value)

    return "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(text(value))}</dd></div>"
        for name, value in pairs.items()
    )


def _results(rows: Sequence[MethodRow]) -> str:
    best = _best(rows)

    def metric(row: MethodRow, name: str) -> str:
        value = _value(row, name)
        share = 0 if value == "–" else min(max(float(value), 0), 1)
        tag = "b" if value == best[name] else "span"
        return f'<td class="bar" style="--share:{share:.1%}"><{tag}>{value}</{tag}></td>'

    head = "".join(f"<th>{escape(name)}</th>" for name in (*best, "ms / query", "Parameters"))
    body = "".join(
        f"<tr><th>{escape(row.name)}</th><td>{escape(row.family)}</td>"
        f"{''.join(metric(row, name) for name in best)}"
        f"<td>{_milliseconds(row.ms_per_query)}</td><td>{format_count(row.parameters)}</td></tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>Method</th><th>Family</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        "<p>Means over the judged queries; the best value of each metric is bold, bars run from 0 to 1. "
        "ms / query is wall time.</p>"
    )


def _example(example: QueryComparison) -> str:
    relevant = "".join(f"<li>{_passage(shown)}</li>" for shown in example.relevant)
    methods = "".join(_ranking(name, shown) for name, shown in example.results.items())
    return (
        f"<article><h3>{escape(example.query)}</h3><details open><summary>{len(example.relevant)} relevant"
        f" passage{'s' * (len(example.relevant) != 1)}</summary><ul>{relevant}</ul></details>"
        f'<div class="methods scroll">{methods}</div></article>'
    )


def _ranking(name: str, results: Sequence[PassageSnippet]) -> str:
    found = next((f"relevant at {i}" for i, shown in enumerate(results, 1) if shown.relevant), None)
    note = found or (f"none relevant in {len(results)}" if results else "no result")
    items = "".join(
        f"<li{' class=relevant' * shown.relevant}><span>{rank}</span>{_passage(shown)}</li>"
        for rank, shown in enumerate(results, start=1)
    )
    return f"<div><h4>{escape(name)} <small>{note}</small></h4><ol>{items}</ol></div>"


def _passage(shown: PassageSnippet) -> str:
    return (
        f"<div><b>{escape(shown.title)}</b> <code>{escape(shown.passage_id)}</code>"
        f"<p>{escape(shown.snippet)}</p></div>"
    )


_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1><dl class="facts">$facts</dl></header>
<main>$sections</main>
<footer><dl>$footer</dl></footer>
</body>
</html>
""")

_STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fff; --card: #f7f7f5; --line: #dededa; --ink: #1d1d1b; --soft: #64645f;
  --bar: #0072b2; --good: #00795a; --good-ground: #e4f4ec;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #161716; --card: #1f211f; --line: #383b38; --ink: #e8e8e4; --soft: #a0a29c;
    --bar: #56b4e9; --good: #5fd0a8; --good-ground: #16342a;
  }
}
* { box-sizing: border-box; }
body {
  max-width: 82rem; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem); overflow-wrap: anywhere;
  background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
}
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 1rem; }
h3 { font-size: 1.1rem; margin: 0; }
h4 { font-size: 1rem; margin: 0 0 .5rem; }
dl, dd, figure, ul, ol { margin: 0; padding: 0; list-style: none; }
dt, small, summary, figcaption, thead, p { color: var(--soft); font-size: .85rem; font-weight: normal; }
dd, table { font-variant-numeric: tabular-nums; }
.facts, .legend { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; }
.facts dd { font-size: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
tr { border-bottom: 1px solid var(--line); }
th, td { padding: .4rem .75rem; line-height: 2; text-align: right; white-space: nowrap; }
thead th { font-weight: normal; }
th:first-child { position: sticky; left: 0; padding-left: 0; background: var(--ground); }
th:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
.bar { background: linear-gradient(var(--bar), var(--bar)) 0 100% / var(--share) 3px no-repeat content-box; }
.legend li::before {
  content: ""; display: inline-block; width: 1.4em; height: 3px; margin-right: .5em;
  vertical-align: middle; background: var(--colour);
}
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.panels { margin: .75rem 0; }
.panels svg { width: 100%; height: auto; }
.panels text { font-family: inherit !important; }
article { padding: 1.25rem; margin-bottom: 1.25rem; border-radius: .6rem; background: var(--card); }
article li { font-size: .9rem; }
article p { margin: .2rem 0 0; }
code { display: inline-block; font-size: .75rem; color: var(--soft); }
details { margin: .25rem 0 1rem; }
details li { margin-top: .5rem; padding-left: .75rem; border-left: 3px solid var(--good); }
.methods { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(13.5rem, 1fr); gap: 1rem; }
.methods li { display: flex; gap: .6rem; padding: .5rem; border-top: 1px solid var(--line); }
.methods li > span { color: var(--soft); }
.methods p { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }
.methods .relevant { background: var(--good-ground); box-shadow: inset 3px 0 var(--good); }
.relevant b::after { content: " \\2713"; color: var(--good); }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }
footer div { display: grid; grid-template-columns: 7rem 1fr; gap: 1rem; }
footer dd { font: .8rem/1.6 ui-monospace, monospace; }
"""
