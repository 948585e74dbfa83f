"""Examples, decoded and compared with the texts they come from."""

import numpy as np
import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import EOS, Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.examples import TaskFactory
from retrieval_jax.examples.mixtures import mix_tasks

RNG = np.random.default_rng(0)


def test_docid_tables_name_every_passage(collection: Collection, vocabulary: Vocabulary, table: DocidTable):
    assert list(map(str, table.passage_ids)) == [p.id for p in collection.passages()]
    if table.kind == "atomic":
        assert table.tokens_NxL[:, 0].tolist() == list(range(1, collection.passage_count + 1))
        assert table.output_size == 128
    else:
        for tokens, passage in zip(table.tokens_NxL, collection.passages(), strict=True):
            assert tokens[tokens > 0].tolist() == [*vocabulary.encode(passage.id), EOS]


def test_what_cannot_be_mixed_is_named(inputs: TaskFactory):
    with pytest.raises(UserError, match="no mixture '9z': the paper's rows are 1a, 2a"):
        mix_tasks("9z", inputs.task)
    with pytest.raises(UserError, match="no task 'query': the tasks are firstp, daq"):
        mix_tasks({"query": 1}, inputs.task)
    with pytest.raises(UserError, match="no train query is labelled 'llm': there are no labels"):
        mix_tasks({"labelled_llm": 1}, inputs.task)
    with pytest.raises(UserError, match="d2q: no synthetic queries"):
        mix_tasks("6b", inputs.task)
    with pytest.raises(UserError, match="no task has both a weight and examples"):
        mix_tasks({"firstp": 0}, inputs.task)
