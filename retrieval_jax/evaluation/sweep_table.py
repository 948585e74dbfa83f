"""One table of several collections: a row for each, a column for each method, and the mean.

It is shown on the console and written as JSON, as Markdown and as a page of HTML.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence, Set
from html import escape

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retrieval_jax.evaluation import page
from retrieval_jax.evaluation.method_table import NOT_COMPARABLE, mark
from retrieval_jax.evaluation.significance import ALPHA, Difference, compare, compare_collections

MEAN = "mean"


@dataclasses.dataclass(frozen=True)
class CollectionValues:
    """What was measured on a collection.

    Attributes:
      name: the name of its row.
      source: the collection, as `import` takes it.
      split: the queries that were answered; "" if that failed before they were known.
      values: method -> float64 Q, its value of each query; without the methods that failed.
      not_comparable: the methods whose runs are less deep than the measure looks.
      errors: a line for each thing that failed.
    """

    name: str
    source: str
    split: str = ""
    values: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    not_comparable: Set[str] = frozenset()
    errors: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      name: of the collection, or MEAN.
      queries: the number of queries.
      means: method -> the mean of the measure; without the methods that failed.
      differences: method -> its difference to the baseline.
      not_comparable: the methods whose values have a star.
      errors: a line for each thing that failed.
    """

    name: str
    queries: int
    means: Mapping[str, float]
    differences: Mapping[str, Difference]
    not_comparable: Set[str] = frozenset()
    errors: Sequence[str] = ()

    def cells(self, methods: Sequence[str]) -> list[tuple[str, bool]]:
        """Returns (text, whether it is the best value as printed) for each method."""
        texts = {method: f"{value:.3f}" for method, value in self.means.items()}
        compared = [text for method, text in texts.items() if method not in self.not_comparable]
        best = max(compared, key=float, default="")
        return [
            (self._mark(method) + texts[method], texts[method] == best and method not in self.not_comparable)
            if method in texts
            else ("–", False)
            for method in methods
        ]

    def _mark(self, method: str) -> str:
        return "*" if method in self.not_comparable else mark(self.differences.get(method))


class SweepTable:
    """The table.

    The mean is that of the collections on which every method was measured, each of which counts the same.
    Its tests are made when no collection is missing.

    Args:
      measure: the name of the measure.
      methods: the names of the methods.
      baseline: the method that the others are compared with.
      collections: what was measured.
      missing: the number of collections that are still to be measured, and then given to `add`.
    """

    def __init__(
        self,
        measure: str,
        methods: Sequence[str],
        baseline: str,
        collections: Sequence[CollectionValues] = (),
        missing: int = 0,
    ):
        self.measure, self.methods, self.baseline = measure, methods, baseline
        self.missing = missing + len(collections)
        self.collections: list[CollectionValues] = []
        self.rows: list[Row] = []
        self.mean: Row | None = None
        for found in collections:
            self.add(found)

    def add(self, found: CollectionValues) -> None:
        """Adds the row of a collection, and makes the mean anew."""
        self.collections.append(found)
        self.rows.append(self._row(found))
        self.missing -= 1
        self.mean = self._mean_row() if self.whole else None

    @property
    def whole(self) -> list[CollectionValues]:
        """The collections that the mean is of: where nothing failed and each method is deep enough."""
        return [found for found in self.collections if not found.errors and not found.not_comparable]

    def _row(self, found: CollectionValues) -> Row:
        others = {
            method: values_Q
            for method, values_Q in found.values.items()
            if method != self.baseline and not {method, self.baseline} & found.not_comparable
        }
        base_Q = found.values.get(self.baseline)
        return Row(
            found.name,
            max(map(len, found.values.values()), default=0),
            {method: float(values_Q.mean()) for method, values_Q in found.values.items()},
            {} if base_Q is None else compare(base_Q, others),
            found.not_comparable,
            found.errors,
        )

    def _mean_row(self) -> Row:
        values = {method: [found.values[method] for found in self.whole] for method in self.methods}
        others = {method: of for method, of in values.items() if method != self.baseline}
        return Row(
            MEAN,
            sum(map(len, values[self.baseline])),
            {method: float(np.mean([v_Q.mean() for v_Q in of])) for method, of in values.items()},
            {} if self.missing else compare_collections(values[self.baseline], others),
        )

    @property
    def all_rows(self) -> list[Row]:
        """The rows of the collections, and the mean if there is one."""
        return [*self.rows, *([self.mean] if self.mean else [])]

    @property
    def notes(self) -> list[str]:
        """What the table does not say, a sentence or two each; first what failed."""
        notes = [f"{row.name}: failed: {error}" for row in self.rows for error in row.errors]
        if self.missing:
            are = "collection is" if self.missing == 1 else "collections are"
            notes.append(f"{self.missing} {are} still to come.")
        if self.mean and len(self.whole) < len(self.rows):
            have = "collection that has" if len(self.whole) == 1 else "collections that have"
            notes.append(
                f"The mean is of the {len(self.whole)} {have} all methods, each as deep as the measure."
            )
        splits: dict[str, list[str]] = {}
        for found in self.collections:
            if found.split:
                splits.setdefault(found.split, []).append(found.name)
        if len(splits) > 1:
            listed = "; ".join(f"{split} of {', '.join(names)}" for split, names in splits.items())
            notes.append(f"The queries are {listed}.")
        if any(row.not_comparable for row in self.rows):
            notes.append(NOT_COMPARABLE)
        if len(self.methods) > 1:
            notes.append(
                f"▲ better, ▼ worse than {self.baseline}: paired randomisation test over queries (for the "
                f"mean: within each collection), Holm–Bonferroni over the methods, p ≤ {ALPHA:g}."
            )
        return notes

    def facts(self) -> dict:
        """Returns the table as JSON, with the differences to the baseline and what failed."""

        def differences(row: Row) -> dict:
            return {method: difference.facts() for method, difference in row.differences.items()}

        return {
            "measure": self.measure,
            "methods": list(self.methods),
            "baseline": self.baseline,
            "collections": {
                row.name: {
                    "source": found.source,
                    "split": found.split,
                    "queries": row.queries,
                    "values": dict(row.means),
                    "differences": differences(row),
                    "not_comparable": sorted(row.not_comparable),
                    "errors": list(row.errors),
                }
                for row, found in zip(self.rows, self.collections, strict=True)
            },
            "mean": dict(self.mean.means) if self.mean else {},
            "mean_of": [found.name for found in self.whole],
            "mean_differences": differences(self.mean) if self.mean else {},
        }

    def print(self, console: Console) -> None:
        """Prints the table, with the best value of each collection in bold, and the notes."""
        table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(self.measure, overflow="fold")
        for heading in ("Queries", *self.methods):
            table.add_column(Text(heading), justify="right", overflow="fold")
        for row in self.all_rows:
            values = [Text(text, "bold" if best else "") for text, best in row.cells(self.methods)]
            table.add_row(Text(row.name), f"{row.queries:,}" if row.queries else "–", *values)
        console.print(table)
        for note in self.notes:
            console.print(Text(note, "dim"))

    def markdown(self) -> str:
        """Returns the table in Markdown, with the best value of each collection in bold, and the notes."""

        def line(cells: Sequence[str]) -> str:
            return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

        lines = [line([self.measure, "queries", *self.methods]), "|---|" + "--:|" * (len(self.methods) + 1)]
        for row in self.all_rows:
            values = [f"**{text}**" if best else text for text, best in row.cells(self.methods)]
            lines.append(line([row.name, f"{row.queries:,}" if row.queries else "–", *values]))
        return "\n".join([*lines, "", *(f"{note}  " for note in self.notes), ""])

    def write_page(
        self, path: str | os.PathLike, links: Mapping[str, str], footer: Mapping[str, str]
    ) -> None:
        """Writes the table as a page of HTML.

        Args:
          path: the file.
          links: name of a collection -> the address of its own report.
          footer: label -> text.
        """

        def row_of(row: Row) -> str:
            name = escape(row.name)
            if row is not self.mean and row.name in links:
                name = f'<a href="{escape(links[row.name])}">{name}</a>'
            queries = f"{row.queries:,}" if row.queries else "–"
            lines = "".join(f"<small>failed: {escape(error)}</small>" for error in row.errors)
            if not row.means:
                values = f'<td class="failed" colspan="{len(self.methods)}">{lines}</td>'
            else:
                values = "".join(
                    f'<td class="bar" style="--share:{min(max(row.means.get(method, 0), 0), 1):.1%}">'
                    f"{f'<b>{text}</b>' if best else text}</td>"
                    for method, (text, best) in zip(self.methods, row.cells(self.methods), strict=True)
                )
                name += lines
            return f"<tr><th>{name}</th><td>{queries}</td>{values}</tr>"

        of_mean = (
            " The last row has the mean of the collections' means, Welch's interval, and a test that "
            "permutes within each collection."
        )
        body = "".join(map(row_of, self.all_rows))
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        table = f'<div class="sweep">{page.html_table(("", "Queries", *self.methods), body)}</div>{notes}'
        others = [method for method in self.methods if method != self.baseline]
        compared = "".join(
            f"<tr><th>{escape(row.name)}</th>"
            f"{''.join(page.difference_cell(row.differences.get(m)) for m in others)}</tr>"
            for row in self.all_rows
            if row.differences
        )
        differences = (
            f'<div class="differences">{page.html_table(("", *others), compared)}</div><p>'
            f"{escape(page.difference_note(self.baseline))}"
            f"{of_mean if self.mean and self.mean.differences else ''}</p>"
        )
        facts = {"methods": self.methods, "collections": self.rows, "with all methods": self.whole}
        page.write_page(
            path,
            f"{self.measure} on {len(self.rows)} collections",
            {label: len(some) for label, some in facts.items()},
            (("Results", table), ("Differences", differences if compared else "")),
            footer,
        )
