"""The base class of models: what T5X's interface asks of each, and how classes become known by name."""

import inspect

import pytest

from retrieval_jax.models.retriever import RETRIEVERS, Retriever, register_retriever


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
