"""Targets, decoded and compared with the texts and docids that they are made of."""

import dataclasses
from collections import Counter

import numpy as np

from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.examples import Examples, TaskFactory
from retrieval_jax.examples.features import pad
from retrieval_jax.examples.targets import DocidTargets, QueryTargets

RNG = np.random.default_rng(0)


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


def test_an_example_of_a_passage_with_several_docids_is_one_of_them(inputs: TaskFactory, table: DocidTable):
    """Each as often as the others, drawn by the example's own generator."""
    (row,) = inputs.task("labelled")(4, RNG).rows
    more = np.array([[9], [8], [7]]) if table.length == 1 else np.eye(3, table.length, dtype=int) + 2
    passages = np.array(
        [row, row, len(table.passage_ids) - 1] if row < len(table.passage_ids) - 1 else [0, row, row]
    )
    tokens = np.concatenate([table.tokens_NxL, more])
    several = dataclasses.replace(table, tokens_NxL=tokens, extra_docid_passage_M=passages)
    examples = Examples(inputs.task("labelled"), DocidTargets(several, 16))
    assert examples.draws
    assert not Examples(inputs.task("labelled"), DocidTargets(table, 16)).draws
    drawn = [tuple(examples(4, np.random.default_rng(seed))["targets"]) for seed in range(90)]
    expected = {tuple(docid[docid > 0].tolist()) for docid in tokens[several.docids_of(row)]}
    counts = Counter(drawn)
    assert counts.keys() == expected
    assert min(counts.values()) > 15  # of 30 expected
    again = examples.get([4] * 90, map(np.random.default_rng, range(90)))
    assert [tuple(features["targets"]) for features in again] == drawn
