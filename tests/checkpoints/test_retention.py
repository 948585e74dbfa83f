"""Which checkpoints stay: the newest, and the best of those that were evaluated."""

import dataclasses
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from retrieval_jax.checkpoints.retention import RetentionPolicy


@dataclasses.dataclass
class Checkpoint:
    """What Orbax tells of one."""

    step: int


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, float("nan"), None]), max_size=8), st.integers(1, 3))
def test_the_newest_and_the_best_stay(scores, keep):
    for metric, best_of in (("MRR@10", max), ("loss", min)):
        policy = RetentionPolicy(Path("no/such/curve"), keep, metric)
        for step, score in enumerate(scores):
            policy.add(step, {} if score is None else {metric: score, "other": 9.0})
        steps = range(len(scores))
        expected = set(steps[-keep:])
        if finite := [score for score in scores if score is not None and score == score]:
            best = best_of(finite)
            expected.add(max(step for step in steps if scores[step] == best))
        stays = policy.should_preserve([Checkpoint(step) for step in steps], context=None)
        assert {step for step in steps if stays[step]} == expected


def test_scores_of_steps_that_are_trained_anew_are_forgotten(tmp_path: Path):
    """With other settings what is saved under the same number is another model."""
    curve = tmp_path / "learning_curve.jsonl"
    curve.write_text("".join(f'{{"step": {n}, "minutes": 0, "dev/MRR@10": 0.{n}}}\n' for n in (1, 2, 3)))
    kept = RetentionPolicy(curve, 1, "MRR@10")
    assert kept.best([1, 2, 3, 4]) == 3
    kept.forget(after=1)
    assert kept.best([1, 2, 3, 4]) == 1
    kept.add(2, {"MRR@10": 0.05})
    assert kept.best([2, 3]) == 2


def test_scores_of_another_pool_do_not_compare(tmp_path: Path):
    curve = tmp_path / "learning_curve.jsonl"
    curve.write_text(
        '{"step": 1, "dev/MRR@10": 0.1}\n{"step": 2, "dev_pool/MRR@10": 0.8, "dev_pool/passages": 50}\n'
        '{"step": 3, "loss": 1.0}\n{"step": 4, "dev_pool/MRR@10": 0.7, "dev_pool/passages": 50}\n'
    )
    kept = RetentionPolicy(curve, 1, "MRR@10")
    assert kept.best([1, 2, 3, 4]) == 2
    kept.add(5, {"MRR@10": 0.5, "passages": 60})
    assert kept.best([1, 2, 3, 4, 5]) == 5
    kept.add(5, {"MRR@10": 0.4, "passages": 60, "pool_digest": 7})  # as many, but others
    assert kept.scores == {5: 0.4}
    kept.add(6, {"MRR@10": 0.05})
    assert kept.best([2, 5, 6]) == 6
