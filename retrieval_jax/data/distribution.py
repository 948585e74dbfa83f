"""How scores are distributed: what manifests hold of them as "distribution", and the table that is logged."""

from collections.abc import Mapping, Sequence

import numpy as np

from retrieval_jax.core.progress import log

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_NAMES = [f"{quantile:.0%}" for quantile in QUANTILES]


def describe(values: Sequence[float]) -> dict[str, float]:
    """Returns the "count", the "mean" and the QUANTILES ("5%", …) of values, NaN left out; {} of none."""
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return {}
    quantiles = np.quantile(values, QUANTILES).tolist()
    return {"count": len(values), "mean": float(values.mean())} | dict(zip(_NAMES, quantiles, strict=True))


def log_table(distribution: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Logs the QUANTILES, unless there are none.

    Args:
      distribution: name of a row -> what `describe` returned.
      title: the line above the table.
    """
    rows = [
        [name, *(f"{described[quantile]:.4g}" for quantile in _NAMES)]
        for name, described in distribution.items()
        if described
    ]
    if rows:
        log(title)
    for name, *cells in [["", *_NAMES], *rows] if rows else []:
        log(f"  {name:<9}" + "".join(f"{cell:>10}" for cell in cells))
