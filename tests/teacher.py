"""A teacher's scores of a small collection, without the verb."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from retrieval_jax.core import storage
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data import scores
from retrieval_jax.data.collection import Collection


def write_scores(
    work: Workspace,
    name: str,
    train: Mapping[str, Mapping[str, float]],
    dev: Mapping[str, Mapping[str, float]] | None = None,
) -> scores.TeacherScores:
    """Makes scores/NAME of {query id: {passage id: score}}."""

    def make(folder: Path) -> dict:
        facts = scores.write(folder, "train", train.items(), {})
        if dev is not None:
            facts["dev_fingerprint"] = scores.write(folder, "dev", dev.items(), {})["fingerprint"]
        return facts

    recipe = {**Collection(work.collection).recipe("train", "dev"), "of": [train, dev]}
    storage.build_once(work.scores(name), recipe, make)
    return scores.TeacherScores(work.scores(name))


def random_scores(collection: Collection, seed: int = 0) -> dict[str, dict[str, float]]:
    """Scores of each train query's positives and of eight random passages; none of every fifth query."""
    rng, ids = np.random.default_rng(seed), collection.ids.to_pylist()
    queries = (query for i, query in enumerate(collection.queries("train")) if i % 5)
    return {
        query.id: {
            passage: float(rng.normal())
            for passage in dict.fromkeys(itertools.chain(query.positives, rng.choice(ids, 8).tolist()))
        }
        for query in queries
    }
