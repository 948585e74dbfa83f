"""The columns of the softmax begin as the network's states for the passages, each computed alone."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from tables import KINDS

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.examples.targets import DocidTargets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.training.docid_columns import begin_as_passages
from retrieval_jax.training.run import docid_softmax


def on_mesh(folder: str, devices: int, parallelism: int, sharing: int = 1) -> float:
    """Compares a mesh's columns with states of one passage at a time; gives the largest difference.

    Each docid is that of `sharing` passages, of which the first one counts.
    """
    collection = Collection(folder)
    table = KINDS["atomic"](collection)
    table = dataclasses.replace(table, tokens_NxL=(table.tokens_NxL - 1) // sharing + 1)
    examples = TrainDataset(
        DataConfig(passage_length=24), Workspace(Path(folder).parent), collection, DocidTargets, table
    )
    config = T5Config(examples.vocabulary.size, 16, 2, 8, 32, 1, 1, **docid_softmax(table))
    model = GenerativeRetriever(config)
    shapes = {"encoder_input_tokens": (1, 24), "decoder_input_tokens": (1, 1)}
    boxed = jax.jit(lambda key: model.get_initial_variables(key, shapes)["params"])(jax.random.key(0))
    params = nn.unbox(boxed)
    mesh = partitioning.make_mesh(parallelism, jax.devices()[:devices])
    rules = partitioning.axis_rules()
    placed = jax.device_put(params, partitioning.params_shardings(mesh, boxed, rules))
    made = begin_as_passages(model, placed, examples, mesh, rules)

    texts = [passage.full_text for passage in collection.passages()][::sharing]
    tokens_NxS = examples.vocabulary.batch(texts, 24)
    state = jax.jit(lambda tokens: model.hidden(params, {
        "encoder_input_tokens": tokens[None], "decoder_input_tokens": np.zeros((1, 1), np.int32),
    })[0, 0])  # fmt: skip
    states_NxE = np.stack([np.float64(state(tokens)) for tokens in tokens_NxS])
    centred_NxE = states_NxE - states_NxE.mean(0)
    centred_NxE /= np.sqrt((centred_NxE**2).sum(1).mean()) or 1
    expected_ExV = np.zeros((16, config.output_size))
    expected_ExV[:, table.tokens_NxL[::sharing, 0]] = centred_NxE.T
    found = made["decoder"]["logits_dense"]["kernel"]
    assert found.sharding == placed["decoder"]["logits_dense"]["kernel"].sharding
    others = [
        jax.tree.map(lambda x: x, {**tree, "decoder": {**tree["decoder"], "logits_dense": None}})
        for tree in (made, placed)
    ]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *others))
    return float(np.abs(np.asarray(found) - expected_ExV).max())


def test_columns_are_the_centred_states_of_the_passages(collection: Collection):
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_PLATFORMS": "cpu",
    }
    tests = Path(__file__).parents[1]
    script = (
        f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests / 'training')!r}]\n"
        f"from test_docid_columns import on_mesh\n"
        f"print(*(on_mesh({str(collection.folder)!r}, 4, 2, sharing) for sharing in (1, 3, 1000)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    alone, shared, single = map(float, done.stdout.splitlines()[-1].split())
    assert alone < 1e-5
    assert shared < 1e-5
    assert single == 0  # one docid: there is nothing to tell apart
