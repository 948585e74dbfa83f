"""What the tests of examples read: a small collection's vocabulary, its tasks, and docid tables."""

import pytest
from tables import KINDS

from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.examples import TaskFactory


@pytest.fixture(scope="module")
def vocabulary(collection: Collection) -> Vocabulary:
    return Vocabulary(collection.vocabulary_path)


@pytest.fixture(scope="module")
def inputs(collection: Collection, vocabulary: Vocabulary) -> TaskFactory:
    return TaskFactory(collection, vocabulary, chunk_length=8, chunks=3)


@pytest.fixture(scope="module", params=["atomic", "naive"])
def table(request, collection: Collection) -> DocidTable:
    return KINDS[request.param](collection)
