"""Panels of learning curves; what a whole page has of them is in test_report.py."""

import re

import numpy as np

from retrieval_jax.evaluation import panels
from retrieval_jax.evaluation.panels import TrainingCurve


def test_the_legend_tells_the_sizes_of_pools():
    points = [
        {"step": n, "minutes": 1.0 * n, "dev_pool/MRR@10": 0.5, "dev_pool/passages": size}
        for n, size in enumerate([5000, 5000, 12000])
    ]
    naive = TrainingCurve("naive", [{"step": 1, "minutes": 1.0, "dev/MRR@10": 0.5}])
    html = panels.figure([TrainingCurve("dense", points[:2]), TrainingCurve("longer", points), naive])
    legend = re.findall("<li[^>]*>([^<]*)</li>", html)
    assert legend == ["dense (in a pool of 5,000)", "longer (in a pool of 5,000 / 12,000)", "naive"]
    titles = [panels.PANELS[key][0] for key in ("dev/MRR@10", "dev_pool/MRR@10")]
    assert re.findall('aria-label="([^(]*) \\(', html) == titles
    assert panels.figure([TrainingCurve("new", [])]) == ""


def test_differences_are_drawn_in_falling_order_on_one_scale():
    """Also of more queries than a panel has bars; names are text, whatever signs are in them."""
    many = np.linspace(-1, 0.5, 3001)
    html = panels.difference_figure("nDCG@10", "<bm25>", {"a$b$": many, "b": np.array([0.25, 0.0, -0.5])})
    labels = re.findall('aria-label="([^"]*)"', html)
    assert labels == [
        "a$b$ minus &lt;bm25&gt;, nDCG@10: better in 1,000 queries, worse in 2,000, equal in 1",
        "b minus &lt;bm25&gt;, nDCG@10: better in 1 queries, worse in 1, equal in 1",
    ]
    assert "a$b$</text>" in html
    ticks = [re.findall(r">(−?[0-9.]+)</text>", svg) for svg in html.split("<svg")[1:]]
    assert [tick for tick in ticks[0] if "." in tick] == [tick for tick in ticks[1] if "." in tick]


def test_queries_without_a_difference_are_counted_and_not_drawn():
    html = panels.difference_figure(
        "m", "bm25", {"a": np.array([np.nan, 0.5, np.inf]), "b": np.full(2, np.nan)}
    )
    assert re.findall('aria-label="([^"]*)"', html) == [
        "a minus bm25, m: better in 1 queries, worse in 0, equal in 0, undefined in 2",
        "b minus bm25, m: better in 0 queries, worse in 0, equal in 0, undefined in 2",
    ]
    assert "nan" not in html.lower().replace("dominant", "")
