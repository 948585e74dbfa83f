"""Groups of docids against the docid table and the collection's queries, one candidate at a time."""

import dataclasses

import numpy as np
import pytest
import seqio
from teacher import random_scores, write_scores

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.scores import ScoredPassages
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.docids.token_sets import TokenSets
from retrieval_jax.examples import seqio_tasks
from retrieval_jax.examples.docid_groups import DocidGroupTargets
from retrieval_jax.examples.examples import Examples, TaskFactory
from retrieval_jax.examples.features import pad
from retrieval_jax.examples.targets import PassageTargets
from retrieval_jax.examples.tasks import Example
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.models.feature_converters import DocidGroupFeatureConverter


def test_a_batch_holds_the_docids_of_a_querys_candidates(
    collection: Collection, vocabulary: Vocabulary, inputs: TaskFactory, table: DocidTable
):
    ids, queries = collection.ids.to_pylist(), collection.queries("train")[:5]
    negatives = {q.id: tuple(ids[2 * n : 3 * n]) for n, q in enumerate(queries)}  # from none to four
    ranked = dataclasses.replace(inputs, train_group_size=(1, 3), mined=negatives)
    targets = DocidGroupTargets(table, input_length=12, group_size=4)
    rngs = [np.random.default_rng(n) for n in range(5)]
    task = ranked.task("labelled")
    made = Examples(task, targets).get(range(5), map(np.random.default_rng, range(5)))
    made.append(Examples(ranked.task("firstp"), targets)(7, rngs[0]))
    batch = targets.to_batch(pad(made, targets.features))
    T = table.length
    expected = np.zeros((6, 4, T), np.int32)
    grades = np.full((6, 4), -1)
    for n, (rng, query) in enumerate(zip(rngs, queries, strict=True)):
        rows = task(n, rng).rows
        assert {ids[row] for row in rows[1:]} <= set(negatives[query.id]) - set(query.positives)
        expected[n, : len(rows)] = table.tokens_NxL[rows]
        grades[n, : len(rows)] = [query.positives[ids[rows[0]]], *[0] * (len(rows) - 1)]
    assert (grades == 0).sum() >= 6
    expected[5, 0], grades[5, 0] = table.tokens_NxL[7], 1
    np.testing.assert_array_equal(batch["decoder_target_tokens"], expected)
    np.testing.assert_array_equal(batch["grade"], grades)
    np.testing.assert_array_equal(batch["decoder_loss_weights"], expected > 0)
    np.testing.assert_array_equal(batch["decoder_input_tokens"][..., 1:], expected[..., :-1])
    assert not batch["decoder_input_tokens"][..., 0].any()
    texts = [query.text for query in queries]
    np.testing.assert_array_equal(batch["encoder_input_tokens"][:5], vocabulary.batch(texts, 12))
    assert {x.dtype for x in batch.values()} == {np.dtype(np.int32)}


@pytest.mark.parametrize("more", [None, np.repeat(np.arange(0, 60, 3, np.int32), 2)], ids=["one", "several"])
def test_a_prefix_has_the_best_score_of_the_passages_that_begin_with_it(
    own_work: Workspace, collection: Collection, more: np.ndarray | None
):
    """Of docids that are shared, and of which most begin alike; in a batch, and in the features' lengths."""
    given, ids = random_scores(collection), collection.ids.to_pylist()
    write_scores(own_work, "t", given)
    owners = [*ids, *(ids[row] for row in (() if more is None else more))]
    tokens_NxT = np.random.default_rng(0).integers(1, 4, (len(owners), 3)).astype(np.uint8)
    table = DocidTable(
        "rq", tokens_NxT, collection.ids, 5, collection.fingerprint, extra_docid_passage_M=more
    )
    docids = {passage: [] for passage in ids}
    for passage, docid in zip(owners, tokens_NxT.tolist(), strict=True):
        docids[passage].append(docid)
    config = DataConfig({"labelled": 1.0}, input_length=8, positives=2, negatives=4, scores="t")
    dataset = TrainDataset(config, own_work, collection, DocidGroupTargets, table)
    queries, task = collection.queries("train"), dataset.computed("labelled").task
    made = dataset.computed("labelled").get(
        range(len(queries)), map(np.random.default_rng, range(len(queries)))
    )
    assert all(len(made[0][name]) == n for name, n in DocidGroupTargets.lengths(config, 3).items() if n != 8)
    batch = dataset.targets.to_batch(pad(made, dataset.targets.features))
    assert batch["score"].dtype == np.float32
    expected, others = np.full(batch["score"].shape, np.nan, np.float32), set()
    for i, query in enumerate(queries):
        for c, row in enumerate(task(i, np.random.default_rng(i)).rows):
            written = batch["decoder_target_tokens"][i, c].tolist()
            assert written in docids[ids[row]]
            others.add(docids[ids[row]].index(written))
            for n in (1, 2, 3):
                scored = given.get(query.id, {}).items()
                under = [s for p, s in scored if any(docid[:n] == written[:n] for docid in docids[p])]
                expected[i, c, n - 1] = max(under, default=np.nan)
    assert others == ({0} if more is None else {0, 1, 2})
    np.testing.assert_array_equal(batch["score"], expected)
    assert (expected[..., 1] > expected[..., 2]).any()  # another passage has the prefix and a higher score
    # seqio's feature converter makes the same batch of the same examples.
    lengths = {name: feature.length for name, feature in dataset.targets.features.items()}
    seqio_tasks.register(dataset.prefix, {"labelled": dataset.computed("labelled")}, {}, dataset.vocabulary)
    task = seqio.get_mixture_or_task(f"{dataset.prefix}.labelled").get_dataset(lengths, shuffle=False)
    converter = DocidGroupFeatureConverter(pack=False)
    (found,) = converter(task, lengths).batch(len(queries)).as_numpy_iterator()
    assert found.keys() == batch.keys()
    for name, array in batch.items():
        np.testing.assert_array_equal(found[name], array)
    assert converter.get_model_feature_lengths(lengths) == {name: x.shape[1] for name, x in batch.items()}
    assert np.isnan(dataset.targets(dataset.computed("firstp").task(0, None))["score"]).all()
    assert dataset.recipe("labelled")["candidates"] == [2, 4]


def random_sets(collection: Collection, vocabulary: Vocabulary, size: int, with_impacts: bool) -> TokenSets:
    """Sets of 0 to `size` tokens."""
    rng, P = np.random.default_rng(0), collection.passage_count
    tokens_PxM = rng.integers(2, vocabulary.size, (P, size)) * (
        np.arange(size) < rng.integers(0, size + 1, (P, 1))
    )
    impacts_PxM = rng.integers(1, 256, (P, size)).astype(np.uint8) if with_impacts else None
    of = (collection.ids, collection.fingerprint, vocabulary.checksum)
    return TokenSets(tokens_PxM.astype(np.uint16), impacts_PxM, 0.25, *of)


@pytest.mark.parametrize("more", [None, np.repeat(np.arange(0, 60, 3, np.int32), 2)], ids=["one", "several"])
@pytest.mark.parametrize("with_impacts", [True, False])
def test_a_batch_holds_the_set_docids_of_its_candidates(
    own_work: Workspace, collection: Collection, vocabulary: Vocabulary, more, with_impacts: bool
):
    """Of the passage, whichever of its docids is a candidate; in features' lengths, and as seqio makes it."""
    sets = random_sets(collection, vocabulary, 5, with_impacts)
    storage.build_once(own_work.sets("s"), {}, sets.write)
    write_scores(own_work, "t", random_scores(collection))
    count = collection.passage_count + (0 if more is None else len(more))
    tokens_NxT = np.random.default_rng(0).integers(1, 4, (count, 3)).astype(np.uint8)
    table = DocidTable(
        "rq", tokens_NxT, collection.ids, 5, collection.fingerprint, extra_docid_passage_M=more
    )
    config = DataConfig({"labelled": 1.0}, input_length=8, negatives=4, scores="t", sets="s")
    dataset = TrainDataset(config, own_work, collection, DocidGroupTargets, table)
    examples, count = dataset.computed("labelled"), len(collection.queries("train"))
    made = examples.get(range(count), map(np.random.default_rng, range(count)))
    batch = dataset.targets.to_batch(pad(made, dataset.targets.features))
    expected = np.zeros((count, 5, 5), np.int32)
    impacts = np.zeros((count, 5, 5), np.float32)
    for i in range(count):
        for c, row in enumerate(examples.task(i, np.random.default_rng(i)).rows):
            expected[i, c] = sets.tokens_PxM[row]
            impacts[i, c] = sets.impacts_PxM[row] * 0.25 if with_impacts else 0
    np.testing.assert_array_equal(batch["set_tokens"], expected)
    assert batch["set_tokens"].dtype == np.int32
    assert ("set_impacts" in batch) == with_impacts
    if with_impacts:
        np.testing.assert_array_equal(batch["set_impacts"], impacts)
        assert batch["set_impacts"].dtype == np.float32
    lengths = {name: feature.length for name, feature in dataset.targets.features.items()}
    assert DocidGroupTargets.lengths(config, 3).items() <= lengths.items()
    passages = TrainDataset(config, own_work, collection, PassageTargets)
    of_texts = passages.computed("labelled").get(range(count), map(np.random.default_rng, range(count)))
    of_texts = passages.targets.to_batch(pad(of_texts, passages.targets.features))
    for name in ("set_tokens", "set_impacts")[: 1 + with_impacts]:
        np.testing.assert_array_equal(of_texts[name], batch[name])  # of a lexical encoder's candidates
    assert of_texts["right_encoder_input_tokens"].shape == (count, 5, 1)  # no text is read or sent
    of_class = PassageTargets.lengths(config)
    assert of_class["targets"] == passages.targets.features["targets"].length == 5
    if more is None:
        seqio_tasks.register(dataset.prefix, {"labelled": examples}, {}, dataset.vocabulary)
        task = seqio.get_mixture_or_task(f"{dataset.prefix}.labelled").get_dataset(lengths, shuffle=False)
        converter = DocidGroupFeatureConverter(pack=False)
        (found,) = converter(task, lengths).batch(count).as_numpy_iterator()
        for name, array in batch.items():
            np.testing.assert_array_equal(found[name], array)
        assert dataset.recipe("labelled")["sets"] == sets.fingerprint()


def test_sets_of_another_collection_are_refused(own_work, collection, vocabulary):
    sets = random_sets(collection, vocabulary, 5, False)
    storage.build_once(own_work.sets("s"), {}, dataclasses.replace(sets, collection="x").write)
    with pytest.raises(UserError, match=r"sets/s: of another collection or vocabulary: `retrieval-jax sets`"):
        TrainDataset(DataConfig(sets="s"), own_work, collection, DocidGroupTargets).sets  # noqa: B018


def test_a_copy_of_a_scored_passage_has_its_score(table: DocidTable):
    """The teacher scored row 1; its copy in row 0 has a docid of its own."""
    scored = ScoredPassages(np.array([1]), np.array([0]), np.float32([2.5]))
    targets = DocidGroupTargets(table, input_length=4, group_size=2, has_scores=True)
    features = targets(Example([5], [0, 3], [1, 0], scores=[2.5, np.nan], scored=scored))
    score_CxT = np.reshape(features["score"], (2, table.length))
    assert (score_CxT[0] == 2.5).all()
    assert np.isnan(score_CxT[1, -1])
    # Where both were scored, each docid has its own score, and a prefix that of the better one.
    scored = ScoredPassages(np.array([1, 0]), np.array([0, 0]), np.float32([2.5, 1.0]))
    features = targets(Example([5], [0, 1], [1, 0], scores=[2.5, 2.5], scored=scored))
    score_CxT = np.reshape(features["score"], (2, table.length))
    assert score_CxT[:, -1].tolist() == [1.0, 2.5]
    assert (score_CxT[:, :-1] == 2.5).all()
