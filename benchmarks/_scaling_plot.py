"""Draws the figures of the study of scale."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from _scaling_plan import DENSE, MAIN, METHODS, Point
from _scaling_told import Difference, Row, by_width, difference, series

from retrieval_jax.evaluation.scaling_laws import PowerLaw, mean_interval

# Colours that people who do not see all colours tell apart (Okabe and Ito 2008; wine of Tol's), and markers.
COLOURS = ("#777777", "#777777", "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
COLOURS += ("#882255",)
STYLES = {
    method: {"color": colour, "marker": marker}
    for method, colour, marker in zip(METHODS, COLOURS, "^vsoDPX<>*", strict=True)
}
SPREAD = 1.03  # between the places of two methods at the same corpus, so that intervals lie beside each other


class Panels:
    """The six panels of a figure.

    Args:
      axes: of Matplotlib.
      rows: what was measured.
    """

    def __init__(self, axes: Sequence, rows: list[Row]):
        self.corpus, self.flops, self.gain, self.gap, self.entropy, self.recall = axes
        self.rows, self.by = rows, {row.point: row for row in rows}
        self.sizes = sorted({row.point.size for row in rows})

    def by_corpus(self, ax, some: list[Row], value: Callable[[Row], tuple | None], **style: object) -> None:
        """Draws (mean, low, high) of the rows of a method by corpus; of None nothing."""
        method = some[0].point.method
        place = SPREAD ** ([*METHODS].index(method) - len(METHODS) / 2)
        points = [(row.point.size * place, value(row)) for row in some]
        _line(ax, [(x, y) for x, y in points if y], **STYLES[method], **style)

    def series(self, some: list[Row]) -> None:
        """Draws the rows of one method, mixture and budget."""
        point = some[0].point
        is_main, is_examples = point.mixture == MAIN, point.budget == "examples"
        if is_examples and point.mixture in (MAIN, None):
            self.by_corpus(self.corpus, some, _mrr, label=point.method)
        if is_main and some[0].flops:
            values = [(row.flops, _mrr(row)) for row in some]
            style = {} if is_examples else {"ls": ":", "mfc": "white"}
            _line(self.flops, values, **STYLES[point.method], **style)
        if is_examples and point.mixture in (MAIN, "6b"):
            style = {} if is_main else {"ls": ":", "mfc": "white"}
            self.by_corpus(self.gain, some, lambda row: self._over(row, row.point.method, "2a"), **style)
        if is_examples and is_main and point.method != DENSE:
            self.by_corpus(self.gap, some, lambda row: self._over(row, DENSE, MAIN))
        if is_examples and is_main and some[0].entropy_SxQ is not None:
            self.by_corpus(self.entropy, some, _entropy, ls="")

    def _over(self, row: Row, method: str, mixture: str) -> tuple | None:
        return difference(row, self.by.get(Point(row.point.size, method, mixture)))

    def widths(self, some: list[Row]) -> None:
        """Draws networks of several widths on one corpus."""
        style = STYLES[some[0].point.method] | {"ls": "--", "marker": ""}
        _line(self.flops, [(row.flops, _mrr(row)) for row in some], **style)

    def law(self, law: dict) -> None:
        """Draws a law, and what it predicts."""
        if law["mixture"] not in (MAIN, None) or law["budget"] != "examples":
            return
        style = STYLES[law["method"]]
        if law["law"] == "contrastive entropy by passages":
            xs = np.geomspace(self.sizes[0], law["largest"])
            self.entropy.plot(xs, PowerLaw(**law["smaller"])(xs), color=style["color"], lw=1, ls="--")
            self.entropy.plot(law["largest"], law["predicted"], mfc="white", **style)
        elif law["law"] == "Recall@10 by passages" and law["largest"] == self.sizes[-1]:
            x, y = ((law[k], *law[f"{of}interval"]) for k, of in (("seen", ""), ("predicted", "predicted_")))
            bars = {"xerr": _errors([x]), "yerr": _errors([y])}
            self.recall.errorbar(x[0], y[0], **bars, **style, ms=5, lw=0.8, capsize=0)

    def finish(self) -> None:
        """Names axes and panels."""
        shown = {
            self.corpus: ("MRR@10", "Effectiveness (equal examples; 3b)"),
            self.flops: ("MRR@10", "By FLOPs (hollow: equal FLOPs; dashed: widths)"),
            self.gain: ("difference in MRR@10", "Gain of synthetic queries: 3b - 2a (hollow: 6b - 2a)"),
            self.gap: ("difference in MRR@10", "Gap to the dual encoder"),
            self.entropy: (
                "nats",
                "Contrastive entropy (dashed: law of all but the largest)",
            ),
            self.recall: ("predicted from the corpus before", "Recall@10 of the largest corpus"),
        }
        for ax, (y, title) in shown.items():
            ax.set_title(title, fontsize=10)
            if not ax.has_data():
                ax.set_axis_off(), ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes)
                continue
            ax.set_ylabel(y), ax.grid(alpha=0.3)
            if ax is self.recall:
                continue
            ax.set_xscale("log")
            if ax is not self.flops:
                ax.set_xticks(self.sizes, [f"{size / 1000:.3g}k" for size in self.sizes])
                ax.set_xticks([], minor=True)
                ax.set_xlim(self.sizes[0] / 1.3, self.sizes[-1] * 1.3)
                ax.set_xlabel("passages")
        for ax in filter(lambda ax: ax.has_data(), (self.gain, self.gap)):
            ax.axhline(0, color="black", lw=0.8)
        self.flops.set_xlabel("floating-point operations of the training")
        self.recall.set(xlabel="seen", xlim=(0, 1), ylim=(0, 1))
        self.recall.axline((0, 0), slope=1, color="grey", lw=0.8)
        for ax in (self.corpus, self.flops):
            ax.set_ylim(bottom=0)


def draw(name: str, rows: list[Row], told: list[dict], path: Path) -> None:
    """Draws the paper's figures: by corpus, by operations, gains of synthetic queries, gaps, and the laws.

    Args:
      name: of the collection.
      rows: what was measured.
      told: the laws that were fitted.
      path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 9))
    panels = Panels([*axes.flat], rows)
    for some in series(rows).values():
        panels.series(some)
    for method in METHODS:
        if len(some := by_width(rows, method)) > 1:
            panels.widths(some)
    for law in told:
        panels.law(law)
    panels.finish()
    lines, labels = panels.corpus.get_legend_handles_labels()
    figure.suptitle(f"{name}: means over test queries, 95% intervals")
    figure.legend(lines, labels, loc="lower center", ncols=5, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _mrr(row: Row) -> Difference:
    return float(row.mrr_SxQ.mean()), *mean_interval(row.mrr_SxQ)


def _entropy(row: Row) -> Difference:
    return float(row.entropy_SxQ.mean()), *mean_interval(row.entropy_SxQ)


def _errors(values: list[Difference]) -> np.ndarray:
    """Gives the lengths of error bars, 2×N, of (mean, low, high)."""
    middle, low, high = np.array(values).T
    return np.maximum([middle - low, high - middle], 0)


def _line(ax, points: list[tuple[float, Difference]], **style: object) -> None:
    """Draws points (x, (mean, low, high)), in the order of x."""
    if not points:
        return
    xs, values = zip(*sorted(points), strict=True)
    ax.errorbar(xs, [y for y, _, _ in values], _errors(values), ms=5, lw=1.2, capsize=2, **style)
