"""What the runs of the study of several positives say: comparisons, tables and plots."""

import argparse
import dataclasses
import math

import numpy as np
from _allocation import OBJECTIVES
from ir_measures import RR, R
from rich.console import Console
from rich.table import Table

from retrieval_jax.evaluation import significance
from retrieval_jax.evaluation.method_table import mark
from retrieval_jax.evaluation.scaling_laws import mean_interval
from retrieval_jax.evaluation.significance import Difference

METRICS = {"MRR@10": RR @ 10, "Recall@100": R @ 100}
# Colours that people who do not see all colours tell apart (Okabe and Ito 2008), and markers.
COLOURS = dict(zip(OBJECTIVES, ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
MARKERS = dict(zip(OBJECTIVES, "so^Dv", strict=True))


@dataclasses.dataclass(frozen=True)
class Method:
    """An objective, the most positives of a query, and whether the teacher's scores are learned, too."""

    objective: str
    positives: int
    distilled: bool

    def __str__(self) -> str:
        return f"{self.objective} {self.positives}{' distilled' if self.distilled else ''}"


def methods(args: argparse.Namespace) -> list[Method]:
    """Lists the methods of the command line; the first is the baseline, which is there in any case."""
    chosen = [("InfoNCE", 1), *((name, m) for m in args.positives for name in args.objectives)]
    listed = [Method(*one, bool(distilled)) for distilled in args.distillation for one in chosen]
    return [*dict.fromkeys([Method("InfoNCE", 1, distilled=False), *listed])]


def compare(studies: dict[str, dict], args: argparse.Namespace) -> dict[tuple, Difference]:
    """Compares with the baseline on the same labels.

    Args:
      studies: name of a collection -> what `study` gives.
      args: for the baseline.

    Returns:
      (collection, method, labels, metric) -> the difference of the means over seeds, over test queries;
      p-values are corrected over all of these.
    """
    baseline, found = methods(args)[0], {}
    for name, by in studies.items():
        differences = {
            (name, method, labels, metric): (values[metric] - by[baseline, labels][metric]).mean(0)
            for (method, labels), values in by.items()
            for metric in METRICS
            if method != baseline
        }
        queries = len(by[baseline, args.labels[0]][next(iter(METRICS))][0])
        found |= significance.compare(np.zeros(queries), differences)
    corrected = significance.holm_bonferroni([one.p for one in found.values()])
    return {
        key: dataclasses.replace(one, p_holm=float(p))
        for (key, one), p in zip(found.items(), corrected, strict=True)
    }


def tell(name: str, found: dict, differences: dict[tuple, Difference], args: argparse.Namespace) -> dict:
    """Prints the table; gives {"OBJECTIVE MOST LABELS": {metric: [mean, low, high], "differences", …}}."""
    table, told = Table(*("objective", "positives", "teacher"), title=name), {}
    for labels in args.labels:
        for metric in METRICS:
            table.add_column(f"{metric}\n{labels}", justify="right")
    baseline, *_ = methods(args)
    for method in methods(args):
        cells = []
        for labels in args.labels:
            one = told[f"{method} {labels}"] = {}
            for metric in METRICS:
                values = found[method, labels][metric]
                low, high = mean_interval(values)
                difference, shown = differences.get((name, method, labels, metric)), ""
                one[metric] = [round(float(x), 4) for x in (values.mean(), low, high)]
                if difference:
                    over_seeds = mean_interval(values - found[baseline, labels][metric])
                    shown = mark(difference) if over_seeds[0] > 0 or over_seeds[1] < 0 else ""
                    facts = difference.facts() | {"over_seeds": [round(x, 4) for x in over_seeds]}
                    one.setdefault("differences", {})[metric] = facts
                cells.append(f"{shown}{values.mean():.3f} ±{(high - low) / 2:.3f}")
            one |= {k: v for k, v in found[method, labels].items() if k in ("start", "end")}
        table.add_row(method.objective, str(method.positives), "yes" if method.distilled else "", *cells)
    console = Console(width=170)
    console.print(table)
    columns = ("labels", "step", "queries", "strongest first, by autodiff", "pushed down", "formula off by")
    table = Table("gradient on positives", *columns)
    for key, one in told.items():
        for when in (when for when in ("start", "end") if when in one):
            method, labels = key.rsplit(" ", 1)
            ranks = " ".join(f"{x:+.3f}" for x in one[when]["by_rank"])
            facts = f"{one[when]['pushed_down']:.0%}", f"{one[when]['difference']:.1e}"
            table.add_row(method, labels, when, str(one[when]["queries"]), ranks, *facts)
    console.print(table)
    return told


def draw(told: dict[str, dict], args: argparse.Namespace) -> None:
    """Draws the metrics by labels, with 95% intervals; hollow: distilled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    width = max(4.4, 1.5 * len(args.labels)) * len(told)
    figure, axes = plt.subplots(2, len(told), figsize=(width, 6.4), squeeze=False, sharex=True)
    shown = methods(args)
    for column, (name, by) in enumerate(told.items()):
        for row, metric in enumerate(METRICS):
            ax = axes[row][column]
            for i, method in enumerate(shown):
                points = np.array([by[f"{method} {labels}"][metric] for labels in args.labels]).T
                errors = np.abs(points[1:] - points[0])
                at = np.arange(len(args.labels)) + (i - len(shown) / 2) * 0.06
                colour = COLOURS[method.objective]
                style = {"color": colour, "mfc": "white" if method.distilled else colour}
                style |= {"marker": MARKERS[method.objective], "ms": 5, "capsize": 2, "ls": ""}
                ax.errorbar(at, points[0], errors, label=str(method), **style)
            ax.set_title(name if row == 0 else "")
            ax.set_ylabel(metric if column == 0 else "")
            ax.grid(alpha=0.3)
        ax.set_xticks(range(len(args.labels)), args.labels)
        ax.set_xlabel("labels")
    lines, labels = axes[0][0].get_legend_handles_labels()
    columns = int(width / 1.45)  # inches of a label
    figure.legend(lines, labels, loc="lower center", ncols=columns, fontsize=7)
    figure.tight_layout(rect=(0, 0.03 + 0.03 * math.ceil(len(labels) / columns), 1, 1))
    figure.savefig(args.plot, dpi=110)
    plt.close(figure)


def draw_gradients(told: dict[str, dict], args: argparse.Namespace) -> None:
    """Draws the gradient on positives by their rank: bars by autodiff, crosses by the formulas."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [m for m in methods(args) if m.positives == max(args.positives) and not m.distilled]
    columns = [(name, when) for name in told for when in ("start", "end")]
    figure, axes = plt.subplots(
        1, len(columns), figsize=(4.6 * len(columns), 3.6), squeeze=False, sharey=True
    )
    for ax, (name, when) in zip(axes[0], columns, strict=True):
        for i, method in enumerate(m for m in shown if m.positives > 1):
            one = told[name][f"{method} {args.labels[0]}"].get(when)
            if one:
                ranks = np.arange(len(one["by_rank"]))
                at = ranks + (i - 1.5) * 0.2
                ax.set_xticks(ranks, ranks + 1)
                ax.bar(at, one["by_rank"], 0.18, label=method.objective, color=COLOURS[method.objective])
                ax.plot(at, one["formula"], "kx", ms=4)
        ax.set_title(f"{name}, {args.labels[0]}: {'first step' if when == 'start' else 'last step'}")
        ax.set_xlabel("the query's positives, the highest score first")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("∂ loss / ∂ score")
    lines, labels = axes[0][-1].get_legend_handles_labels()
    title = "bars: by autodiff; crosses: the paper's formulas"
    figure.legend(lines, labels, loc="lower center", ncols=5, fontsize=8, title=title, title_fontsize=8)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(args.gradients, dpi=110)
    plt.close(figure)
