"""The study of scale: its plan, what it says of figures that are made up, and its quick run."""

import copy
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from _scaling_plan import MAIN, METHODS, ROWS, Choice, Point, Sizes, points, seconds_of  # noqa: E402
from _scaling_plot import draw  # noqa: E402
from _scaling_run import Study, _once, listed  # noqa: E402
from _scaling_told import findings, fits, rows_of  # noqa: E402
from scaling import measure  # noqa: E402

from retrieval_jax.data.vocabulary import Vocabulary  # noqa: E402
from retrieval_jax.evaluation.scaling_laws import mean_interval  # noqa: E402

CHOICE = Choice((1000, 16_000), [*METHODS], ROWS, ("examples", "flops"), (64, 128, 512), 16_000, 2, 400)


def test_every_point_has_a_name_of_its_own_on_its_corpus():
    plan = [*points(CHOICE)]
    assert len({(point.size, point.name) for point in plan}) == len(plan)
    assert [point.size for point in plan if point.seed == 0 and point.method == "BM25"] == [1000, 16_000]
    assert not [point for point in plan if point.seed and point.mixture is None]
    of_flops = {(point.method, point.mixture) for point in plan if point.budget == "flops"}
    assert of_flops == {(name, MAIN) for name in ("atomic", "semantic", "2-D + PAWA", "rq")}
    wide = {(p.size, p.method, p.width) for p in plan if p.width != 256}
    assert wide == {(16_000, name, width) for name in ("atomic", "naive") for width in (64, 128, 512)}
    rows = {p.mixture for p in plan if p.method == "naive"}
    assert rows == {"1a", "2a", "3b", "6b"}


def test_steps_grow_with_the_root_of_the_corpus_as_in_the_paper():
    assert CHOICE.steps_of(1000) == 400
    assert CHOICE.steps_of(16_000) == 1600
    paper = Choice((), (), (), (), (), 0, 1, 1_000_000 / 10)  # 1M steps at 100k passages
    assert paper.steps_of(100_000) == 1_000_000
    assert paper.steps_of(8_841_823) == pytest.approx(9_000_000, rel=0.06)


def test_other_widths_are_on_the_nearest_corpus():
    plan = points(dataclasses.replace(CHOICE, fixed=12_000))
    assert {point.size for point in plan if point.width != 256} == {16_000}


def test_a_larger_corpus_takes_longer():
    small, large = (seconds_of(Point(size, "naive", MAIN), CHOICE, 500, 1000) for size in (1000, 16_000))
    assert 0 < small < large
    # As many operations as naive docids take about as long, whatever a step takes.
    pawa = (seconds_of(Point(1000, "2-D + PAWA", MAIN, b), CHOICE, 500, 1000) for b in ("flops", "examples"))
    assert small == next(pawa) < next(pawa)


@pytest.fixture(scope="module")
def study(source, tmp_path_factory):
    choice = Choice((60,), [*METHODS], ROWS, ("examples", "flops"), (), 60, 1, 30)
    sizes, bindings = Sizes(10, 5), ["import_collection.vocab_size=1000"]
    return Study(str(source), tmp_path_factory.mktemp("scaling"), choice, sizes, bindings)


def test_what_a_point_is_made_of_is_in_its_name(study, tmp_path, monkeypatch):
    def names(**values: object) -> list[str]:
        other = copy.copy(study)
        vars(other).pop("generator_name", None)
        vars(other).update(values)
        every = (Point(60, "atomic", "1a"), Point(60, "semantic", "1a"), Point(60, "semantic", MAIN, "flops"))
        return [other.name_of(point) for point in every]

    first = names()
    assert first == names()
    assert len({*first}) == 3
    whole = copy.copy(study.whole)
    whole.fingerprint = "other"
    for others in (
        names(choice=dataclasses.replace(study.choice, steps=60)),
        names(whole=whole),
        names(bindings=[*study.bindings, "adamw.b1=0.5"]),
    ):
        assert not {*first} & {*others}
    # Vectors that docids cluster are of a model that reads synthetic queries.
    larger = names(choice=dataclasses.replace(study.choice, sizes=(60, 80)))
    assert [a == b for a, b in zip(first, larger, strict=True)] == [True, False, False]
    (tmp_path / "other.gin").write_text("include 'runs/atomic.gin'\nadamw.b1 = 0.5\n")
    other = dataclasses.replace(METHODS["atomic"], files=(str(tmp_path / "other.gin"),))
    monkeypatch.setitem(METHODS, "atomic", other)
    assert names()[0] != first[0]
    assert names()[1:] == first[1:]


def test_operations_of_a_step_are_counted_before_it_has_a_number_of_steps(study):
    point = Point(60, "naive", "1a")
    study.prepare(60, False)
    study.make_docids(point)
    wide = dataclasses.replace(point, width=512)
    assert 0 < 3 * study.flops_per_step(point) < study.flops_per_step(wide)


def test_operations_of_planning_are_those_of_its_trainings(study, tmp_path):
    point = Point(60, "rq + planning", MAIN)
    study.prepare(60, False)
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32))
    study.run(60, "docids", "DOCIDS='rq_8x256'", f"EMBEDDINGS={str(tmp_path / 'vectors.npy')!r}")
    study.run(60, "sets", f"SETS={study.name_of(point)!r}", "make_sets.m=128")
    flops = {stage: study.flops_per_step(point, stage) for stage in ("dense", "query", "rank")}
    # Without layers: 32 positions by all tokens; a query by its own passage's set, and by all of the batch.
    vocabulary = Vocabulary(study.whole.vocabulary_path).size
    assert flops["query"] == 3 * 2 * 128 * vocabulary * (32 * 256 + 1 + 128)
    assert flops["rank"] > 3 * 2 * 64 * vocabulary * 32 * 256  # the lexical head's, of half as many queries
    assert 0 < flops["dense"] < flops["rank"]


def test_a_point_that_fails_is_told_and_the_others_go_on(study, monkeypatch):
    calls = []

    def generator(_):
        calls.append(1)
        raise ValueError("no queries")

    monkeypatch.setattr(Study, "generator", _once(generator))
    broken = dataclasses.replace(METHODS["atomic"], files=("missing.gin",))
    monkeypatch.setitem(METHODS, "broken", broken)
    some = ("broken", "BM25 + doc2query", "atomic", "BM25")
    monkeypatch.setattr(study, "choice", dataclasses.replace(study.choice, methods=some, mixtures=("6b",)))
    found, failed = measure(study, math.inf)
    assert [point.method for point in found] == ["BM25"]
    assert [point.method for point in failed] == ["broken", "BM25 + doc2query", "atomic"]
    first, *others = failed.values()
    assert "missing.gin" in first
    assert others == ["ValueError: no queries"] * 2
    assert len(calls) == 1  # not tried for each


def test_a_model_that_was_deleted_is_trained_again(study, monkeypatch):
    def train(study: Study, point: Point) -> None:
        model(point).mkdir(parents=True, exist_ok=point.width == 64)
        if point.width == 64:
            raise ValueError("not trained")

    def model(point: Point) -> Path:
        return study.work(60).model(study.name_of(point))

    monkeypatch.setattr(Study, "train", _once(train))
    point = Point(60, "dual encoder", MAIN)
    for _ in range(2):
        study.train(point)
        study.train(point)  # once: there is a folder
        study.forget(point)
        assert not model(point).exists()
    broken = dataclasses.replace(point, width=64)
    for _ in range(2):  # what fails is not tried again
        with pytest.raises(ValueError, match="not trained"):
            study.train(broken)
        study.forget(broken)
        assert not model(broken).exists()


def test_numbers_that_are_not_finite_are_null():
    assert listed(np.array([[1.5, np.nan], [np.inf, 2]])) == [[1.5, None], [None, 2]]


def figures(mrr: float, entropy: float | None, *, noise: float = 0.0, inner: int = 100) -> dict:
    random = np.random.default_rng(0)
    values = np.clip(mrr + random.normal(0, noise, 200), 0, 1) if noise else np.full(200, mrr)
    return {
        "mrr_at_10": values.tolist(),
        "recall_at_10": (values > 0).tolist(),
        "contrastive_entropy": entropy and [entropy] * 20,
        **{"flops": 1e9, "parameters": 1000, "inner_parameters": inner, "coverage": 0.5},
        "relevant_scores": random.normal(3, 1, 20).tolist(),
        "random_scores": random.normal(size=(20, 500)).tolist(),
    }


@pytest.fixture(scope="module")
def rows():
    made = {}
    for size, atomic, dense in ((1000, 0.48, 0.5), (4000, 0.40, 0.5), (16_000, 0.3, 0.45)):
        made[Point(size, "BM25")] = figures(0.6, None)
        made[Point(size, "dual encoder", MAIN)] = figures(dense, 1.0)
        made[Point(size, "atomic", MAIN)] = figures(atomic, 0.5 * size**0.25)
        made[Point(size, "atomic", "2a")] = figures(atomic - size / 80_000, 3.0)
        made[Point(size, "semantic", MAIN, "flops")] = figures(0.3, 3.0)
        made[Point(size, "2-D + PAWA", MAIN, "flops")] = figures(0.25, 3.0)
    for width, mrr in ((64, 0.1), (512, 0.3)):
        made[Point(16_000, "atomic", MAIN, width=width)] = figures(mrr, 1.0, inner=width)
    made[Point(1000, "atomic", MAIN, seed=1)] = figures(0.46, 0.5 * 1000**0.25)
    return rows_of(made)


def test_what_differences_say_of_the_claims(rows):
    synthetic, growth, pawa, size, small, large = findings(rows)
    assert synthetic["agrees"] is True
    assert "atomic, 16,000: +0.200 [+0.200, +0.200]" in synthetic["seen"]
    assert growth["agrees"] is True
    assert "+0.18" in growth["seen"]  # 15,000 / 80,000
    assert pawa["agrees"] is True
    assert "1,000, equal flops: -0.050" in pawa["seen"]
    assert size["agrees"] is True  # equal to the narrower one
    assert small["agrees"] is True  # .02 below .5: less than a twentieth
    assert large["agrees"] is True
    assert "16,000: atomic -0.150 [-0.150, -0.150], -33%" in large["seen"]


def test_an_interval_with_0_decides_nothing_and_what_is_missing_is_said():
    noisy = {
        Point(1000, "atomic", MAIN): figures(0.3, 1.0, noise=0.1),
        Point(1000, "atomic", "2a"): figures(0.3, 1.0),
    }
    synthetic, growth, pawa, *_ = findings(rows_of(noisy))
    assert synthetic["agrees"] is None
    assert growth["agrees"] is pawa["agrees"] is None
    assert pawa["seen"] == "not run"


def test_a_few_queries_that_differ_decide_nothing():
    made = {Point(1000, "atomic", mixture): figures(0.3, 1.0) for mixture in (MAIN, "2a")}
    made[Point(1000, "atomic", MAIN)]["mrr_at_10"][:5] = [0.4] * 5  # p is 1/16
    rows = rows_of(made)
    assert mean_interval(rows[0].mrr_SxQ - rows[1].mrr_SxQ)[0] > 0
    assert findings(rows)[0]["agrees"] is None
    made[Point(1000, "atomic", MAIN)]["mrr_at_10"][:6] = [0.4] * 6  # 1/32
    assert findings(rows_of(made))[0]["agrees"] is True


@pytest.mark.parametrize(
    ("at_first", "at_last", "agrees"), [(0.02, 0.1, True), (-0.2, -0.05, False), (0.1, 0.02, False)]
)
def test_a_gain_that_grows_is_one_of_the_method_itself(at_first: float, at_last: float, agrees: bool):
    made = {}
    for size, gain, other in ((1000, at_first, 0.02), (4000, at_last, 0.1)):
        for method, of_method in (("naive", gain), ("atomic", other)):
            made[Point(size, method, MAIN)] = figures(0.4 + of_method, 1.0)
            made[Point(size, method, "2a")] = figures(0.4, 1.0)
    _, growth, *_ = findings(rows_of(made))
    assert growth["agrees"] is (True if agrees else None)  # atomic docids' grows
    _, growth, *_ = findings(rows_of({p: f for p, f in made.items() if p.method == "naive"}))
    assert growth["agrees"] is agrees


@pytest.mark.parametrize(("wide", "agrees"), [(0.3, True), (0.31, True), (0.32, False), (0.2, True)])
def test_a_wider_network_gains_nothing_where_it_gains_less_than_counts(wide: float, agrees: bool):
    made = {
        Point(1000, "atomic", MAIN, width=width): figures(mrr, 1.0, inner=width)
        for width, mrr in ((64, 0.1), (256, 0.3), (512, wide))
    }
    *_, size, _, _ = findings(rows_of(made))
    assert size["agrees"] is agrees


def test_a_loss_that_becomes_smaller_is_no_gain():
    made = {Point(size, "atomic", MAIN): figures(0.2, 1.0) for size in (1000, 4000)}
    made[Point(1000, "atomic", "2a")] = figures(0.5, 1.0)
    made[Point(4000, "atomic", "2a")] = figures(0.3, 1.0)
    synthetic, growth, *_ = findings(rows_of(made))
    assert synthetic["agrees"] is growth["agrees"] is False


def test_one_method_is_named_and_nothing_is_close_without_evidence():
    made = {}
    for size in (1000, 4000):
        made[Point(size, "dual encoder", MAIN)] = figures(0.5, 1.0)
        made[Point(size, "atomic", MAIN)] = figures(0.475, 1.0, noise=0.4)
        made[Point(size, "naive", MAIN)] = figures(0.6, 1.0)
    *_, small, large = findings(rows_of(made))
    assert "1,000: atomic" in small["seen"]
    assert "naive" not in small["seen"] + large["seen"]
    assert small["agrees"] is None  # 95% of .5: within the interval
    assert large["agrees"] is None


def test_an_entropy_that_is_no_number_is_left_out_of_a_law():
    made = {Point(size, "atomic", MAIN): figures(0.2, size**0.25) for size in (10, 20, 40, 80)}
    made[Point(20, "atomic", MAIN)]["contrastive_entropy"][0] = None
    rows = rows_of(made)
    law = next(one for one in fits(rows) if one["law"] == "contrastive entropy by passages")
    assert law["exponent"] == pytest.approx(-0.25, abs=1e-4)
    assert json.loads(json.dumps(rows[1].told(), allow_nan=False))["contrastive_entropy"] is None


def test_a_method_without_entropy_has_no_law_of_it():
    """Also on the corpus that has networks of several widths."""
    made = {Point(16_000, "atomic", MAIN, width=width): figures(0.2, 1.0, inner=width) for width in (64, 256)}
    for size in (1000, 4000, 16_000):
        made[Point(size, "rq + ranking", MAIN)] = figures(0.3, None)
    told = fits(rows_of(made))
    assert [(one["method"], one["law"]) for one in told] == [("rq + ranking", "Recall@10 by passages")]


def test_rows_have_the_seeds_mean_and_laws_predict_the_largest_corpus(rows, tmp_path):
    first = next(row for row in rows if row.point == Point(1000, "atomic", MAIN)).told()
    assert (first["mrr_at_10"], first["seeds"]) == (0.47, 2)
    told = fits(rows)
    law = next(one for one in told if one["method"] == "atomic" and one["mixture"] == MAIN)
    assert law["exponent"] == pytest.approx(-0.25, abs=1e-4)
    assert law["predicted"] == pytest.approx(law["seen"], rel=1e-4)
    assert law["difference"] == pytest.approx((0, 0, 0), abs=1e-3)
    recall = next(one for one in told if one["law"].startswith("Recall") and one["method"] == "BM25")
    assert (recall["from"], recall["largest"], recall["seen"]) == (4000, 16_000, 1.0)
    assert 0 <= recall["at_ms_marco"] <= recall["predicted"] <= 1
    draw("made up", rows, told, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_quick_run_is_whole_and_the_same_command_repeats_it(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--quick", "--work", str(tmp_path)]
    lines = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines.append(done.stdout.splitlines()[-1])
    assert lines[0] == lines[1]
    told = json.loads(lines[0])
    assert {*told} == {"points", "fits", "findings"}
    assert len(told["points"]) == 10
    for point in told["points"]:
        low, high = point["interval"]
        assert 0 <= low <= point["mrr_at_10"] <= high <= 1
        assert (point["contrastive_entropy"] is None) == point["method"].startswith("BM25")
    assert not [*tmp_path.rglob("models/atomic*")]  # measured, and deleted
