"""The study of several positives: the paper's gradients, its labels, and its quick run."""

import argparse
import dataclasses
import gzip
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from _allocation import OBJECTIVES, by_autodiff, closed_form, measure  # noqa: E402
from _positives import EOS, LENGTHS, MOST, NEGATIVES, Data, batches, lemmas, spans  # noqa: E402
from _positives_told import Method, compare, methods, tell  # noqa: E402

from retrieval_jax.models.dual_encoder import DualEncoder  # noqa: E402
from retrieval_jax.models.layers import T5Config  # noqa: E402


@pytest.mark.parametrize("name", OBJECTIVES)
def test_autodiff_of_the_trained_objective_is_the_papers_formula(name):
    random = np.random.default_rng(0)
    scores_BxG = (random.normal(size=(50, 7)) * 4).astype(np.float32)
    positive_BxG = random.random((50, 7)) < 0.4
    positive_BxG[:, 0] = True
    negatives_B = (random.normal(size=50) * 3).astype(np.float32)
    arrays = scores_BxG, positive_BxG, negatives_B
    np.testing.assert_allclose(by_autodiff(name, *arrays), closed_form(name, *arrays), atol=2e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("JointLH", [0.437, -0.5]), ("SumMargLH", [-0.063, -3e-6]), ("LSEPair", [-5e-5, -0.999])],
)
def test_positives_at_5_and_minus_5_with_ten_negatives_at_0(name, expected):
    found = closed_form(name, np.array([[5.0, -5.0]]), np.ones((1, 2), bool), np.log([10.0]))
    np.testing.assert_allclose(found[0], expected, rtol=0.1, atol=6e-4)


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    passages = random.integers(3, 100, (40, LENGTHS[1]))
    passages[:, 30:] = 0
    passages[:, 29] = EOS
    queries = random.integers(3, 100, (24, LENGTHS[0]))
    labels = [[i, i + 1] for i in range(24)]
    mined = [[i + 2, i + 3, i + 4, i + 5] for i in range(24)]
    teacher = [{i: 0.9, i + 1: 0.5, i + 2: 1.0, i + 3: 0.85, i + 4: 0.1, i + 5: 0.0} for i in range(24)]
    ids = [f"p{i}" for i in range(40)]
    return Data(ids, passages, queries, labels, mined, queries[:4], {}, teacher)


def test_the_teacher_labels_what_it_scores_near_the_best(data):
    labels, rest = data.by_teacher()
    assert labels[3] == [5, 3, 6]  # 1.0, .9 and .85: at least .8; the own positive 4 has .5
    assert rest[3] == [4, 7, 8]
    assert data.quality("llm") == {"per_query": 3.0, "precision": pytest.approx(1 / 3), "recall": 0.5}
    assert data.quality("own") == {"per_query": 2.0, "precision": 1.0, "recall": 1.0}


def test_a_mixture_has_both_kinds_and_a_curriculum_changes_to_the_own(data):
    mixed, _ = data.labelled("mixture", 0)
    own = [len(some) == 2 for some in mixed]
    assert 5 < sum(own) < 19
    assert [some for some, is_own in zip(mixed, own, strict=True) if is_own] == [
        some for some, is_own in zip(data.labels, own, strict=True) if is_own
    ]
    made = [*islice(batches(data, MOST, "curriculum", batch=8, seed=0, steps=4), 4)]
    assert [int((batch["grade"] > 0).sum(1).max()) for batch in made] == [3, 3, 3, 2]
    assert made[0]["passage"].shape == (8, MOST + NEGATIVES)


def test_batches_have_the_teachers_score_of_each_candidate(data):
    batch = next(batches(data, 2, "own", batch=8, seed=0, steps=1))
    for row, scores in enumerate(batch["score"]):
        query = int(batch["other_positives"][row, 0])
        for passage, score in zip(batch["passage"][row], scores, strict=True):
            assert score == pytest.approx(data.teacher[query][int(passage)])
    assert (batch["right_encoder_input_tokens"] == data.passages_NxP[batch["passage"]]).all()


def test_fewer_queries_or_passages_than_a_batch_has_are_one_batch(data):
    made = next(batches(data, 2, "own", batch=64, seed=0, steps=1))
    assert sorted(made["other_positives"][:, 0].tolist()) == [*range(24)]
    assert sorted(next(spans(data, 64, 0))["passage"][:, 0].tolist()) == [*range(40)]


def test_other_data_has_another_fingerprint(data):
    teacher = [{**scores, row: 0.91} for row, scores in enumerate(data.teacher)]
    others = [dataclasses.replace(data, teacher=teacher), dataclasses.replace(data, ids=data.ids[::-1])]
    assert len({one.fingerprint for one in (data, *others)}) == 3
    assert dataclasses.replace(data).fingerprint == data.fingerprint


def test_the_baseline_is_infonce_without_a_teacher_whatever_is_chosen():
    chosen = argparse.Namespace(positives=[4], objectives=["LSEPair"], distillation=[1, 0])
    first, *others = methods(chosen)
    assert first == Method("InfoNCE", 1, distilled=False)
    assert len(others) == 3
    chosen.distillation = [1]
    assert [str(one) for one in methods(chosen)] == [
        "InfoNCE 1",
        "InfoNCE 1 distilled",
        "LSEPair 4 distilled",
    ]


def test_lemmas_are_made_anew_of_other_files_and_not_otherwise(tmp_path):
    source = tmp_path / "wordnet"
    source.mkdir()

    def write(name: str, lines: list[str]) -> None:
        with gzip.open(source / f"{name}.tsv.gz", "wt") as file:
            file.writelines(f"{line}\n" for line in lines)

    write("docs", [f"d{i}\ttitle\ttext {i}" for i in range(40)])
    write("queries.lemmas", [f"q{i}\tlemma {i}" for i in range(20)])
    write("qrels.lemmas", [f"q{i}\td{i + j}\t1" for i in range(20) for j in range(2)])
    folder = lemmas(source, tmp_path / "made", 20)
    assert gzip.decompress((folder / "docs.tsv.gz").read_bytes()).count(b"\n") == 20
    before = (folder / "docs.tsv.gz").stat().st_mtime_ns
    assert lemmas(source, tmp_path / "made", 20) == folder
    assert (folder / "docs.tsv.gz").stat().st_mtime_ns == before
    write("docs", [f"d{i}\ttitle\tother text {i}" for i in range(40)])
    lemmas(source, tmp_path / "made", 20)
    assert b"other text" in gzip.decompress((folder / "docs.tsv.gz").read_bytes())


def test_a_span_is_cut_from_its_passage(data):
    batch, kept = next(spans(data, 32, 0)), 0
    for query, (passage,), row in zip(
        batch["left_encoder_input_tokens"],
        batch["right_encoder_input_tokens"],
        batch["passage"][:, 0],
        strict=True,
    ):
        tokens = data.passages_NxP[row][:29].tolist()
        span = query[query > EOS].tolist()
        (start,) = (i for i in range(29) if tokens[i : i + len(span)] == span)
        rest = passage[passage > EOS].tolist()
        kept += rest == tokens
        assert rest in (tokens, tokens[:start] + tokens[start + len(span) :])
    assert kept < 12


def test_real_batches_give_the_allocation_that_their_scores_say(data):
    model = DualEncoder(T5Config(128, 8, 1, 8, 8, 0, 0, 0.0), None, 8, scale=5.0, bidirectional=False)
    made = [next(batches(data, MOST, "llm", batch=8, seed=0, steps=2))]
    shapes = {name: x.shape for name, x in made[0].items()}
    params = model.get_initial_variables(jax.random.key(0), shapes)["params"]
    told = measure(model, nn.unbox(params), made, ("JointLH", "SumMargLH", "LSEPair"))
    for one in told.values():
        np.testing.assert_allclose(one["by_rank"], one["formula"], atol=1e-5)
        assert one["difference"] < 1e-5
        assert len(one["by_rank"]) == 3
        assert one["pushed_down"] == 0  # the scores are too near to each other
    first, *_, last = told["LSEPair"]["by_rank"]
    assert last < first < 0  # the weakest positive has the most
    first, *_, last = told["SumMargLH"]["by_rank"]
    assert first < last < 0  # the strongest has


def test_marks_are_corrected_over_all_that_is_compared():
    """Holm's correction over two methods, two metrics and two collections: eight comparisons."""
    chosen = argparse.Namespace(
        positives=[4], objectives=["JointLH", "LSEPair"], distillation=[0], labels=("own",)
    )
    baseline, joint, pair = methods(chosen)
    studies = {}
    for name, queries in (("small", 5), ("large", 10)):
        zero_SxQ = np.zeros((2, queries))
        one_SxQ = np.array([[0.3], [-0.1]]) + zero_SxQ  # of two seeds: in the mean .1 for each query
        studies[name] = {
            (baseline, "own"): {"MRR@10": zero_SxQ, "Recall@100": zero_SxQ},
            (joint, "own"): {"MRR@10": one_SxQ, "Recall@100": zero_SxQ},
            (pair, "own"): {"MRR@10": zero_SxQ, "Recall@100": zero_SxQ},
        }
    found = compare(studies, chosen)
    assert len(found) == 8
    large, small = (found[name, joint, "own", "MRR@10"] for name in ("large", "small"))
    assert large.p == 2 / 2**10  # of all signs two are as far from 0
    assert large.p_holm == pytest.approx(8 * 2 / 2**10)
    assert small.p_holm == pytest.approx(7 * 2 / 2**5)
    assert (large.mean, large.significant, small.significant) == (pytest.approx(0.1), True, False)
    assert {one.p_holm for (_, method, *_), one in found.items() if method != joint} == {1.0}
    told = tell("large", studies["large"], found, chosen)
    assert told["JointLH 4 own"]["differences"]["MRR@10"]["p_holm"] == large.p_holm
    assert "differences" not in told["InfoNCE 1 own"]


@pytest.mark.slow
def test_a_quick_run_is_whole(tmp_path):
    script = BENCHMARKS / "multi_positive.py"
    command = [
        sys.executable,
        str(script),
        "--quick",
        "--work",
        str(tmp_path),
        "--plot",
        str(tmp_path / "a.png"),
    ]
    command += ["--gradients", str(tmp_path / "b.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])["made_up"]
    for name in ("InfoNCE 1", "JointLH 4", "LSEPair 4"):
        for labels in ("llm", "own"):
            mean, low, high = told[f"{name} {labels}"]["MRR@10"]
            assert 0 <= low <= mean <= high <= 1
    assert told["LSEPair 4 llm"]["end"]["difference"] < 1e-4
    for when in ("start", "end"):
        pushed = {name: told[f"{name} 4 own"][when]["pushed_down"] for name in ("JointLH", "LSEPair")}
        assert pushed["JointLH"] > 0 == pushed["LSEPair"]
    assert told["labels"]["own"]["precision"] == 1
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("a.png", "b.png"))
