"""The base class of models: what T5X's interface asks of each, and how classes become known by name."""

import functools
import inspect

import gin
import pytest

from retrieval_jax.models.distillation import dense_kl, dense_margin_mse
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.objectives import cross_entropy, rdrop
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.models.ranking import dpo, margin_mse, pairwise_margin
from retrieval_jax.models.retriever import RETRIEVERS, Retriever, objective_says, register_retriever

CONFIG = T5Config(64, 16, 2, 8, 32, 1, 1)


def test_every_model_has_the_interface():
    assert {"GenerativeRetriever", "DualEncoder", "QueryGenerator"} <= RETRIEVERS.keys()
    for cls in RETRIEVERS.values():
        assert issubclass(cls, Retriever)
        assert not inspect.isabstract(cls)
        assert isinstance(cls.family, str)


def test_a_class_that_lacks_a_part_cannot_be_made_and_a_registered_one_is_found():
    @register_retriever
    class Unfinished(Retriever):
        """A model without a loss."""

    try:
        assert RETRIEVERS["Unfinished"] is Unfinished
        with pytest.raises(TypeError, match="loss_fn"):
            Unfinished()
        with pytest.raises(ValueError, match=r"dual_encoder.DualEncoder is the retriever 'DualEncoder'"):
            register_retriever(type("DualEncoder", (Unfinished,), {}))
    finally:
        del RETRIEVERS["Unfinished"]


@pytest.fixture
def rdrop_of_margin_mse():
    with gin.unlock_config():
        gin.bind_parameter("rdrop.objective", margin_mse)
    yield
    gin.clear_config()


@pytest.mark.parametrize(
    ("objective", "unbounded"),
    [
        (cross_entropy, False),
        (dpo, False),
        (rdrop, False),
        (margin_mse, True),
        (pairwise_margin, True),
        (functools.partial(margin_mse, prefix_lengths=(1, 2)), True),
        (functools.partial(rdrop, objective=margin_mse), True),
        (functools.partial(rdrop, objective=functools.partial(rdrop, objective=pairwise_margin)), True),
    ],
)
def test_objectives_say_that_a_rise_of_their_loss_is_no_fault(objective, unbounded: bool):
    assert GenerativeRetriever(CONFIG, objective=objective).unbounded_loss is unbounded


def test_gin_may_say_what_rdrop_is_added_to(rdrop_of_margin_mse):
    assert GenerativeRetriever(CONFIG, objective=functools.partial(rdrop, weight=2.0)).unbounded_loss
    assert not GenerativeRetriever(CONFIG, objective=functools.partial(rdrop, objective=dpo)).unbounded_loss
    assert not QueryGenerator(CONFIG).unbounded_loss


def test_an_objective_that_is_added_to_another_says_what_that_one_says():
    added = functools.partial(rdrop, objective=functools.partial(dpo, beta=0.2))
    assert objective_says(added, "reads_log_probs")
    assert not objective_says(functools.partial(rdrop, objective=margin_mse), "reads_log_probs")
    assert not objective_says(None, "reads_log_probs")


@pytest.mark.parametrize("learn_scale", [True, False])
def test_margins_and_raw_dot_products_of_dual_encoders_have_no_natural_scale(learn_scale: bool):
    def unbounded(**settings) -> bool:
        return DualEncoder(CONFIG, learn_scale=learn_scale, **settings).unbounded_loss

    assert not unbounded()
    assert not unbounded(distillation=dense_kl)
    assert unbounded(normalize=False)
    assert unbounded(distillation=dense_margin_mse)
    assert unbounded(distillation=functools.partial(dense_margin_mse, teacher_scale=4.0))
