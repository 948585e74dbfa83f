"""Writes the HTML report: one self-contained page."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template

import numpy as np

from retrieval_jax.core.storage import atomic_write
from retrieval_jax.evaluation import panels
from retrieval_jax.evaluation.method_table import (
    MethodRow,
    best_values,
    format_count,
    is_best,
    mark,
    shown_value,
    table_notes,
    times,
    value_of,
)
from retrieval_jax.evaluation.panels import TrainingCurve
from retrieval_jax.evaluation.robustness import DEPTH, Effect, Effects
from retrieval_jax.evaluation.significance import ALPHA, Difference

_COMBINATIONS = 20  # sets of methods whose common findings the page shows


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the page shows of several methods besides their means.

    Attributes:
      baseline: the method that the others are compared with.
      metric: the metric whose differences are drawn by query.
      query_differences: method -> float Q, its value in this metric minus the baseline's.
      found: the methods that have a relevant passage among their first results -> the number of passages
        that just these have; see `comparison.found_by`.
      depth: how many results those are.
    """

    baseline: str
    metric: str
    query_differences: Mapping[str, np.ndarray]
    found: Mapping[frozenset[str], int]
    depth: int


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


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    collection: dict[str, object],
    rows: Sequence[MethodRow],
    curves: Sequence[TrainingCurve],
    examples: Sequence[QueryComparison],
    footer: dict[str, str],
    comparison: Comparison | None = None,
    robustness: tuple[str, Effects] | None = None,
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
      comparison: what is shown of several methods besides their means; None for nothing.
      robustness: a measure, and what variations of the queries do to it; None for nothing.

    Raises:
      UserError: the path cannot be written.
    """
    sections = (
        ("Results", _results(rows, comparison) if rows else ""),
        ("Differences by query", _differences(rows, comparison)),
        ("What each method finds", _found(comparison) if comparison else ""),
        ("Other wordings of the queries", _robustness(*robustness) if robustness else ""),
        ("Training", panels.figure(curves)),
        ("Queries side by side", "".join(map(_example, examples))),
    )
    write_page(path, title, collection, sections, footer)


def write_page(
    path: str | os.PathLike,
    title: str,
    facts: Mapping[str, object],
    sections: Iterable[tuple[str, str]],
    footer: Mapping[str, str],
) -> None:
    """Writes a page of HTML, whole or not at all.

    Args:
      path: the file.
      title: the heading.
      facts: label -> value, under the heading.
      sections: heading and HTML of each section; one without HTML is left out.
      footer: label -> text.

    Raises:
      UserError: the path cannot be written.
    """
    page = _PAGE.substitute(
        title=escape(title),
        style=_STYLE,
        facts=_pairs(facts),
        sections="".join(f"<section><h2>{name}</h2>{html}</section>" for name, html in sections if html),
        footer=_pairs(footer),
    )
    # Texts from the web hold halves of surrogate pairs, which UTF-8 cannot: "?" instead.
    atomic_write(path, page.encode("utf-8", "replace"))


def _pairs(pairs: Mapping) -> str:
    def text(value: object) -> str:
        return f"{value:,}" if type(value) is int else str(value)

    return "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(text(value))}</dd></div>"
        for name, value in pairs.items()
    )


def _results(rows: Sequence[MethodRow], comparison: Comparison | None) -> str:
    best = best_values(rows)

    def metric(row: MethodRow, name: str) -> str:
        value = value_of(row, name)
        share = 0 if value == "–" else min(max(float(value), 0), 1)
        tag = "b" if is_best(row, name, best) else "span"
        return f'<td class="bar" style="--share:{share:.1%}"><{tag}>{shown_value(row, name)}</{tag}></td>'

    headings = ("Single query\nmedian ms", "Batches of 32\nqueries / s")
    body = "".join(
        f"<tr><th>{escape(row.heading)}</th><td>{escape(row.family)}</td>"
        f"{''.join(metric(row, name) for name in best)}"
        f"{''.join(f'<td>{time}</td>' for time in times(row))}<td>{format_count(row.parameters)}</td></tr>"
        for row in rows
    )
    notes = escape(table_notes(rows, comparison.baseline if comparison else ""))
    return (
        html_table(("Method", "Family", *best, *headings, "Parameters"), body)
        + "<p>Means over the judged queries; the best value of each metric is bold, bars run from 0 to 1. "
        f"{notes}</p>"
    )


def html_table(headings: Sequence[str], body: str) -> str:
    """Returns a table that scrolls where it is too wide, of headings (as text) and rows (as HTML)."""
    head = "".join(f"<th>{escape(heading).replace(chr(10), '<br>')}</th>" for heading in headings)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _differences(rows: Sequence[MethodRow], comparison: Comparison | None) -> str:
    compared = [row for row in rows if row.differences]
    if not compared or comparison is None:
        return ""
    names = dict.fromkeys(name for row in compared for name in row.differences)

    body = "".join(
        f"<tr><th>{escape(row.name)}</th>"
        f"{''.join(difference_cell(row.differences.get(name)) for name in names)}</tr>"
        for row in compared
    )
    figure = panels.difference_figure(comparison.metric, comparison.baseline, comparison.query_differences)
    return (
        f'<div class="differences">{html_table(("Method", *names), body)}</div>'
        f"<p>Means over the queries of the differences to {escape(comparison.baseline)}, their 95% "
        "confidence intervals (Student's t), and the p-values of paired randomisation tests, corrected by "
        f"Holm–Bonferroni over the methods. ▲▼: p ≤ {ALPHA:g}.</p>{figure}"
    )


def difference_cell(found: Difference | None) -> str:
    """Returns the cell of a difference: its mean, its interval and its p-value, below each other."""
    if found is None:
        return "<td>–</td>"
    p = "p &lt; 0.001" if found.p_holm < 0.001 else f"p = {found.p_holm:.3f}"
    interval = f"{found.low:+.3f} to {found.high:+.3f}"
    return f"<td>{mark(found)}{found.mean:+.3f}<small>{interval}</small><small>{p}</small></td>"


def _found(comparison: Comparison) -> str:
    """Shows which relevant passages are found by whom: a plot as of UpSet (Lex et al. 2014), as a table."""
    methods = sorted(set().union(*comparison.found), key=str)
    if len(methods) < 2:
        return ""
    alone = {frozenset([name]): 0 for name in methods}
    counts = sorted((alone | dict(comparison.found)).items(), key=lambda pair: (-pair[1], sorted(pair[0])))
    ranked = [found for found, _ in counts if found not in alone]
    kept = {*alone, *ranked[: max(_COMBINATIONS - len(alone), 0)]}
    most, total = counts[0][1] or 1, sum(comparison.found.values())

    def row(found: frozenset[str], count: int) -> str:
        label = f"{min(found)} alone" if len(found) == 1 else "" if found else "none of them"
        dots = "".join(f"<td>{'●' if name in found else '<i>·</i>'}</td>" for name in methods)
        bar = f'<td class="bar" style="--share:{count / most:.1%}">{count:,}</td>'
        return f"<tr><th>{escape(label)}</th>{dots}{bar}</tr>"

    body = "".join(row(found, count) for found, count in counts if found in kept)
    left = sum(found not in kept for found, _ in counts)
    others = f" {left} smaller sets of methods are not shown." if left else ""
    return (
        f'<div class="found">{html_table(("", *methods, "relevant passages"), body)}</div>'
        f"<p>Each of the {total:,} relevant passages of all queries is counted in one row: that of the "
        f"methods (●) that have it among their first {comparison.depth} results.{others}</p>"
    )


def _robustness(measure: str, found: Effects) -> str:
    """Shows what variations of the queries do to each method; "" if there are no runs of them."""
    kinds = list(dict.fromkeys(kind for effects in found.values() for kind in effects))
    if not kinds:
        return ""

    def certain(share: float | None) -> str:
        return "" if share is None else f"<small>certain {share:.0%}</small>"

    def cell(effect: Effect | None) -> str:
        if effect is None:
            return "<td>–</td>"
        loss = f"{-effect.relative_loss:+.0%}" if math.isfinite(effect.relative_loss) else "–"
        return (
            f"<td>{mark(effect.difference)}{effect.value:.3f}<small>{loss}</small>"
            f"<small>overlap {effect.overlap:.0%}</small>{certain(effect.certain)}</td>"
        )

    def row(name: str, effects: Mapping[str, Effect]) -> str:
        clean = next(iter(effects.values()))
        cells = "".join(cell(effects.get(kind)) for kind in kinds)
        return (
            f"<tr><th>{escape(name)}</th><td>{clean.clean:.3f}{certain(clean.certain_clean)}</td>{cells}</tr>"
        )

    body = "".join(row(name, effects) for name, effects in found.items())
    losses = {
        name: {kind: effect.relative_loss for kind, effect in effects.items()}
        for name, effects in found.items()
    }
    knows = any(e.certain is not None for effects in found.values() for e in effects.values())
    note = (
        " Certain: the share of the queries whose first passage is proven to be that of an exhaustive search."
        if knows
        else ""
    )
    return (
        f'<div class="differences">{html_table(("Method", "as they are", *kinds), body)}</div>'
        f"<p>{escape(measure)} of the queries as they are and of their variations, the change relative to "
        f"the first, and how much of the first {DEPTH} passages both runs share. ▼ significantly worse, ▲ "
        "better than for the queries as they are: paired randomisation test, Holm–Bonferroni over all methods"
        f" and kinds, p ≤ {ALPHA:g}.{note}</p>{panels.loss_figure(measure, losses)}"
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
thead th { font-weight: normal; line-height: 1.3; vertical-align: bottom; }
th:first-child { position: sticky; left: 0; padding-left: 0; background: var(--ground); }
th:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
.bar { background: linear-gradient(var(--bar), var(--bar)) 0 100% / var(--share) 3px no-repeat content-box; }
.differences small { display: block; line-height: 1.3; }
.differences td { line-height: 1.5; }
.differences td:nth-child(2), .differences th:nth-child(2) { text-align: right; }
.sweep td:nth-child(2), .sweep th:nth-child(2) { text-align: right; }
.sweep small { display: block; line-height: 1.3; white-space: normal; }
.sweep .failed { text-align: left; }
a { color: inherit; }
.found table { width: auto; min-width: 60%; }
.found td, .found th { line-height: 1.4; text-align: center; }
.found th:first-child { text-align: left; }
.found td:last-child { text-align: right; min-width: 12rem; }
.found i { color: var(--line); }
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
