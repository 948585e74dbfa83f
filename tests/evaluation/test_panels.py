"""Panels of learning curves; what a whole page has of them is in test_report.py."""

import re

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
