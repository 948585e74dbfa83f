"""Groups of docids against the docid table and the collection's queries, one candidate at a time."""

import dataclasses

import numpy as np

from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.docid_groups import DocidGroupTargets
from retrieval_jax.examples.examples import Examples, TaskFactory
from retrieval_jax.examples.targets import pad


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
