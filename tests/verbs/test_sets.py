"""The verb `sets`; what the sets hold: test_term_weights.py, test_search_lexical.py."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from model_folders import random_params, write_model_folder

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.token_sets import TokenSets
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.lexical_encoder import LexicalEncoder
from retrieval_jax.verbs.sets import make_sets


def test_sets_are_made_once_and_again_for_other_settings(own_work: Workspace):
    where = {"source": "small_docs", "work_dir": str(own_work.folder)}
    made = make_sets(**where, m=4)
    folder = own_work.sets("bm25")
    assert made == {"sets": str(folder), "passages": 100, "m": 4, "impacts": True, "bytes_per_passage": 12}
    before = (folder / "tokens.npy").stat().st_ino
    make_sets(**where, m=4)
    assert (folder / "tokens.npy").stat().st_ino == before
    made = make_sets(**where, m=4, impacts=False)
    assert made["bytes_per_passage"] == 8
    assert TokenSets.open(folder).impacts_PxM is None


def test_sets_that_a_model_was_trained_with_are_not_replaced_unasked(own_work: Workspace):
    where = {"source": "small_docs", "work_dir": str(own_work.folder)}
    make_sets(**where, m=4)
    learned = {"DataConfig.sets": TokenSets.open(own_work.sets("bm25")).fingerprint()}
    own_work.model("joint").mkdir(parents=True)
    storage.write_json(own_work.model("joint") / "settings.json", learned)
    make_sets(**where, m=4)
    with pytest.raises(UserError, match=r"sets/bm25: .*/joint was trained with these .*make_sets.force=True"):
        make_sets(**where, m=5)
    assert TokenSets.open(own_work.sets("bm25")).size == 4
    assert make_sets(**where, m=5, name="others")["m"] == 5
    assert make_sets(**where, m=5, force=True)["m"] == 5


def test_a_weight_that_there_is_not(own_work: Workspace):
    with pytest.raises(UserError, match=r"weights: no folder bm-25: name a lexical encoder's, or 'bm25'"):
        make_sets("small_docs", str(own_work.folder), "bm-25")


def test_a_model_that_weighs_no_tokens_is_refused(
    own_work: Workspace, collection: Collection, tmp_path: Path
):
    model = DualEncoder(T5Config(8, 4, 1, 4, 4, 0, 0), vector_dim=4)
    write_model_folder(tmp_path / "dense", model, random_params(model), collection)
    with pytest.raises(UserError, match=r"make_sets.weights: .* holds a DualEncoder: name a lexical encoder"):
        make_sets("small_docs", str(own_work.folder), str(tmp_path / "dense"))


@pytest.mark.slow
def test_two_hosts_make_the_same(own_work: Workspace, collection: Collection, tmp_path: Path):
    vocabulary = Vocabulary(collection.vocabulary_path)
    model = LexicalEncoder(T5Config(vocabulary.size, 8, 1, 1, 1, 8, 16))
    write_model_folder(tmp_path / "lexical", model, random_params(model), collection)
    where = {
        "source": "small_docs",
        "work_dir": str(own_work.folder),
        "weights": str(tmp_path / "lexical"),
        "m": 6,
    }
    make_sets(**where, name="one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": "{}:{}".format(*free.getsockname()),
            "JAX_NUM_PROCESSES": "2",
        }
    flags = ["--COLLECTION=small_docs", f"--WORK_DIR={own_work.folder}", "--SETS=two"]
    settings = [f"--gin.make_sets.weights={where['weights']!r}", "--gin.make_sets.m=6"]
    paths.remove(own_work.embeddings("lexical.top6"))  # or nothing is encoded
    program = (
        "import sys; from retrieval_jax.embeddings import encoding; encoding.PART = 16; "
        "from retrieval_jax.main import main; sys.exit(main(sys.argv[1:]))"
    )  # several parts, so that both hosts encode
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", program, "sets", *flags, *settings],
            env=environment | {"JAX_PROCESS_ID": str(i)},
        )
        for i in range(2)
    ]
    assert [host.wait(timeout=300) for host in hosts] == [0, 0]
    one, two = (TokenSets.open(own_work.sets(name)) for name in ("one", "two"))
    np.testing.assert_array_equal(one.tokens_PxM, two.tokens_PxM)
    np.testing.assert_array_equal(one.impacts_PxM, two.impacts_PxM)
    assert one.tokens_PxM.any()
