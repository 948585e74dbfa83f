"""The table of results: a row for each method, on the console and in the report."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence, Set

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from retrieval_jax.evaluation.significance import ALPHA, Difference


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """A method's row in the table of results.

    Attributes:
      name: the method's name.
      family: the label of its searcher's kind ("generative", "dual encoder", "lexical"); "other" for a run of
        another tool.
      metrics: name -> value; larger is better.
      single_query_ms: the latency in milliseconds, the median over single queries; None if it is not known.
      parameters: the number of the model's parameters; None without a model.
      queries_per_second: the throughput in batches of 32 queries; None if it is not known.
      too_deep: the metrics that look further than the run goes, which are not comparable.
      differences: metric -> how it differs from the baseline; empty for the baseline.
      cut: where the clock ended the training; None where it did not.
    """

    name: str
    family: str
    metrics: dict[str, float]
    single_query_ms: float | None
    parameters: int | None
    queries_per_second: float | None = None
    too_deep: Set[str] = frozenset()
    differences: Mapping[str, Difference] = dataclasses.field(default_factory=dict)
    cut: str | None = None

    @property
    def heading(self) -> str:
        """The name, with a mark if the clock ended the training."""
        return f"{self.name}†" if self.cut else self.name


NOT_COMPARABLE = "*: not comparable, because the measure looks further down than the run goes."
COLUMN_NOTE = "alone: the median time of a query that comes alone; batch: queries per second, 32 at once."


def print_table(rows: Sequence[MethodRow], console: Console) -> None:
    """Prints a line for each method, with the best value of each metric in bold.

    No name or value is cut: metrics that the console is too narrow for follow in further tables.

    Args:
      rows: the methods.
      console: where to print.
    """
    best = best_values(rows)
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
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    # Only a name that is wider than half of the console is broken, into several lines.
    longest = max((cell_len(row.heading) for row in rows), default=0)
    table.add_column("Method", width=max(len("Method"), min(longest, width // 2)), overflow="fold")
    if costs:
        table.add_column("Family")
    for heading in (*best, *(("alone\nms", "batch\nq/s", "Params") if costs else ())):
        # In two lines, so that all columns of the usual metrics fit a terminal of 80.
        table.add_column(re.sub("(?=@)", "\n", heading, count=1), justify="right", no_wrap=True)
    for row in rows:
        values = [Text(shown_value(row, name), "bold" if is_best(row, name, best) else "") for name in best]
        family = [Text(row.family)] if costs else []
        spent = [*times(row), format_count(row.parameters)] if costs else []
        # Text, not str: a name in square brackets is no markup.
        table.add_row(Text(row.heading), *family, *values, *spent)
    return table


def table_notes(rows: Sequence[MethodRow], baseline: str) -> str:
    """Explains the marks of a table of results, in no sentence or a few.

    Args:
      rows: the methods.
      baseline: the method that the others are compared with.
    """
    notes = []
    if any(row.differences for row in rows):
        notes.append(
            f"▲ better, ▼ worse than {baseline}: paired randomisation test over queries, "
            f"Holm–Bonferroni over the methods, p ≤ {ALPHA:g}."
        )
    if any(row.too_deep for row in rows):
        notes.append(NOT_COMPARABLE)
    if cut := [f"{row.name} at {row.cut}" for row in rows if row.cut]:
        notes.append(
            f"†: cut by the clock (train.max_minutes): {', '.join(cut)}: another machine gives another row."
        )
    return " ".join(notes)


def format_count(number: int | None) -> str:
    """Formats a number for people: 4_200_000 as "4.2M", None as "–"."""
    if number is None:
        return "–"
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.99995 * size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def times(row: MethodRow) -> list[str]:
    """Formats the latency and the throughput."""
    numbers = (row.single_query_ms, row.queries_per_second)
    return ["–" if n is None else f"{n:.2f}" if n < 10 else f"{n:,.0f}" for n in numbers]


def value_of(row: MethodRow, name: str) -> str:
    """Formats a metric: "0.412", or "–" if the row has no such number."""
    return f"{row.metrics[name]:.3f}" if math.isfinite(row.metrics.get(name, math.nan)) else "–"


def shown_value(row: MethodRow, name: str) -> str:
    """Formats a metric with the mark of a significant difference, or of one that is not comparable (*)."""
    value = value_of(row, name)
    return ("*" if name in row.too_deep and value != "–" else mark(row.differences.get(name))) + value


def mark(difference: Difference | None) -> str:
    """Returns ▲ if a method is significantly better than the baseline, ▼ if it is worse, otherwise ""."""
    if difference is None or not difference.significant:
        return ""
    return "▲" if difference.mean > 0 else "▼"


def best_values(rows: Sequence[MethodRow]) -> dict[str, str]:
    """Returns metric -> its best value as printed (equal values look equal), or "" if no row has one."""
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    values = {
        name: {value_of(row, name) for row in rows if name not in row.too_deep} - {"–"} for name in names
    }
    return {name: max(found, key=float, default="") for name, found in values.items()}


def is_best(row: MethodRow, name: str, best: dict[str, str]) -> bool:
    """Returns whether a row has the best value (of `best_values`) of a metric."""
    return name not in row.too_deep and value_of(row, name) == best[name]
