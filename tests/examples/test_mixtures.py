"""Mixtures have the tasks of the paper, in proportion to their examples."""

import pytest

from retrieval_jax.examples.examples import TaskFactory
from retrieval_jax.examples.mixtures import PAPER_MIXTURES, mix_tasks


def test_mixtures_have_the_papers_tasks_in_proportion_to_their_examples(inputs: TaskFactory):
    made = mix_tasks("2b", inputs.task)
    assert list(made) == list(PAPER_MIXTURES["2b"])
    assert sum(share for _, share in made.values()) == pytest.approx(1)
    counts = {name: len(task) for name, (task, _) in made.items()}
    assert made["daq"][1] / made["labelled"][1] == pytest.approx(counts["daq"] / counts["labelled"])
    made = mix_tasks({"firstp": 3, "labelled": 1, "daq": 0}, inputs.task)
    assert {name: share for name, (_, share) in made.items()} == {"firstp": 0.75, "labelled": 0.25}
