"""The verb `train`: gin's values, and the examples of a batch in the collection's own words."""

import dataclasses

import gin
import numpy as np
import pytest
from tables import KINDS, docids_of

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.term_weights import token_idf
from retrieval_jax.examples.batches import batches
from retrieval_jax.examples.targets import DocidTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.training.settings import TrainSettings
from retrieval_jax.verbs.documentation import documentation
from retrieval_jax.verbs.table import configure_verbs
from retrieval_jax.verbs.train import TrainConfig, describe_batch, lexical_gains, sized_config, steps_for


@pytest.fixture(autouse=True)
def _gin_is_left_as_it_was():
    yield
    gin.clear_config()


def test_what_no_run_file_sets_is_named_in_one_line(cli, arguments):
    status, _, err = cli("train", *arguments, "--gin_file=models/tiny.gin")
    assert status == 2
    assert err == ("retrieval-jax: train.retriever: not set: name a run, as --gin_file=runs/naive.gin\n")


def test_every_setting_of_the_loop_is_a_parameter_of_the_verb():
    changed = {
        "steps": 3, "batch_size": 16, "seed": 5, "microbatches": 2, "random_bits": "rbg", "eval_every": 7,
        "save_every": 8, "log_every": 9, "max_minutes": 1.5, "keep": 4, "keep_best": None, "profile": (1, 2),
    }  # fmt: skip
    assert {*changed, "spike_guard"} == {field.name for field in dataclasses.fields(TrainSettings)}
    bindings = [f"train.{name}={value!r}" for name, value in changed.items()]
    configure_verbs(["runs/naive.gin"], bindings)
    settings = TrainConfig().settings
    assert {name: getattr(settings, name) for name in changed} == changed
    assert TrainConfig(batch_size=4).settings.batch_size == 4  # what Python gives wins
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for field in dataclasses.fields(TrainSettings):
        assert defaults.get(field.name, field.default) == field.default, field.name
    with pytest.raises(UserError, match=r"train.keep_best: no metric 'MRR'"):
        TrainConfig(keep_best="MRR")


def test_steps_follow_from_the_number_of_passages_where_none_are_given():
    assert [steps_for(n, 6.0) for n in (50, 2067, 5000, 16_407, 117_659)] == [100, 270, 420, 770, 2060]
    configure_verbs(["runs/naive.gin"], [])
    assert gin.query_parameter("%STEPS") is None
    with sized_config(10_000) as config:
        assert config.steps == 400
        assert gin.query_parameter("learning_rate.steps").configurable.name == "macro"
        assert gin.query_parameter("%STEPS") == 400  # where the schedule ends, too
    with sized_config(10_000, steps_factor=2.5) as config:
        assert config.steps == 250
    for binding in ("STEPS=7", "train.steps=7"):
        configure_verbs(["runs/naive.gin"], [binding])
        with sized_config(10_000) as config:
            assert config.steps == 7
            assert gin.query_parameter("%STEPS") == 7


def test_the_gains_of_a_lexical_head_begin_as_a_power_of_the_idf(collection):
    idf_V = token_idf(collection, Vocabulary(collection.vocabulary_path))
    assert len(np.unique(idf_V)) > 50
    np.testing.assert_allclose(lexical_gains(collection, 1.5).read(), idf_V * np.sqrt(idf_V), rtol=1e-5)
    np.testing.assert_array_equal(lexical_gains(collection, 1.0).read(), idf_V)


def test_help_lists_every_parameter_with_its_default():
    first, text = documentation("train")
    assert first == "Trains a retriever on an imported collection, resuming from its newest checkpoint."
    for field in dataclasses.fields(TrainConfig):
        assert f"\n  train.{field.name} = " in text
    assert "train.batch_size = 128" in text
    assert "\n  preflight.topology   (--TOPOLOGY)\n" in documentation("preflight")[1]


def test_a_batch_is_described_by_its_tasks_texts_and_passages(work, collection):
    table = KINDS["naive"](collection)
    data = DataConfig(
        mixture={"firstp": 0.5, "labelled": 0.5}, token_dropout={"firstp": 0.5}, input_length=12
    )
    examples = TrainDataset(data, work, collection, DocidTargets, table)
    made = batches(examples.stages(), examples.targets, data.token_dropout, 8, 3, position=16)
    batch = next(made)
    rows = describe_batch(examples, 8, 3, 16)
    assert {row["task"] for row in rows} == {"firstp", "labelled"}
    queries = {q.text for q in collection.queries("train")}
    for row, target in zip(rows, batch["decoder_target_tokens"], strict=True):
        assert list(docids_of(table)[row["passages"][0]]) == [token for token in target.tolist() if token]
        if row["task"] == "firstp":
            assert collection.ids[row["number"]].as_py() == row["passages"][0]
    texts = [row["text"] for row in rows if row["task"] == "labelled"]
    folded = {vocabulary_form(examples.vocabulary, query) for query in queries}
    assert set(texts) <= folded


def vocabulary_form(vocabulary: Vocabulary, text: str) -> str:
    return vocabulary.decode(np.array([vocabulary.encode(text)]))[0]
