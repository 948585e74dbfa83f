"""Examples, decoded and compared with the texts they come from."""

import numpy as np
import pytest
from tables import KINDS

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Query
from retrieval_jax.data.copies import KnownAnswers
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import EOS, Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.examples import ROWS, Examples, TaskFactory, mixture
from retrieval_jax.examples.targets import DocidTargets, PassageTargets, QueryTargets, pad
from retrieval_jax.examples.tasks import PADDING, LabelledGroups

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def vocabulary(collection: Collection) -> Vocabulary:
    return Vocabulary(collection.vocabulary_path)


@pytest.fixture(scope="module")
def inputs(collection: Collection, vocabulary: Vocabulary) -> TaskFactory:
    return TaskFactory(collection, vocabulary, chunk_length=8, chunks=3)


@pytest.fixture(scope="module", params=["atomic", "naive"])
def table(request, collection: Collection) -> DocidTable:
    return KINDS[request.param](collection)


def test_docid_tables_name_every_passage(collection: Collection, vocabulary: Vocabulary, table: DocidTable):
    assert list(map(str, table.passage_ids)) == [p.id for p in collection.passages()]
    if table.kind == "atomic":
        assert table.tokens_NxL[:, 0].tolist() == list(range(1, collection.passage_count + 1))
        assert table.output_size == 128
    else:
        for tokens, passage in zip(table.tokens_NxL, collection.passages(), strict=True):
            assert tokens[tokens > 0].tolist() == [*vocabulary.encode(passage.id), EOS]


def test_passages_are_read_from_their_beginning_and_in_chunks(
    collection: Collection, vocabulary: Vocabulary, inputs: TaskFactory
):
    firstp, daq = inputs.task("firstp"), inputs.task("daq")
    passages = list(collection.passages())
    assert len(firstp) == len(passages)
    assert len(daq) == 3 * len(passages)
    for row, passage in enumerate(passages):
        text = vocabulary.encode(passage.full_text)
        assert firstp(row, RNG).tokens == text[:8]
        assert list(firstp(row, RNG).rows) == [row]
        chunks = [daq(row + k * len(passages), RNG) for k in range(3)]
        for chunk in chunks:
            assert list(chunk.rows) == [row]
            assert len(chunk.tokens) == min(8, len(text))
            assert any(text[i : i + 8] == chunk.tokens for i in range(len(text)))
    places = {tuple(daq(i, RNG).tokens) for i in range(len(daq))}
    assert len(places) > 0.8 * len(daq)  # random places
    assert daq(5, RNG) == daq(5, np.random.default_rng(9))  # the same ones each time


def test_labelled_queries_come_with_each_positive(collection: Collection, vocabulary: Vocabulary, inputs):
    task = inputs.task("labelled")
    rows = {p.id: row for row, p in enumerate(collection.passages())}
    expected = [
        (vocabulary.encode(q.text), rows[p]) for q in collection.queries("train") for p in q.positives
    ]
    found = [task(i, RNG) for i in range(len(task))]
    assert [(e.tokens, e.rows[0]) for e in found] == expected


def test_groups_hold_some_positives_then_some_negatives(collection: Collection, vocabulary: Vocabulary):
    ids = [p.id for p in collection.passages()]
    queries = [
        Query("a", "first", {ids[3]: 2, ids[1]: 1, ids[7]: 1}, (ids[4], ids[9])),
        Query("b", "second", {ids[0]: 3}),
    ]
    answers = KnownAnswers(queries)
    groups = LabelledGroups(collection, vocabulary, queries, positives=2, negatives=1, answers=answers)
    seen = set()
    for seed in range(60):
        example = groups(0, np.random.default_rng(seed))
        assert len(example.rows) == 3
        assert all(
            {3: 2, 1: 1, 7: 1}[row] == grade
            for row, grade in zip(example.rows[:2], example.grades[:2], strict=True)
        )
        assert example.rows[2] in (4, 9)
        assert example.grades[2] == 0
        assert {*example.rows[:2], *example.other_positives} == {3, 1, 7}
        seen.add(tuple(example.rows))
    assert len(seen) == 6  # every choice: three pairs of positives, two negatives
    assert list(groups(1, RNG).rows) == [0]

    targets = PassageTargets(
        collection, vocabulary, input_length=6, passage_length=12, group_size=3, other_positives=2
    )
    features = pad([targets(groups(i, np.random.default_rng(0))) for i in range(2)], targets.features)
    assert features["passage"][1].tolist() == [0, PADDING, PADDING]
    assert features["grade"][1].tolist() == [3, PADDING, PADDING]
    assert features["other_positives"][1].tolist() == [PADDING, PADDING]
    (known,) = {3, 1, 7} - {*features["passage"][0]}
    assert features["other_positives"][0].tolist() == [known, PADDING]
    texts = [collection.passage(0).full_text]
    np.testing.assert_array_equal(features["targets"][1][:12], vocabulary.batch(texts, 12)[0])
    assert not features["targets"][1][12:].any()
    texts = [p.full_text for p in collection.get(features["passage"][0])]
    np.testing.assert_array_equal(features["targets"][0].reshape(3, 12), vocabulary.batch(texts, 12))


def test_targets_are_docids_or_the_query(
    collection: Collection, vocabulary: Vocabulary, inputs: TaskFactory, table: DocidTable
):
    task = inputs.task("labelled")
    written = Examples(task, DocidTargets(table, 16))
    features = pad([written(4, RNG)], written.targets.features)
    query = collection.queries("train")[4]
    np.testing.assert_array_equal(features["inputs"], vocabulary.batch([query.text], 16))
    (row,) = task(4, RNG).rows
    np.testing.assert_array_equal(features["targets"][0], table.tokens_NxL[row])

    turned = Examples(inputs.task("doc2query"), QueryTargets(collection, vocabulary, 20, 10))
    features = pad([turned(4, RNG)], turned.targets.features)
    np.testing.assert_array_equal(
        features["inputs"], vocabulary.batch([collection.passage(row).full_text], 20)
    )
    np.testing.assert_array_equal(features["targets"], vocabulary.batch([query.text], 10))


def test_mixtures_have_the_papers_tasks_in_proportion_to_their_examples(inputs: TaskFactory):
    made = mixture("2b", inputs.task)
    assert list(made) == list(ROWS["2b"])
    assert sum(share for _, share in made.values()) == pytest.approx(1)
    counts = {name: len(task) for name, (task, _) in made.items()}
    assert made["daq"][1] / made["labelled"][1] == pytest.approx(counts["daq"] / counts["labelled"])
    made = mixture({"firstp": 3, "labelled": 1, "daq": 0}, inputs.task)
    assert {name: share for name, (_, share) in made.items()} == {"firstp": 0.75, "labelled": 0.25}


def test_what_cannot_be_mixed_is_named(inputs: TaskFactory):
    with pytest.raises(UserError, match="no mixture '9z': the paper's rows are 1a, 2a"):
        mixture("9z", inputs.task)
    with pytest.raises(UserError, match="no task 'query': the tasks are firstp, daq"):
        mixture({"query": 1}, inputs.task)
    with pytest.raises(UserError, match="no train query is labelled 'llm': there are no labels"):
        mixture({"labelled_llm": 1}, inputs.task)
    with pytest.raises(UserError, match="d2q: no synthetic queries"):
        mixture("6b", inputs.task)
    with pytest.raises(UserError, match="no task has both a rate and examples"):
        mixture({"firstp": 0}, inputs.task)
