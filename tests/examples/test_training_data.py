"""The data of a training: what a DataConfig makes of a collection, and what its cache depends on."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from tables import KINDS

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import synthetic
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.synthetic import QueryShards
from retrieval_jax.data.vocabulary import Prompts, Vocabulary
from retrieval_jax.examples.docid_groups import DocidGroupTargets
from retrieval_jax.examples.features import pad
from retrieval_jax.examples.targets import DocidTargets, PassageTargets, QueryTargets, Targets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.verbs.importing import import_collection

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


def test_without_train_queries_the_passages_make_them(
    source: Path, collection: Collection, tmp_path: Path, capsys
):
    folder, own_work = tmp_path / "unlabelled", Workspace(tmp_path / "work")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.train.tsv"))
    vocabulary = str(collection.vocabulary_path)
    import_collection(source=str(folder), work_dir=str(own_work.folder), vocabulary_path=vocabulary)
    parts = DataConfig(
        {"labelled": 1, "firstp": 1}, unlabelled={"sentence": 3, "title": 1}, unlabelled_dropout={"daq": 0.5}
    )

    def weights(config: DataConfig, collection: Collection) -> dict[str, float]:
        dataset = TrainDataset(config, own_work, collection, PassageTargets)
        return {task: weight for task, (_, weight) in dataset.stages()[-1][1].items()}

    unlabelled = Collection(own_work.collection)
    assert weights(parts, collection) == {"labelled": 0.5, "firstp": 0.5}
    assert weights(parts, unlabelled) == {"sentence": 0.75, "title": 0.25}
    dropout = [
        TrainDataset(parts, own_work, some, PassageTargets).token_dropout for some in (collection, unlabelled)
    ]
    assert dropout == [{}, {"daq": 0.5}]
    assert "sentence 3, title 1 (DataConfig.unlabelled)" in capsys.readouterr().err
    assert weights(dataclasses.replace(parts, unlabelled=None), unlabelled) == {"firstp": 1}
    shards = QueryShards(tmp_path / "shards", unlabelled.passage_count, 200)
    shards.write(0, ({"queries": ["what is it"], "made": 1, "distinct": 1} for _ in unlabelled.passages()))
    recipe = {"collection": unlabelled.fingerprint}
    storage.build_once(own_work.synthetic("s"), recipe, lambda tmp: synthetic.join(tmp, unlabelled, shards))
    both = {"sentence": 0.375, "title": 0.125, "d2q": 0.5}
    assert weights(dataclasses.replace(parts, synthetic="s"), unlabelled) == both


def test_a_prompt_takes_its_tokens_of_the_length(work: Workspace, collection: Collection):
    """An instruction comes whole before each query, which is cut; one that leaves no room is refused."""
    prompts = Prompts("Given a question about a library, find the function that answers it: ", "passage: ")
    vocabulary = Vocabulary(collection.vocabulary_path)
    instruction, passage = (vocabulary.encode(prompt) for prompt in prompts)
    config = DataConfig({"labelled": 1}, input_length=len(instruction) + 4, passage_length=len(passage) + 9)
    dataset = TrainDataset(config, work, collection, PassageTargets, prompts=prompts)
    examples, queries = dataset.queries("dev")
    rngs = [np.random.default_rng(0)] * len(queries)
    batch = PassageTargets.to_batch(pad(examples.get(range(len(queries)), rngs), dataset.targets.features))
    for query, row in zip(queries, batch["left_encoder_input_tokens"], strict=True):
        text = vocabulary.encode(prompts.query + query.text)[: len(instruction) + 3]
        assert row[: len(text) + 1].tolist() == [*text, 1]
        assert text[: len(instruction) - 1] == instruction[:-1]  # the last piece may go on with the text
    assert (batch["right_encoder_input_tokens"][:, :, : len(passage) - 1] == passage[:-1]).all()

    for name, length in (("input", len(instruction)), ("passage", len(passage))):
        short = dataclasses.replace(config, **{f"{name}_length": length + 1})
        with pytest.raises(
            UserError, match=f"DataConfig.{name}_length: {length + 1} tokens have no room .* {length}"
        ):
            dataclasses.replace(dataset, config=short)


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
    copies = dataclasses.replace(CONFIG, typos=0.1, typo_copies=True)
    others = (prompted, groups, dataclasses.replace(passages, config=copies))
    for other in others:
        assert other.recipe("firstp") != passages.recipe("firstp")


def test_examples_that_are_drawn_again_are_not_read_from_a_cache(dataset: TrainDataset):
    def drawn(targets: type[Targets], **settings) -> list[str]:
        config, table = dataclasses.replace(CONFIG, **settings), dataset.table
        opened = dataclasses.replace(dataset, config=config, target_type=targets, table=table)
        return [task for task in targets.tasks if task != "d2q" and opened.computed(task).draws]

    assert drawn(DocidTargets) == []
    assert drawn(DocidTargets, typos=0.1) == ["labelled"]
    assert drawn(QueryTargets, typos=0.1) == []
    assert drawn(PassageTargets) == drawn(DocidGroupTargets, negatives=1) == []  # each query has one passage
