"""Targets, decoded and compared with the texts and docids that they are made of."""

import numpy as np

from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.examples import Examples, TaskFactory
from retrieval_jax.examples.targets import DocidTargets, QueryTargets, pad

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
