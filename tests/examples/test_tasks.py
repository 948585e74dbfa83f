"""Tasks, decoded and compared with the texts that they are made of."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import write
from tables import KINDS
from teacher import random_scores, write_scores

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import synthetic
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.data.copies import KnownAnswers
from retrieval_jax.data.synthetic import QueryShards
from retrieval_jax.data.variations import add_typo
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.examples.examples import TaskFactory
from retrieval_jax.examples.features import pad
from retrieval_jax.examples.targets import DocidTargets, PassageTargets, QueryTargets
from retrieval_jax.examples.tasks import PADDING, LabelledGroups, Typos, cut_sentence
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.verbs.importing import import_collection

RNG = np.random.default_rng(0)


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


@given(
    st.text(st.sampled_from("ab.!? \n。"), max_size=40),
    st.floats(0, 1, exclude_max=True),
)
def test_the_rest_of_a_text_does_not_contain_the_sentence_that_was_taken_out(text: str, drawn: float):
    part, rest = cut_sentence(text, drawn)
    assert part in text or part in " ".join(text.split())
    if (part, rest) != (text, text):
        assert part
        assert rest
        assert part not in rest
        assert not set(rest) - set(text) - {" "}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two? Three", {("One.", "Two? Three"), ("Two?", "One. Three"), ("Three", "One. Two?")}),
        ("One. Two. One.", {("One.", "Two."), ("Two.", "One. One.")}),
        ("版本三。新的。", {("版本三。", "新的。"), ("新的。", "版本三。")}),
        (
            "a gloss of six words, alone",
            {("a gloss of", "six words, alone"), ("six words, alone", "a gloss of")},
        ),
        ("e.g. v1.2 is one", {("v1.2 is one", "e.g."), ("e.g.", "v1.2 is one")}),
        ("word", {("word", "word")}),
        ("", {("", "")}),
    ],
)
def test_each_sentence_of_a_text_can_be_taken_out(text: str, parts: set):
    assert {cut_sentence(text, drawn) for drawn in np.linspace(0, 1, 20, endpoint=False)} == parts


def test_a_dual_encoder_finds_sentences_and_titles_by_the_rest_of_their_passages(
    collection: Collection, vocabulary: Vocabulary
):
    tasks = TaskFactory(collection, vocabulary, chunks=3, train_group_size=(1, 1))
    targets = PassageTargets(collection, vocabulary, 32, 400, 2)
    count, seen = collection.passage_count, set()
    for name in ("sentence", "title"):
        task = tasks.task(name)
        assert len(task) == {"sentence": 3, "title": 1}[name] * count
        examples = task.get(range(len(task)), [RNG] * len(task))
        assert examples[5] == task(5, np.random.default_rng(9))
        for number, (example, features) in enumerate(zip(examples, targets.get(examples), strict=True)):
            passage = collection.passage(number % count)
            (text,) = vocabulary.decode(np.array([features["targets"][:400]]))
            (query,) = vocabulary.decode(np.array([example.tokens]))
            assert list(example.rows) == [number % count]
            assert features["targets"][400:] == [0] * 400
            assert text == vocabulary.decode(vocabulary.batch([example.rest], 400))[0]
            if name == "title" and passage.title:
                assert vocabulary.encode(passage.title) == example.tokens
                assert example.rest == passage.text
            elif example.rest != passage.full_text:
                assert query not in text
                assert len(example.rest) < len(passage.full_text)
            seen.add((name, query))
    assert len(seen) > 2 * count  # several sentences a passage


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


@pytest.mark.parametrize("positives", [1, 2, 3])
@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_groups_say_whether_they_are_drawn(
    collection: Collection, vocabulary: Vocabulary, positives: int, negatives: int
):
    ids = [p.id for p in collection.passages()]
    queries = [
        Query("a", "first", {ids[3]: 1, ids[1]: 1}, (ids[4], ids[9])),
        Query("b", "second", {ids[0]: 3}),
    ]
    groups = LabelledGroups(collection, vocabulary, queries, positives, negatives, KnownAnswers(queries))
    rows = {tuple(groups(0, np.random.default_rng(seed)).rows) for seed in range(40)}
    assert groups.draws == (len(rows) > 1)


def test_candidates_come_with_the_teachers_scores(own_work: Workspace, collection: Collection):
    """Negatives are drawn from what is mined; without that, from the scored passages that answer nothing."""
    given = random_scores(collection)
    write_scores(own_work, "t", given)
    ids = collection.ids.to_pylist()
    queries = collection.queries("train")
    mined = {query.id: (ids[0], ids[1]) for query in queries}
    for of_queries in ({}, mined):
        config = DataConfig(positives=2, negatives=3, scores="t")
        dataset = TrainDataset(config, own_work, collection, PassageTargets)
        tasks = dataclasses.replace(dataset._tasks, mined=of_queries)
        task = tasks.task("labelled")
        for i, query in enumerate(queries):
            example = task(i, np.random.default_rng(i))
            of_query = given.get(query.id, {})
            assert len(example.scores) == len(example.rows)
            expected = [np.float32(of_query.get(ids[row], np.nan)) for row in example.rows]
            np.testing.assert_array_equal(np.float32(example.scores), expected)
            grades = zip(example.rows, example.grades, strict=True)
            negatives = {ids[row] for row, grade in grades if not grade}
            pool = {*query.negatives, *(of_queries.get(query.id, ()) if of_queries else of_query)}
            pool -= {*query.positives, *tasks.answers.others(query)}
            assert negatives <= pool
            assert len(negatives) == min(3, len(pool))
            scored = dict(zip(example.scored.rows_P.tolist(), example.scored.scores_P.tolist(), strict=True))
            assert scored == {ids.index(p): float(np.float32(score)) for p, score in of_query.items()}
        features = dataset.targets(example)
        padding = [np.nan] * (5 - len(example.rows))
        np.testing.assert_array_equal(features["score"], [*example.scores, *padding])
    assert not tasks.task("firstp")(0, RNG).scores
    assert np.isnan(dataset.targets(tasks.task("firstp")(0, RNG))["score"]).all()
    assert dataset.recipe("labelled")["scores"] == dataset.scores.fingerprint


def test_a_copy_has_the_score_of_its_text(own_work: Workspace, tmp_path: Path):
    """Passages 1 and 3 have one text: the positive is one, and the teacher scored the other."""
    folder = write(
        tmp_path / "copies",
        {
            "docs.tsv": "".join(f"p{i}\t\t{text}\n" for i, text in enumerate(("a b", "c d", "e f", "c  d"))),
            "queries.train.tsv": "q\tc\n",
            "qrels.train.tsv": "q\tp3\t1\nq\tp0\t-1\n",
        },
    )
    work = Workspace(tmp_path / "work_of_copies")
    import_collection(str(folder), str(work.folder), vocab_size=40)
    collection = Collection(work.collection)
    assert collection.queries("train")[0].negatives == ("p0",)  # a grade below 0 is a negative
    write_scores(work, "t", {"q": {"p1": 3.0, "p2": 2.0}})
    data = TrainDataset(DataConfig(negatives=9, scores="t"), work, collection, PassageTargets)
    example = data.computed("labelled").task(0, RNG)
    assert list(example.rows) == [3, 0, 2]
    np.testing.assert_array_equal(example.scores, [3.0, np.nan, 2.0])
    query, vocabulary = Query("q", "c", {"p0": 1}, ("p1", "p3", "p2")), Vocabulary(collection.vocabulary_path)
    given = (collection, vocabulary, [query], 1, 9, KnownAnswers([query]))
    scored = LabelledGroups(*given, data.scores.by_row(collection), True)
    assert scored.draws
    assert not LabelledGroups(*given).draws
    assert LabelledGroups(*given, typos=Typos(0.1)).draws
    for groups in (LabelledGroups(*given), scored):
        assert list(groups(0, RNG).rows) == [0, 1, 2]  # one negative a text


@pytest.mark.parametrize("targets", [DocidTargets, PassageTargets])
def test_a_share_of_the_queries_gets_typos(own_work: Workspace, collection: Collection, targets):
    """By count, among the queries with a word that can have one; what else an example holds stays."""
    shards = QueryShards(own_work.folder / "shards", collection.passage_count, collection.passage_count)
    texts = [p.title or p.text[:40] for p in collection.passages()]
    shards.write(0, ({"queries": [text], "made": 1, "distinct": 1} for text in texts))
    recipe = {"collection": collection.fingerprint}
    storage.build_once(own_work.synthetic("s"), recipe, lambda tmp: synthetic.join(tmp, collection, shards))

    table = KINDS["naive"](collection) if targets is DocidTargets else None
    plain = TrainDataset(DataConfig(synthetic="s", chunk_length=8), own_work, collection, targets, table)
    config = dataclasses.replace(plain.config, typos=0.3)
    dataset = dataclasses.replace(plain, config=config)
    queries = collection.queries("train")
    per_pair = [q.text for q in queries for _ in (q.positives if targets is DocidTargets else [0])]
    for task, clean in (("labelled", per_pair), ("d2q", texts)):
        examples, without = dataset.computed(task), plain.computed(task)
        numbers = [i for i, text in enumerate(clean) if add_typo(text, RNG) != text]
        assert len(examples) == len(clean) == len(without)
        assert len(numbers) > 20
        changed = 0
        for epoch in range(20):
            rngs = [np.random.default_rng([i, epoch]) for i in numbers]
            for i, features in zip(numbers, examples.get(numbers, rngs), strict=True):
                rng = np.random.default_rng([i, epoch])
                text = add_typo(clean[i], rng) if rng.random() < 0.3 else clean[i]
                assert features["inputs"] == dataset.vocabulary.encode(text)
                changed += text != clean[i]
                expected = without(i, np.random.default_rng(0))
                if len(queries[min(i, len(queries) - 1)].positives) == 1 or task == "d2q" or table:
                    assert {**features, "inputs": 0} == {**expected, "inputs": 0}
        drawn = 20 * len(numbers)
        assert abs(changed / drawn - 0.3) < 4 * (0.3 * 0.7 / drawn) ** 0.5
        assert examples(numbers[0], np.random.default_rng(3)) == examples(
            numbers[0], np.random.default_rng(3)
        )

        if targets is PassageTargets:  # the query stays as it is, and its copy has the typo
            copies = dataclasses.replace(plain, config=dataclasses.replace(config, typo_copies=True))
            some = numbers[:5]
            rngs = ([np.random.default_rng([i, 7]) for i in some] for _ in range(2))
            pairs = zip(
                copies.computed(task).get(some, next(rngs)), examples.get(some, next(rngs)), strict=True
            )
            for i, (found, varied) in zip(some, pairs, strict=True):
                assert found["copy"] == varied["inputs"]
                assert found["inputs"] == dataset.vocabulary.encode(clean[i])
                assert {**varied, "inputs": 0, "copy": 0} == {**found, "inputs": 0, "copy": 0}
            batch = PassageTargets.to_batch(pad([found], copies.targets.features))
            expected = pad([found], copies.targets.features)["copy"]
            assert (batch["copy_encoder_input_tokens"] == expected).all()

    if targets is PassageTargets:
        features = copies.computed("firstp")(0, RNG)
        assert features["copy"] == features["inputs"]
    else:
        with pytest.raises(UserError, match=r"DataConfig.typo_copies: a dual encoder alone"):
            dataclasses.replace(plain, config=dataclasses.replace(config, typo_copies=True))
    assert dataset.computed("firstp")(0, RNG) == plain.computed("firstp")(0, RNG)
    found, _ = dataset.queries("dev")  # what is evaluated has none
    expected, _ = plain.queries("dev")
    assert [found(i, RNG)["inputs"] for i in range(10)] == [expected(i, RNG)["inputs"] for i in range(10)]


def test_queries_that_are_to_be_written_have_no_typos(work: Workspace, collection: Collection):
    dataset = TrainDataset(DataConfig({"doc2query": 1}, typos=1.0), work, collection, QueryTargets)
    query = collection.queries("train")[0]
    assert dataset.computed("doc2query")(0, RNG)["targets"] == dataset.vocabulary.encode(query.text)
