"""Panels of learning curves and of differences by query, drawn as inline SVG for the report's page."""

import dataclasses
import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # slow to import, and only reports need it
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class TrainingCurve:
    """A model's learning curve.

    Attributes:
      name: the model's name.
      points: each has "step", "minutes", and "loss", "dev/METRIC", "dev_pool/METRIC" or several (see PANELS).
    """

    name: str
    points: list[dict[str, float]]


PANELS = {
    "loss": ("Training loss", "nats"),
    "dev/Hits@1": ("Hits@1 on dev", "fraction of queries"),
    "dev/Hits@10": ("Hits@10 on dev", "fraction of queries"),
    "dev/MRR@10": ("MRR@10 on dev", "mean reciprocal rank"),
    "dev_pool/Hits@1": ("Hits@1 on dev, in a pool of passages", "fraction of queries"),
    "dev_pool/Hits@10": ("Hits@10 on dev, in a pool of passages", "fraction of queries"),
    "dev_pool/MRR@10": ("MRR@10 on dev, in a pool of passages", "mean reciprocal rank"),
}
"""Key of a curve's point -> title and unit (y axis) of its panel; the x axis shows "minutes"."""

# The colours of Okabe and Ito, which colour-blind readers can tell apart, but for those too faint to see.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
_INK = "#123456"  # stands for the page's text colour until the figure is in the page
_BETTER, _WORSE = _COLOURS[0], _COLOURS[3]
_STEPS = 400  # bars of a panel: more queries are drawn by this many of their quantiles


def figure(curves: Sequence[TrainingCurve]) -> str:
    """Draws the panels that any curve has points for, and a legend, as HTML; "" if there are none."""
    panels = "".join(_panel(curves, key) for key in PANELS)
    if not panels:
        return ""
    legend = "".join(
        f'<li style="--colour:{_COLOURS[i % len(_COLOURS)]}">{escape(curve.name + _pool(curve))}</li>'
        for i, curve in enumerate(curves)
    )
    return (
        f'<figure><ul class="legend">{legend}</ul><div class="panels">{panels}</div><figcaption>Losses of '
        "different methods measure different things: compare them within a method only. In a smaller "
        "pool more queries are answered: compare models in pools of the same size.</figcaption></figure>"
    )


def _pool(curve: TrainingCurve) -> str:
    """Tells the sizes of the pools that a model was evaluated in, which make its metrics high or low."""
    sizes = dict.fromkeys(int(p["dev_pool/passages"]) for p in curve.points if p.get("dev_pool/passages"))
    return f" (in a pool of {' / '.join(f'{size:,}' for size in sizes)})" if sizes else ""


def _panel(curves: Sequence[TrainingCurve], key: str) -> str:
    """Draws a panel as inline SVG, in the page's font and text colour; "" if no curve has such points."""
    lines = [
        [(p["minutes"], p[key]) for p in curve.points if None not in (p.get("minutes"), p.get(key))]
        for curve in curves
    ]
    if not any(lines):
        return ""
    from matplotlib.ticker import LogLocator

    title, unit = PANELS[key]

    def draw(axes: "Axes") -> None:
        axes.set(xlabel="training time (minutes)", ylabel=unit)
        for i, points in enumerate(lines):
            if points:
                style = "o" if len(points) == 1 else "-"  # a line through one point is invisible
                axes.plot(*zip(*points, strict=True), style, color=_COLOURS[i % len(_COLOURS)])
        low, high = axes.dataLim.intervaly
        if key == "loss" and 0 < 10 * low < high:  # too few ticks on a log axis of less than a decade
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")

    return _svg(draw, title, f"{title} ({unit}) against minutes of training", key)


def difference_figure(metric: str, baseline: str, differences: Mapping[str, np.ndarray]) -> str:
    """Draws a panel for each method: its difference to the baseline in each query, in descending order.

    Args:
      metric: the metric's name.
      baseline: the baseline's name.
      differences: method -> float Q, its value minus the baseline's. Queries without a finite difference are
        counted, and not drawn.
    """
    largest = max(
        (np.abs(values_Q).max(initial=0, where=np.isfinite(values_Q)) for values_Q in differences.values()),
        default=0,
    )
    limit = max(1.05 * largest, 0.05)  # the same in all panels
    panels = "".join(
        _difference_panel((metric, name, baseline), values_Q, limit) for name, values_Q in differences.items()
    )
    return (
        f'<figure><div class="panels">{panels}</div><figcaption>{escape(metric)} of each query minus that of '
        f"{escape(baseline)}, the queries sorted by it.</figcaption></figure>"
    )


def _difference_panel(names: tuple[str, str, str], values_Q: np.ndarray, limit: float) -> str:
    """Draws the panel of (the metric, a method, the baseline), with an axis from -limit to limit."""
    metric, name, baseline = names
    undefined = int((~np.isfinite(values_Q)).sum())
    values_Q = values_Q[np.isfinite(values_Q)]
    falling_Q = np.sort(values_Q)[::-1]
    better, worse = int((values_Q > 0).sum()), int((values_Q < 0).sum())
    counts = f"better in {better:,} queries, worse in {worse:,}, equal in {len(values_Q) - better - worse:,}"
    counts += f", undefined in {undefined:,}" if undefined else ""
    steps = min(_STEPS, len(falling_Q)) or 1
    falling_Q = falling_Q if len(falling_Q) else np.zeros(1)
    edges = np.arange(steps + 1) * len(falling_Q) / steps
    heights = falling_Q[((edges[:-1] + edges[1:]) / 2).astype(int)]

    def draw(axes: "Axes") -> None:
        axes.set(xlabel=f"queries\n{counts}", ylabel=f"difference in {metric}", xlim=(0, len(falling_Q)))
        for colour, part in ((_BETTER, heights.clip(min=0)), (_WORSE, heights.clip(max=0))):
            axes.stairs(part, edges, fill=True, color=colour)
        axes.axhline(0, color=_INK, linewidth=0.8)
        axes.set_ylim(-limit, limit)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _svg(draw, name, f"{name} minus {baseline}, {metric}: {counts}", name)


def loss_figure(measure: str, losses: Mapping[str, Mapping[str, float]]) -> str:
    """Draws the relative loss of each method by each kind of variation, as points in a row for each kind.

    Args:
      measure: the measure's name.
      losses: method -> kind -> the share of the measure that is lost; NaN is not drawn.
    """
    kinds = list(dict.fromkeys(kind for of_kinds in losses.values() for kind in of_kinds))
    legend = "".join(
        f'<li style="--colour:{_COLOURS[i % len(_COLOURS)]}">{escape(name)}</li>'
        for i, name in enumerate(losses)
    )

    def draw(axes: "Axes") -> None:
        for i, of_kinds in enumerate(losses.values()):
            places = [kinds.index(kind) + 0.5 * ((i + 0.5) / len(losses) - 0.5) for kind in of_kinds]
            values = [100 * loss for loss in of_kinds.values()]
            axes.plot(values, places, "o", color=_COLOURS[i % len(_COLOURS)], markersize=5)
        axes.axvline(0, color=_INK, linewidth=0.8)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set(xlabel=f"loss of {measure} (%)", ylim=(len(kinds) - 0.5, -0.5))

    return (
        f'<figure><ul class="legend">{legend}</ul><div class="panels">'
        f"{_svg(draw, 'Loss by variation', f'relative loss of {measure} by each variation', 'losses')}</div>"
        "</figure>"
    )


def _svg(draw: Callable[["Axes"], None], title: str, label: str, salt: str) -> str:
    """Draws a panel as inline SVG, in the page's font and text colour.

    Args:
      draw: draws on the panel's axes.
      title: the panel's heading.
      label: what it shows, for those who do not see it.
      salt: a text of its own, which makes the page the same from run to run and keeps the panels' ids apart.
    """
    import matplotlib
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    # Text stays text, also with the signs of formulas in it.
    settings = dict.fromkeys(inks, _INK) | {"svg.fonttype": "none", "svg.hashsalt": salt}
    with matplotlib.rc_context(settings | {"text.parse_math": False}):
        drawn = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = drawn.add_subplot()
        axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
        draw(axes)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        svg = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawn.savefig(svg, format="svg", transparent=True, metadata=nothing)
    drawing = svg.getvalue()
    drawing = re.sub(r' id="[a-z0-9.]+_\d+"', "", drawing[drawing.index("<svg") :])  # the same in all panels
    named = f'<svg role="img" aria-label="{escape(label)}"'
    return drawing.replace("<svg", named, 1).replace(_INK, "currentColor")
