"""How a run is set up: what belongs together, what is compared, and whose folder it is."""

import dataclasses
import types
from pathlib import Path

import gin
import pytest
from tables import KINDS
from teacher import random_scores, write_scores
from tiny_training import CONFIG, retriever

from retrieval_jax.checkpoints import model_folder
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.examples.targets import DocidTargets, PassageTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.joint_ranking import joint_ranking
from retrieval_jax.models.lexical_encoder import LexicalEncoder
from retrieval_jax.training.run import check_inputs, make_model, prepare_folder, run_settings
from retrieval_jax.training.settings import TrainSettings


def test_another_model_in_the_folder_is_refused(tmp_path: Path, collection):
    first = model_folder.describe(retriever(), docids="naive")
    prepare_folder(tmp_path / "m", first, collection)
    begun(tmp_path / "m")
    prepare_folder(tmp_path / "m", first, collection)
    other = model_folder.describe(DualEncoder(CONFIG), docids=None)
    with pytest.raises(UserError, match=r"model.json: retriever is 'GenerativeRetriever' there"):
        prepare_folder(tmp_path / "m", other, collection)
    scored = model_folder.describe(GenerativeRetriever(CONFIG, score="logits"), docids="naive")
    with pytest.raises(UserError, match=r"model.json: settings is \{\} there and \{'score': 'logits'\} here"):
        prepare_folder(tmp_path / "m", scored, collection)


def test_where_nothing_was_saved_another_model_may_begin(tmp_path: Path, collection):
    """As after a first attempt that did not fit the devices."""
    for width in (16, 32):
        model = DualEncoder(dataclasses.replace(CONFIG, emb_dim=width))
        prepare_folder(tmp_path / "m", model_folder.describe(model, docids=None), collection)
        assert model_folder.read_description(tmp_path / "m")["network"]["emb_dim"] == width


def test_a_converted_model_is_not_replaced(tmp_path: Path, collection):
    converted = model_folder.describe(DualEncoder(CONFIG), docids=None, collection=None)
    prepare_folder(tmp_path / "m", converted, collection)
    (tmp_path / "m" / "weights.safetensors").touch()
    with pytest.raises(UserError, match=r"model.json: collection is None there"):
        prepare_folder(tmp_path / "m", converted | {"collection": collection.fingerprint}, collection)


def begun(folder: Path) -> None:
    """Leaves a checkpoint, or what looks like one."""
    (folder / "checkpoints" / "2").mkdir(parents=True)


def test_another_vocabulary_than_the_models_own_is_refused(tmp_path: Path, collection):
    """Its tokens stand for other words, whatever the kind of the model, and whatever changes are accepted."""
    described = model_folder.describe(DualEncoder(CONFIG), docids=None)
    prepare_folder(tmp_path / "m", described, collection)
    begun(tmp_path / "m")
    other = Path(__file__).parents[1] / "data/library/sentencepiece.model"
    with pytest.raises(
        UserError, match=rf"m: reads another vocabulary than {other}: import with --VOCABULARY="
    ):
        prepare_folder(tmp_path / "m", described, types.SimpleNamespace(vocabulary_path=other))


def test_what_writes_needs_a_decoder():
    gin.bind_parameter("T5Config.num_decoder_layers", 0)
    for name in ("emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers"):
        gin.bind_parameter(f"T5Config.{name}", 2)
    with pytest.raises(UserError, match=r"T5Config.num_decoder_layers: 0: a generative model writes with"):
        make_model(GenerativeRetriever, lambda: None, 128, None)
    assert make_model(DualEncoder, lambda: None, 128, None).config.num_decoder_layers == 0


def test_initial_weights_are_the_same_by_any_spelling_of_their_path(tmp_path: Path, collection, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def described(path: str, other: str | None) -> dict:
        return model_folder.describe(retriever(), initial_checkpoint=path, averaged_with=other)

    prepare_folder(tmp_path / "m", described("models/a", "./lexical"), collection)
    begun(tmp_path / "m")
    prepare_folder(tmp_path / "m", described("./models//a/", "lexical"), collection)
    prepare_folder(tmp_path / "m", described(str(tmp_path / "models/a"), "models/../lexical"), collection)
    for other in (described("models/a", None), described("models/a", "models/lexical")):
        with pytest.raises(UserError, match=r"model.json: averaged_with is './lexical' there and"):
            prepare_folder(tmp_path / "m", other, collection)


def test_parts_of_a_batch_are_compared_where_they_change_the_negatives(work, collection):
    data = DataConfig({"labelled": 1.0})
    examples = TrainDataset(data, work, collection, PassageTargets)
    settings = TrainSettings(microbatches=4, random_bits="rbg")
    of_generative = run_settings(retriever(), examples, settings, {})
    assert of_generative["train.random_bits"] == "rbg"
    assert "train.microbatches" not in of_generative
    planned = GenerativeRetriever(dataclasses.replace(CONFIG, lexical_head=True), objective=joint_ranking)
    for model in (DualEncoder(CONFIG), LexicalEncoder(CONFIG), planned):
        assert run_settings(model, examples, settings, {})["train.microbatches"] == 4


def test_scores_are_compared_by_content(own_work: Workspace, collection):
    def settings(**data) -> dict:
        examples = TrainDataset(DataConfig({"labelled": 1.0}, **data), own_work, collection, PassageTargets)
        return run_settings(DualEncoder(CONFIG), examples, TrainSettings(), {})

    given = random_scores(collection)
    first, same = (write_scores(own_work, name, given).fingerprint for name in ("first", "first_2"))
    other = write_scores(own_work, "other", random_scores(collection, seed=1)).fingerprint
    assert settings(scores="first")["DataConfig.scores"] == first != other
    assert settings(scores="other")["DataConfig.scores"] == other
    assert settings()["DataConfig.scores"] is None
    assert [settings(typos=share)["DataConfig.typos"] for share in (0.0, 0.1)] == [0.0, 0.1]
    assert first == same


def test_a_model_and_docids_that_do_not_belong_together_are_refused(tmp_path: Path, collection):
    check_inputs(tmp_path, DualEncoder, collection, None)
    with pytest.raises(UserError, match="needs docids: --DOCIDS=naive"):
        check_inputs(tmp_path, GenerativeRetriever, collection, None)


def test_docids_of_an_earlier_collection_are_refused(work, collection, grown):
    table = KINDS["atomic"](collection)
    for refuse in (
        lambda: check_inputs(work.folder, GenerativeRetriever, grown, table),
        lambda: TrainDataset(DataConfig(), work, grown, DocidTargets, table),  # `cache`, and seqio's tasks
    ):
        with pytest.raises(UserError, match="docids/atomic: of another collection than"):
            refuse()


def test_a_models_folder_that_cannot_be_one_is_told(tmp_path: Path, collection):
    (tmp_path / "file").touch()
    description = model_folder.describe(DualEncoder(CONFIG), docids=None)
    for folder in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(UserError, match=r"file.*: cannot be a folder \(.*\): name another one"):
            prepare_folder(folder, description, collection)
