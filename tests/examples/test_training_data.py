"""The data of a training: what a DataConfig makes of a collection, and what its cache depends on."""

import dataclasses

import pytest
from tables import KINDS

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import Prompts
from retrieval_jax.examples.targets import DocidTargets, PassageTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset

CONFIG = DataConfig({"labelled": 3, "firstp": 1}, curriculum=[(5, {"firstp": 1}), (2, "2a")], chunk_length=8)


@pytest.fixture
def dataset(work: Workspace, collection: Collection) -> TrainDataset:
    return TrainDataset(CONFIG, work, collection, DocidTargets, KINDS["naive"](collection))


def test_the_mixture_comes_after_the_stages_of_the_curriculum(dataset: TrainDataset):
    stages = dataset.stages()
    assert [batches for batches, _ in stages] == [5, 2, None]
    weights = [{task: weight for task, (_, weight) in mixture.items()} for _, mixture in stages]
    assert weights[0] == {"firstp": 1}
    assert weights[1].keys() == {"firstp", "labelled"}  # in proportion to their examples
    assert weights[1]["firstp"] / weights[1]["labelled"] == pytest.approx(
        len(dataset.computed("firstp")) / len(dataset.computed("labelled"))
    )
    assert weights[2] == {"labelled": 0.75, "firstp": 0.25}


def test_a_task_that_the_collection_lacks_is_named(dataset: TrainDataset):
    config = dataclasses.replace(CONFIG, token_dropout={"labelled_llm": 0.1})
    with pytest.raises(UserError, match="labelled_llm: no train query is labelled 'llm'"):
        dataclasses.replace(dataset, config=config).stages()


def test_a_cache_depends_on_all_that_changes_its_examples_and_on_nothing_else(dataset: TrainDataset):
    recipe = dataset.recipe("daq")
    same = {"input_length": 9, "mixture": "2b", "token_dropout": {"daq": 0.5}, "pack": 2, "positives": 3}
    for name, value in same.items():  # they are applied to what is read
        config = dataclasses.replace(CONFIG, **{name: value})
        assert dataclasses.replace(dataset, config=config).recipe("daq") == recipe, name
    for name in ("chunk_length", "chunks"):
        config = dataclasses.replace(CONFIG, **{name: 3})
        assert dataclasses.replace(dataset, config=config).recipe("daq") != recipe, name
    docids = KINDS["atomic"](dataset.collection)
    assert dataclasses.replace(dataset, table=docids).recipe("daq") != recipe

    passages = TrainDataset(CONFIG, dataset.work, dataset.collection, PassageTargets)
    prompted = dataclasses.replace(passages, prompts=Prompts("query: ", "passage: "))
    groups = dataclasses.replace(passages, config=dataclasses.replace(CONFIG, positives=3))
    recipes = [data.recipe("labelled") for data in (passages, prompted, groups)]
    assert recipes[0] != recipes[1]
    assert recipes[0] != recipes[2]
