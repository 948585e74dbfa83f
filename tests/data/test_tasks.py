"""Examples, decoded and compared with the texts they come from; their order and position."""

import itertools

import numpy as np
import pytest
import seqio

from retrieval_jax.data import tasks
from retrieval_jax.data.feature_converters import DualEncoderFeatureConverter
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import EOS, Vocabulary
from retrieval_jax.docids.make import KINDS
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.errors import UserError

ALL = {"firstp": 1, "chunks": 1, "queries": 2}


@pytest.fixture(scope="module")
def vocabulary(collection: Collection) -> Vocabulary:
    return Vocabulary(collection.vocabulary_path)


@pytest.fixture(scope="module", params=["atomic", "naive"])
def table(request, collection: Collection) -> DocidTable:
    return KINDS[request.param](collection)


def examples(mixture: str, task: str) -> list[dict]:
    task = seqio.get_mixture_or_task(f"{mixture}.{task}")
    dataset = task.get_dataset({"inputs": 24, "targets": 64, "passage": 1}, shuffle=False, seed=0)
    return list(dataset.as_numpy_iterator())


def unpad(tokens: np.ndarray) -> list[int]:
    return tokens[tokens > 0].tolist()


def test_docid_tables_name_every_passage(collection: Collection, vocabulary: Vocabulary, table: DocidTable):
    assert table.passage_ids == [p.id for p in collection.passages()]
    if table.kind == "atomic":
        assert table.tokens_NxL[:, 0].tolist() == list(range(1, collection.passage_count + 1))
        assert table.output_size == 128
    else:
        for row, passage in enumerate(collection.passages()):
            assert unpad(table.tokens_NxL[row]) == [*vocabulary.encode(passage.id), EOS]


def test_each_task_reads_a_passage_and_writes_its_docid(
    collection: Collection, vocabulary: Vocabulary, table: DocidTable
):
    mixture = tasks.register(collection, table, ALL, chunk_length=8, drop_rates={})
    assert mixture == f"small_docs.{table.kind}"
    passages = list(collection.passages())
    whole = [vocabulary.encode(p.full_text) for p in passages]

    firstp = examples(mixture, "firstp")
    assert [unpad(e["inputs"]) for e in firstp] == [[*text[:23], EOS] for text in whole]
    assert [unpad(e["targets"]) for e in firstp] == [unpad(row) for row in table.tokens_NxL]

    for example, text, docid in zip(examples(mixture, "chunks"), whole, table.tokens_NxL, strict=True):
        *chunk, end = example["inputs"].tolist()
        assert end == EOS
        assert len(chunk) == min(8, len(text))
        assert any(text[i : i + len(chunk)] == chunk for i in range(len(text)))
        assert unpad(example["targets"]) == unpad(docid)

    rows = {p.id: row for row, p in enumerate(passages)}
    queries = collection.queries("train")
    for example, query in zip(examples(mixture, "queries"), queries, strict=True):
        *tokens, end = unpad(example["inputs"])
        assert end == EOS
        assert query.text.lower().startswith(vocabulary.model.decode(tokens)[:10])
        assert tokens == vocabulary.encode(query.text)[:23]
        (positive,) = query.positives
        assert unpad(example["targets"]) == unpad(table.tokens_NxL[rows[positive]])


def test_dropped_tokens_leave_a_subsequence(
    collection: Collection, vocabulary: Vocabulary, table: DocidTable
):
    mixture = tasks.register(collection, table, {"queries": 1}, 8, drop_rates={"queries": 0.5})
    kept = total = 0
    for example, query in zip(examples(mixture, "queries"), collection.queries("train"), strict=True):
        text = iter(vocabulary.encode(query.text))
        *tokens, _ = example["inputs"].tolist()
        assert tokens
        assert all(token in text for token in tokens)  # in order: `in` consumes the iterator
        kept, total = kept + len(tokens), total + len(vocabulary.encode(query.text)[:23])
    assert 0.4 < kept / total < 0.62


def test_dual_encoder_examples_tokenise_as_the_searcher_does(collection: Collection, vocabulary: Vocabulary):
    mixture = tasks.register(collection, None, ALL, 8, {})
    lengths = {"inputs": 16, "targets": 32, "passage": 1}
    converter = DualEncoderFeatureConverter(pack=False)
    batch = next(tasks.batches(mixture, lengths, converter, 64, seed=0))
    assert {k: v.shape for k, v in batch.items()} == {
        "left_encoder_input_tokens": (64, 16),
        "right_encoder_input_tokens": (64, 32),
        "passage": (64, 1),
    }
    texts = [collection.passage(row).full_text for row in batch["passage"][:, 0]]
    np.testing.assert_array_equal(batch["right_encoder_input_tokens"], vocabulary.batch(texts, 32))


def test_batches_depend_on_seed_and_position_alone(collection: Collection, table: DocidTable):
    converter = seqio.EncDecFeatureConverter(pack=False)
    lengths = {"inputs": 24, "targets": table.length}

    def take(seed: int, position: int, count: int) -> np.ndarray:
        stream = tasks.batches(mixture, lengths, converter, 16, seed, position)
        return np.stack([b["encoder_input_tokens"] for b in itertools.islice(stream, count)])

    mixture = tasks.register(collection, table, ALL, 8, {"chunks": 0.2})
    whole = take(0, 0, 30)  # several epochs
    np.testing.assert_array_equal(take(0, 20, 10), whole[20:])
    assert (take(1, 0, 5) != whole[:5]).any()

    mixture = tasks.register(collection, table, {"chunks": 1}, 8, {})
    rows = {tuple(row) for batch in take(0, 0, 20) for row in batch}
    assert len(rows) > 200  # 320 chunks of 100 passages: each epoch has its own


def test_bad_rates_are_named(collection: Collection, table: DocidTable):
    with pytest.raises(UserError, match="no task 'query': the tasks are firstp, chunks, queries"):
        tasks.register(collection, table, {"query": 1}, 8, {})
    with pytest.raises(UserError, match="no task has both a rate and examples"):
        tasks.register(collection, table, {"queries": 0}, 8, {})
