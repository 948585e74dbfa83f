"""Writes the HTML report of a collection: the sections of its page."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

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
from retrieval_jax.evaluation.page import difference_cell, difference_note, html_table, write_page
from retrieval_jax.evaluation.panels import TrainingCurve
from retrieval_jax.evaluation.robustness import DEPTH, Effect, Effects
from retrieval_jax.evaluation.significance import ALPHA

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
        f"<p>{escape(difference_note(comparison.baseline))}</p>{figure}"
    )


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

    effects_of_all = [effect for effects in found.values() for effect in effects.values()]
    proves = any(effect.certain_clean is not None for effect in effects_of_all)
    plans = any(effect.plan_overlap is not None for effect in effects_of_all)

    def told(what: str, share: float | None) -> str:
        return f"<small>{what} {'–' if share is None else f'{share:.0%}'}</small>"

    def cell(effect: Effect | None) -> str:
        if effect is None:
            return "<td>–</td>"
        lost = effect.relative_loss
        change = f"{round(-100 * lost) or 0:+d}%".replace("+0%", "±0%") if math.isfinite(lost) else "–"
        shares = told("overlap", effect.overlap)
        if effect.plan_overlap is not None:
            shares += told("of the plans", effect.plan_overlap)
        if proves:
            shares += told("still certain", effect.still_certain)
        return f"<td>{mark(effect.difference)}{effect.value:.3f}<small>{change}</small>{shares}</td>"

    def row(name: str, effects: Mapping[str, Effect]) -> str:
        clean = next(iter(effects.values()))
        cells = "".join(cell(effects.get(kind)) for kind in kinds)
        # A search that can prove nothing, as one by sums of logits, has 0 there, too.
        share = told("certain", clean.certain_clean or None) if proves else ""
        return f"<tr><th>{escape(name)}</th><td>{clean.clean:.3f}{share}</td>{cells}</tr>"

    body = "".join(row(name, effects) for name, effects in found.items())
    losses = {
        name: {kind: effect.relative_loss for kind, effect in effects.items()}
        for name, effects in found.items()
    }
    note = ""
    if plans:
        note += (
            " Of the plans: the overlap of the passages that a planned search considers, as far as the run of"
            " its lexical half goes."
        )
    if proves:
        note += (
            " Certain: the share of the queries whose first passage is proven to be that of an exhaustive "
            "search; still certain: the share of these whose variation's is, too; – where none is proven."
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
