"""Panels of learning curves, drawn as inline SVG for the report's page."""

import dataclasses
import io
import re
from collections.abc import Sequence
from html import escape


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
    import matplotlib  # slow to import, and only reports need it
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    title, unit = PANELS[key]
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    # Text stays text. The salt makes the page the same from run to run and keeps the panels' ids apart.
    settings = dict.fromkeys(inks, _INK) | {"svg.fonttype": "none", "svg.hashsalt": key}
    with matplotlib.rc_context(settings):
        drawn = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = drawn.add_subplot(xlabel="training time (minutes)", ylabel=unit)
        axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
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
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        svg = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawn.savefig(svg, format="svg", transparent=True, metadata=nothing)
    drawing = svg.getvalue()
    drawing = re.sub(r' id="[a-z0-9.]+_\d+"', "", drawing[drawing.index("<svg") :])  # the same in all panels
    named = f'<svg role="img" aria-label="{escape(title)} ({escape(unit)}) against minutes of training"'
    return drawing.replace("<svg", named, 1).replace(_INK, "currentColor")
