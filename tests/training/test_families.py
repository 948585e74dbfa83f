"""Retriever families: found by a class of models, also one from outside the package."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.examples.docid_groups import DocidGroupTargets
from retrieval_jax.examples.targets import DocidTargets, PassageTargets, QueryTargets
from retrieval_jax.examples.training_data import DataConfig
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.models.retriever import RETRIEVERS, Retriever
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.training.families import family_of


def test_a_model_and_its_subclasses_belong_to_a_family():
    class Mine(DualEncoder):
        """A dual encoder with something of its own."""

    targets = {GenerativeRetriever: DocidTargets, DualEncoder: PassageTargets, QueryGenerator: QueryTargets}
    for model, target_type in targets.items():
        assert family_of(model).targets_for(DataConfig()) is target_type
        ranked = DocidGroupTargets if model is GenerativeRetriever else target_type
        assert family_of(model).targets_for(DataConfig(negatives=1)) is ranked
        assert RETRIEVERS[model.__name__] is model
    assert family_of(Mine) is family_of(DualEncoder)


def test_a_class_without_a_family_is_named():
    class Stranger(Retriever):
        """A model that nobody registered."""

    with pytest.raises(
        UserError, match=r"@Stranger has no registered family: choose one of @Generative.*, @"
    ):
        family_of(Stranger)


MODULE = '''
import gin

from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.retriever import register_retriever


@register_retriever
@gin.configurable(denylist=["config", "optimizer_def"])
class Mine(GenerativeRetriever):
    """A generative retriever of another package."""

    def __init__(self, config, optimizer_def=None, margin=0.5, **settings):
        super().__init__(config, optimizer_def, **settings)
        self.margin = margin
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A gin file that imports a module with a class of models, and trains such a model."""
    (tmp_path / "my_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.gin").write_text("import my_models\ntrain.retriever = @Mine\n")
    yield tmp_path / "mine.gin"
    RETRIEVERS.pop("Mine", None)
    sys.modules.pop("my_models", None)


def test_a_class_of_another_package_is_trained_indexed_and_searched(
    mine: Path, cli, arguments: list[str], work
):
    tiny = ["T5Config.emb_dim=16", "T5Config.mlp_dim=16", "T5Config.num_heads=1", "T5Config.head_dim=8"]
    given = ["--gin_file=runs/naive.gin", f"--gin_file={mine}", *arguments, "--STEPS=1"]
    given.append(f"--MODEL_DIR={mine.parent / 'model'}")  # other tests train in the work folder, too
    given += [f"--gin.{binding}" for binding in tiny]
    for verb in ("docids", "train"):
        status, made, err = cli(verb, *given)
        assert status == 0, err
    assert json.loads(Path(made["model"], "model.json").read_text())["retriever"] == "Mine"
    status, _, err = cli("train", *given, "--STEPS=2", "--gin.Mine.margin=0.9")
    assert status == 2
    assert "trained with other settings: Mine.margin was '0.5' and is '0.9'" in err
    status, made, err = cli("index", *given, f"--MODEL_DIR={made['model']}")
    assert status == 0, err
    ((*ranking,),) = Searcher.open(made["searcher"]).search(["smooth a noisy signal"], 3)
    assert len(ranking) == 3

    del RETRIEVERS["Mine"]
    with pytest.raises(UserError, match=r"model.json: no retriever 'Mine' is known here"):
        Searcher.open(made["searcher"])
