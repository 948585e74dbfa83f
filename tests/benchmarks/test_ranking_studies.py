"""What planning.py and ranking.py print last: the figures that their help names, of each query's values."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import _study  # noqa: E402
import planning  # noqa: E402
import ranking  # noqa: E402

QUERIES = 40


def values(seed: int, mean: float) -> np.ndarray:
    return np.clip(mean + 0.01 * np.random.default_rng(seed).standard_normal(QUERIES), 0, 1)


class MadeUp:
    """A study whose planned search is .2 above BM25, whatever the beams, and loses half to typos."""

    def __init__(self, seed: int):
        self.seed = seed

    def measure(self, metric: str, split: str) -> dict:
        def mean(method: str) -> float:
            return (0.6 if method == "planned" else 0.4) * (0.5 if split == "test~typo" else 1)

        keys = planning.searchers(split)
        return {key: values(100 * self.seed + n, mean(key[0])) for n, key in enumerate(keys)}


def test_planning_has_a_value_for_each_method_and_beam_and_tests_them_against_bm25():
    told = planning.figures([MadeUp(0), MadeUp(1)])
    assert told.keys() == {
        *(f"{metric}{split}" for metric in ("mrr_at_10", "ndcg_at_10") for split in ("", "_typo")),
        *("over_bm25", "over_100_beams_unplanned"),
    }
    beams = {"1", "5", "10", "40", "100"}
    assert told["mrr_at_10"]["planned"].keys() == told["ndcg_at_10"]["unplanned"].keys() == beams
    assert told["ndcg_at_10_typo"]["planned"].keys() == {"10", "100"}
    assert told["ndcg_at_10"]["BM25"]["all"] == pytest.approx(0.4, abs=0.01)
    assert told["ndcg_at_10_typo"]["planned"]["10"] == pytest.approx(0.3, abs=0.01)
    difference, p = told["over_bm25"]["planned, 10"]
    assert difference == pytest.approx(0.2, abs=0.01)
    assert p < 0.01
    assert "BM25, all" not in told["over_bm25"]
    planning.show("made up", told)


def test_ranking_compares_all_methods_with_both_baselines():
    some = {method: values(n, 0.3 + 0.02 * n) for n, method in enumerate(ranking.SEARCHERS)}
    told = ranking.figures(some)
    assert told["ndcg_at_10"] == {method: pytest.approx(x.mean()) for method, x in some.items()}
    for name, baseline in ranking.BASELINES.items():
        assert told[name].keys() == some.keys() - {baseline}
        for method, (difference, _) in told[name].items():
            assert difference == pytest.approx((some[method] - some[baseline]).mean())
    ranking.show({"made up": told})


def test_collections_of_other_sizes_have_folders_of_their_own(tmp_path: Path):
    source = tmp_path / "words"
    source.mkdir()
    (tmp_path / "work" / "cut").mkdir(parents=True)
    for size in (2, 3):
        (tmp_path / "work" / "cut" / f"words_{size}").mkdir()
        (tmp_path / "work" / "cut" / f"words_{size}" / "qrels.test.tsv").touch()
    given = [f"{source}:2", f"{source}:3", str(source)]
    args = argparse.Namespace(collections=given, work=tmp_path / "work", seeds=1)
    found = dict(_study.studies(args, lambda here, work: (here[0], work.folder.name)))
    assert [*found] == ["words_2", "words_3", "words"]
    assert len({folder for ((_, folder),) in found.values()}) == 3
