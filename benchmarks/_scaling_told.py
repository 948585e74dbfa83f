"""What the points of the study of scale say: rows, fitted laws, and the paper's claims."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from _scaling_plan import DENSE, GENERATIVE, MAIN, WIDTH, Point

from retrieval_jax.core.progress import log
from retrieval_jax.evaluation.scaling_laws import fit_power_law, found_at, mean_interval, prediction_error
from retrieval_jax.evaluation.significance import randomization_test

MS_MARCO = 8_841_823
K = 10
CLOSE = 0.05  # the paper's "competitive": within 5% (80.3 beside 83.2 on MSMarco100k)
LEVEL = 0.05  # of the tests
Figures = Mapping[str, list]
Difference = tuple[float, float, float]  # the mean, and its interval


@dataclasses.dataclass(frozen=True)
class Row:
    """A point with all its seeds.

    Attributes:
      point: with seed 0.
      mrr_SxQ: MRR@10 of each test query with each seed.
      entropy_SxQ: the contrastive entropy; None of a searcher whose scores are no log-probabilities. NaN
        where a relevant passage had no score.
      flops, parameters, inner_parameters, coverage: as the first seed has them.
      recall_SxQ: Recall@10.
      relevant_Q, random_QxR: the first seed's scores.
    """

    point: Point
    mrr_SxQ: np.ndarray
    entropy_SxQ: np.ndarray | None
    recall_SxQ: np.ndarray
    flops: float
    parameters: int
    inner_parameters: int
    coverage: float
    relevant_Q: np.ndarray
    random_QxR: np.ndarray

    @classmethod
    def of(cls, point: Point, seeds: list[Figures]) -> "Row":
        """Joins the figures of a point's seeds."""
        first = seeds[0]
        entropy = first["contrastive_entropy"]
        return cls(
            point,
            np.array([one["mrr_at_10"] for one in seeds]),
            np.array([one["contrastive_entropy"] for one in seeds], np.float64) if entropy else None,
            np.array([one["recall_at_10"] for one in seeds]),
            *(first[name] for name in ("flops", "parameters", "inner_parameters", "coverage")),
            np.array(first["relevant_scores"], np.float64),
            np.array(first["random_scores"], np.float64),
        )

    def told(self) -> dict:
        """Gives a row of the JSON."""
        low, high = mean_interval(self.mrr_SxQ)
        entropy = None if self.entropy_SxQ is None else float(self.entropy_SxQ.mean())
        return {
            "corpus": self.point.size,
            "method": self.point.method,
            "mixture": self.point.mixture,
            "budget": self.point.budget,
            "width": self.point.width,
            "seeds": len(self.mrr_SxQ),
            "parameters": self.parameters,
            "flops": self.flops,
            "coverage": round(self.coverage, 3),
            "mrr_at_10": round(float(self.mrr_SxQ.mean()), 4),
            "interval": [round(low, 4), round(high, 4)],
            "recall_at_10": round(float(self.recall_SxQ.mean()), 4),
            "contrastive_entropy": None if entropy is None or not np.isfinite(entropy) else round(entropy, 4),
        }


def rows_of(figures: Mapping[Point, Figures]) -> list[Row]:
    """Joins the seeds of each point, in the order of the plan."""
    seeds: dict[Point, list[Figures]] = {}
    for point, one in figures.items():
        seeds.setdefault(dataclasses.replace(point, seed=0), []).append(one)
    return [Row.of(point, some) for point, some in seeds.items()]


def series(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Groups the rows of the usual width: (method, mixture, budget) -> its rows by size of the corpus."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.point.width == WIDTH:
            found.setdefault((row.point.method, row.point.mixture, row.point.budget), []).append(row)
    return {key: sorted(some, key=lambda row: row.point.size) for key, some in found.items()}


def fits(rows: list[Row]) -> list[dict]:
    """Fits the laws: contrastive entropy by corpus and by parameters, and Recall@10 in larger corpora."""
    told = []
    for key, some in series(rows).items():
        told += _law("contrastive entropy by passages", key, some, lambda row: row.point.size)
        told += _recalls(key, some)
    for method in GENERATIVE:
        key, some = (method, MAIN, "examples"), by_width(rows, method)
        told += _law("contrastive entropy by inner parameters", key, some, lambda row: row.inner_parameters)
    return told


def by_width(rows: list[Row], method: str) -> list[Row]:
    """Gives a method's rows on the corpus where it has several widths, the widest last."""
    fixed = {row.point.size for row in rows if row.point.width != WIDTH}
    some = [r for r in rows if r.point.size in fixed and r.point.method == method]
    some = [r for r in some if r.point.mixture == MAIN and r.point.budget == "examples"]
    return sorted(some, key=lambda row: row.point.width)


def _law(name: str, key: tuple, rows: list[Row], x: Callable[[Row], float]) -> list[dict]:
    """Fits all points, and all but the largest, which is predicted; fewer than three points give nothing.

    Points that a law cannot have, such as the entropy of weights that diverged, are left out, and named.
    """
    rows = [row for row in rows if row.entropy_SxQ is not None]
    fitting = [row for row in rows if 0 < row.entropy_SxQ.mean() < np.inf]
    for row in (row for row in rows if row not in fitting):
        log(f"{name}: {row.point.name}, {row.point.size:,} passages: no number above 0: left out")
    rows = fitting
    if len(rows) < 3:
        return []
    sizes, values = np.array([x(row) for row in rows]), [float(row.entropy_SxQ.mean()) for row in rows]
    law, smaller = fit_power_law(sizes, values), fit_power_law(sizes[:-1], values[:-1])
    return [
        dict(zip(("method", "mixture", "budget"), key, strict=True))
        | {"law": name, **dataclasses.asdict(law)}
        | {
            "smaller": dataclasses.asdict(smaller),
            "largest": int(sizes[-1]),
            "predicted": float(smaller(sizes[-1])),
            "before": values[-2],
            "seen": values[-1],
            "interval": mean_interval(rows[-1].entropy_SxQ),
            "difference": prediction_error(sizes, [row.entropy_SxQ for row in rows]),
        }
    ]


def _recalls(key: tuple, rows: list[Row]) -> list[dict]:
    """Predicts Recall@10 of the largest corpus from the one before, and of 8.8M passages from the largest.

    The scores are of each query's first relevant passage: this fits collections whose test queries have one.
    """
    if len(rows) < 2:
        return []
    smaller, largest = rows[-2:]
    told = dict(zip(("method", "mixture", "budget"), key, strict=True)) | {"law": "Recall@10 by passages"}
    from_smaller, far = _found(smaller, largest.point.size), _found(largest, MS_MARCO)
    seen = largest.recall_SxQ[0, : len(from_smaller)]  # of the queries whose scores are known
    return [
        told
        | {
            "from": smaller.point.size,
            "largest": largest.point.size,
            "predicted": float(from_smaller.mean()),
            "predicted_interval": mean_interval(from_smaller),
            "before": float(smaller.recall_SxQ[0, : len(from_smaller)].mean()),
            "seen": float(seen.mean()),
            "interval": mean_interval(seen),
            "difference": _mean(from_smaller - seen),
            "same_corpus": float(_found(largest, largest.point.size).mean()),
            "at_ms_marco": float(far.mean()),
        }
    ]


def _found(row: Row, passages: int) -> np.ndarray:
    return found_at(row.relevant_Q, row.random_QxR, k=K, passages=passages).astype(float)


def _paired(better: Row | None, worse: Row | None, share: float = 1.0) -> np.ndarray | None:
    """The differences in MRR@10 to a share of the other's, seeds × queries; None where a row is missing."""
    if better is None or worse is None:
        return None
    seeds = min(len(better.mrr_SxQ), len(worse.mrr_SxQ))
    return better.mrr_SxQ[:seeds] - share * worse.mrr_SxQ[:seeds]


def difference(better: Row | None, worse: Row | None) -> Difference | None:
    """The mean paired difference in MRR@10, and its interval; None where a row is missing."""
    values_SxQ = _paired(better, worse)
    return None if values_SxQ is None else _mean(values_SxQ)


def _mean(values_SxQ: np.ndarray) -> Difference:
    return float(values_SxQ.mean()), *mean_interval(values_SxQ)


def _change(smallest: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """How a difference changes from the smallest corpus to the largest: test queries are the same."""
    seeds = min(len(smallest), len(largest))
    return largest[:seeds] - smallest[:seeds]


def _shown(values_SxQ: np.ndarray) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*_mean(values_SxQ))


def _above(values_SxQ: np.ndarray) -> bool | None:
    """Whether a paired difference is above 0 (True) or below it (False); None where nothing decides.

    Of one seed the paired randomisation test decides, as a bootstrap is too sure of itself where few queries
    differ; of several seeds the interval, which counts these as drawn, too.
    """
    mean, low, high = _mean(values_SxQ)
    one_seed = len(values_SxQ) == 1
    decided = float(randomization_test(values_SxQ)[0]) <= LEVEL if one_seed else low > 0 or high < 0
    return mean > 0 if decided else None


def _no_gain(better: Row, than: Row) -> bool | None:
    """Whether a row has no gain in MRR@10 that counts over another row.

    It is True where the row is below 1 + CLOSE times the other one, else False where it is above the other
    one; None where nothing decides.
    """
    if _above(_paired(better, than, 1 + CLOSE)) is False:
        return True
    return False if _above(_paired(better, than)) else None


def _grows(gains: Mapping[int, np.ndarray]) -> bool | None:
    """Whether a gain is larger on the largest corpus than on the smallest, and is a gain there."""
    largest = gains[max(gains)]
    grown, gained = _above(_change(gains[min(gains)], largest)), _above(largest)
    if grown is False or gained is False:
        return False
    return True if grown and gained else None


def findings(rows: list[Row]) -> list[dict]:
    """Compares the claims of the paper's abstract with the rows; `agrees` is None where nothing decides.

    Beside the dual encoder is, at all sizes, the first of GENERATIVE that was run: nothing is chosen by MRR.
    """
    by, sizes = {row.point: row for row in rows}, sorted({row.point.size for row in rows})
    told = []

    def at(size: int, method: str, mixture: str = MAIN, **values: object) -> Row | None:
        return by.get(Point(size, method, mixture, **values))

    def tell(claim: str, seen: list[str], agrees: bool | None) -> None:
        told.append(
            {"claim": claim, "seen": "; ".join(seen) or "not run", "agrees": agrees if seen else None}
        )

    methods = ("atomic", "naive", "semantic")
    gains = {m: {s: _paired(at(s, m), at(s, m, "2a")) for s in sizes} for m in methods}
    gains = {m: {s: d for s, d in of.items() if d is not None} for m, of in gains.items()}
    seen = [f"{m}, {s:,}: {_shown(d)}" for m, of in gains.items() for s, d in of.items()]
    largest = [_above(of[max(of)]) for of in gains.values() if of]
    tell("synthetic queries are of central importance (3b over 2a)", seen, _all(largest))
    grown = {m: _change(of[min(of)], of[max(of)]) for m, of in gains.items() if len(of) > 1}
    seen = [f"{m}, the gain from the smallest corpus to the largest: {_shown(d)}" for m, d in grown.items()]
    tell("they matter more, the larger the corpus", seen, _all(_grows(gains[m]) for m in grown))

    seen, agree = [], []
    for s in sizes:
        for budget in ("flops", "examples"):
            pawa = at(s, "2-D + PAWA", budget=budget)
            plain = at(s, "semantic", budget=budget)
            if pawa and plain:
                seen.append(f"{s:,}, equal {budget}: {_shown(_paired(pawa, plain))}")
                agree += [_no_gain(pawa, plain)] if budget == "flops" else []
    tell("2-D docids with PAWA do not pay for their compute (over semantic)", seen, _all(agree))

    seen, agree = [], []
    for method in ("naive", "atomic"):
        if len(widths := by_width(rows, method)) > 2:
            *_, second, widest = widths
            shown = _shown(_paired(widest, second))
            seen.append(f"{method}, width {widest.point.width} over {second.point.width}: {shown}")
            agree.append(_no_gain(widest, second))
    tell("more parameters alone stop to help", seen, _all(agree))

    named = next((name for name in GENERATIVE if any(at(s, name) for s in sizes)), "")
    pairs = {s: (at(s, named), at(s, DENSE)) for s in sizes if at(s, named) and at(s, DENSE)}
    gaps = {s: _paired(*pair) for s, pair in pairs.items()}
    seen = [
        f"{s:,}: {named} {_shown(d)}, {d.mean() / max(pairs[s][1].mrr_SxQ.mean(), 1e-9):+.0%}"
        for s, d in gaps.items()
    ]
    small = _above(_paired(*pairs[min(pairs)], 1 - CLOSE)) if pairs else None
    tell("on small corpora it is competitive with dual encoders (95% of their MRR@10)", seen[:1], small)
    wider = None
    if len(gaps) > 1:
        change = _change(gaps[min(gaps)], gaps[max(gaps)])
        wider = None if _above(change) is None else not _above(change)
        seen.append(f"from the smallest corpus to the largest: {_shown(change)}")
    seen = seen if len(gaps) > 1 else []
    tell("on large corpora it is not: the gap to the dual encoder grows", seen, wider)
    return told


def _all(decided: Iterable[bool | None]) -> bool | None:
    """True or False where all say so, else None."""
    seen = {*decided}
    return seen.pop() if len(seen) == 1 else None
