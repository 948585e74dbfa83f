"""Shapes without data, against real batches."""

import dataclasses

import numpy as np
import pytest
from teacher import random_scores, write_scores

from retrieval_jax.core.errors import UserError
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.batches import batches
from retrieval_jax.examples.docid_groups import DocidGroupTargets
from retrieval_jax.examples.features import array_dtype
from retrieval_jax.examples.targets import DocidTargets, PassageTargets, QueryTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.training.shapes import batch_shapes


def test_batches_have_the_shapes_that_are_compiled(arguments, work, own_work, collection, cli):
    assert cli("docids", *arguments, "--gin.DOCIDS='naive'")[0] == 0
    table = DocidTable.open(work.docids("naive"))
    data = DataConfig({"labelled": 1.0}, input_length=12, passage_length=20, positives=2, negatives=1)
    write_scores(own_work, "t", random_scores(collection))
    scored = dataclasses.replace(data, scores="t")
    some = TrainDataset(scored, own_work, collection, PassageTargets)
    batch = next(batches(some.stages(), some.targets, {}, 4, seed=0))
    assert {name: x.shape for name, x in batch.items()} == batch_shapes(PassageTargets, scored, 4, None)
    assert {name: x.dtype for name, x in batch.items()} == {name: array_dtype(name) for name in batch}
    assert batch["score"].dtype == np.float32
    for targets in (DocidTargets, DocidGroupTargets, PassageTargets, QueryTargets):
        mixture = {"doc2query": 1.0} if targets is QueryTargets else data.mixture
        config = dataclasses.replace(data, mixture=mixture)
        docids = table if targets in (DocidTargets, DocidGroupTargets) else None
        some = TrainDataset(config, work, collection, targets, docids)
        batch = next(batches(some.stages(), some.targets, {}, 4, seed=0))
        assert {name: x.shape for name, x in batch.items()} == batch_shapes(targets, data, 4, table.length)
        assert {x.dtype for x in batch.values()} == {np.dtype(np.int32)}
    for targets in (DocidGroupTargets, PassageTargets, QueryTargets):
        with pytest.raises(UserError, match=r"DataConfig.pack: 2: only queries with one docid each"):
            batch_shapes(targets, dataclasses.replace(data, pack=2), 4, table.length)
