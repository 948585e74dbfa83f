"""Retriever families: found by a class of models, also one from outside the package."""

import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.examples.targets import DocidTargets, PassageTargets, QueryTargets
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.models.retriever import RETRIEVERS, Retriever
from retrieval_jax.training.families import family_of


def test_a_model_and_its_subclasses_belong_to_a_family():
    class Mine(DualEncoder):
        """A dual encoder with something of its own."""

    targets = {GenerativeRetriever: DocidTargets, DualEncoder: PassageTargets, QueryGenerator: QueryTargets}
    for model, target_type in targets.items():
        assert family_of(model).target_type is target_type
        assert RETRIEVERS[model.__name__] is model
    assert family_of(Mine) is family_of(DualEncoder)


def test_a_class_without_a_family_is_named():
    class Stranger(Retriever):
        """A model that nobody registered."""

    with pytest.raises(
        UserError, match=r"@Stranger has no registered family: choose one of @Generative.*, @"
    ):
        family_of(Stranger)
