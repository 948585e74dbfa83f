"""Names of the Hugging Face hub, by its own library against a hub on loopback."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hub import Hub
from model_folders import GOLDENS

from retrieval_jax.checkpoints import hub as hub_names
from retrieval_jax.checkpoints.hub import locate, locate_vocabulary
from retrieval_jax.checkpoints.initial import InitialCheckpoint
from retrieval_jax.checkpoints.pretrained import open_pretrained
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.embeddings.encoding import Embeddings
from retrieval_jax.embeddings.sources import load_embeddings
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config

pytest.importorskip("huggingface_hub")
GTR = GOLDENS / "gtr"
EXTRA = {"pytorch_model.bin": b"p", "tf_model.h5": b"t", "onnx/model.onnx": b"o", "README.md": b"# GTR"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def message(name: str) -> str:
    with pytest.raises(UserError) as raised:
        locate(name, "INITIAL_CHECKPOINT")
    text = str(raised.value)
    assert text.startswith(f"INITIAL_CHECKPOINT: {name}: ")
    assert "\n" not in text
    return text


def test_a_path_stays_as_it_is(tmp_path):
    assert locate(str(tmp_path), "INITIAL_CHECKPOINT").path == tmp_path
    assert locate("gs://bucket/t5/", "INITIAL_CHECKPOINT").name == "gs://bucket/t5/"
    assert locate_vocabulary(tmp_path / "a.model").path == tmp_path / "a.model"


def test_only_what_is_read_is_downloaded_once(hub: Hub):
    first = hub.push("org/gtr", files_of(GTR) | EXTRA)
    found = locate("hf:org/gtr", "INITIAL_CHECKPOINT")
    assert found.name == f"hf:org/gtr@{first}"
    assert found.label == "gtr"
    assert found.commit == first
    read = set(files_of(GTR)) - {"expected.npz"}
    assert {str(p.relative_to(found.path)) for p in found.path.rglob("*.*") if p.is_file()} == read
    assert sorted(hub.fetched) == sorted(read)
    assert locate("hf:org/gtr", "INITIAL_CHECKPOINT") == found
    assert len(hub.fetched) == len(read)

    # The branch moves: the next command takes its new commit, and only the files that changed are fetched.
    config = (GTR / "config.json").read_bytes() + b"\n"
    second = hub.push("org/gtr", files_of(GTR) | EXTRA | {"config.json": config})
    moved = locate("hf:org/gtr", "INITIAL_CHECKPOINT")
    assert moved.commit == second != first
    assert (moved.path / "config.json").read_bytes() == config
    assert locate(f"hf:org/gtr@{first}", "INITIAL_CHECKPOINT") == found
    hub.push("org/gtr", files_of(GTR), branch="refs/pr/1")
    assert locate("hf:org/gtr@refs/pr/1", "INITIAL_CHECKPOINT").commit not in (first, second)


def test_weights_in_parts_are_left_where_one_file_has_them(hub: Hub):
    parts = files_of(GOLDENS / "t5_1_1")
    hub.push("org/t5", parts)
    unread = {"expected.npz", "generation_config.json"}
    assert set(hub_names._needed_weights([*parts], "")) == parts.keys() - unread
    both = [*parts, "model.safetensors", "0_Transformer/model-00001-of-00002.safetensors"]
    needed = hub_names._needed_weights(both, "")
    assert sorted(needed) == [both[-1], "config.json", "model.safetensors"]


def test_a_vocabulary_alone(hub: Hub):
    commit = hub.push("org/t5", files_of(GTR) | EXTRA)
    found = locate_vocabulary("hf:org/t5")
    assert found.path.read_bytes() == (GTR / "spiece.model").read_bytes()
    assert found.name == f"hf:org/t5@{commit}"
    assert hub.fetched == ["spiece.model"]
    hub.push("org/bert", {"vocab.txt": b"a", "config.json": b"{}"})
    with pytest.raises(UserError, match=r"^VOCABULARY: hf:org/bert: no SentencePiece model is in it"):
        locate_vocabulary("hf:org/bert")


def test_what_is_not_there_or_not_readable(hub: Hub):
    hub.push("org/old", {"config.json": b"{}", **EXTRA})
    hub.push("org/text", {"README.md": b"x"})
    both = ["flax_model.msgpack", "model.safetensors", "pytorch_model.bin"]
    assert hub_names._needed_weights(both, "") == ["model.safetensors"]
    assert hub_names._needed_weights(["flax_model.msgpack", "pytorch_model.bin"], "") == [
        "flax_model.msgpack"
    ]
    assert "pickled weights are never read" in message("hf:org/old")
    assert "@refs/pr/1" in message("hf:org/old")
    assert "no weights are in it" in message("hf:org/text")
    assert f"no such repository at {hub.address}" in message("hf:org/none")
    assert "has no revision 'v9'" in message("hf:org/old@v9")
    assert "write hf:ORG/NAME" in message("hf:org/t5/config.json")
    assert "write hf:ORG/NAME" in message("hf:org/--")
    assert not hub.fetched


def test_access_on_request_needs_a_token(hub: Hub, monkeypatch):
    hub.push("org/gated", files_of(GTR))
    hub.gated.add("org/gated")
    text = message("hf:org/gated")
    assert f"ask for it at {hub.address}/org/gated" in text
    assert "HF_TOKEN" in text
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert (locate("hf:org/gated", "INITIAL_CHECKPOINT").path / "spiece.model").is_file()


def test_the_environment_says_where_the_hub_and_the_cache_are(hub: Hub, python, tmp_path):
    """In a process of its own, of which nothing but the environment is told."""
    commit = hub.push("org/gtr", files_of(GTR))
    script = (
        "from retrieval_jax.checkpoints.hub import locate; print(locate('hf:org/gtr', 'EMBEDDINGS').path)"
    )
    done = python(script)
    assert done.returncode == 0, done.stderr
    expected = tmp_path / "hf" / "hub" / "models--org--gtr" / "snapshots" / commit
    assert done.stdout.splitlines() == [str(expected)]
    assert done.stderr.splitlines() == [f"hf:org/gtr: commit {commit}"]  # no bars where nobody watches


def test_a_cut_download_goes_on(hub: Hub):
    hub.push("org/gtr", files_of(GTR))
    hub.cut = "model.safetensors"
    assert "the same command goes on with what has arrived" in message("hf:org/gtr")
    hub.cut = None
    found = locate("hf:org/gtr", "INITIAL_CHECKPOINT").path
    assert (found / "model.safetensors").read_bytes() == (GTR / "model.safetensors").read_bytes()


def test_without_a_network(hub: Hub, monkeypatch):
    from huggingface_hub import constants

    hub.push("org/gtr", files_of(GTR))
    found = locate("hf:org/gtr", "INITIAL_CHECKPOINT")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("hf:org/gtr", "INITIAL_CHECKPOINT") == found
    assert "unset HF_HUB_OFFLINE" in message("hf:org/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.push("org/part", files_of(GTR))
    locate_vocabulary("hf:org/part")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the cache has no weights of it: unset HF_HUB_OFFLINE" in message("hf:org/part")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert "HF_HUB_OFFLINE=1 takes what the cache has" in message("hf:org/gtr")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert message("hf:org/t5").endswith(
        "needs a package that is not installed: pip install 'retrieval_jax[hf]'"
    )


def test_embeddings_of_a_repository(hub: Hub, tmp_path, work, collection):
    first = hub.push("org/gtr", files_of(GTR) | EXTRA)
    here = Workspace(tmp_path / "work")
    found, fingerprint = load_embeddings("hf:org/gtr", here, collection)
    made = Embeddings.open(here.embeddings("hf--org--gtr"))
    assert made.manifest["recipe"]["model"] == f"hf:org/gtr@{first}"
    of_folder, same = load_embeddings(str(GTR), Workspace(tmp_path / "other"), collection)
    assert same == fingerprint
    assert np.array_equal(found, of_folder)

    settings = json.loads((GTR / "sentence_bert_config.json").read_text()) | {"max_seq_length": 4}
    second = hub.push("org/gtr", files_of(GTR) | {"sentence_bert_config.json": json.dumps(settings).encode()})
    _, shorter = load_embeddings("hf:org/gtr", here, collection)
    assert shorter != fingerprint
    made = Embeddings.open(here.embeddings("hf--org--gtr"))
    assert made.manifest["recipe"]["model"] == f"hf:org/gtr@{second}"
    hub.push("other/gtr", files_of(GTR))
    load_embeddings("hf:other/gtr", here, collection)  # beside the vectors of the first
    assert Embeddings.open(here.embeddings("hf--org--gtr")).manifest == made.manifest
    assert not here.embeddings("gtr").exists()  # those of a converted model


def test_import_and_train_from_the_hub(hub: Hub, cli, source, tmp_path, monkeypatch):
    prompts = json.dumps({"prompts": {"query": "find: ", "document": ""}}).encode()
    gtr = files_of(GTR) | {"config_sentence_transformers.json": prompts}
    first = hub.push("org/gtr", gtr)
    work = Workspace(tmp_path / "work")
    here = [f"--COLLECTION={source}", f"--WORK_DIR={work.folder}"]
    assert cli("import", *here, "--VOCABULARY=hf:org/gtr")[0] == 0
    assert Collection(work.collection).vocabulary_path.read_bytes() == (GTR / "spiece.model").read_bytes()
    manifest = json.loads((work.collection / "manifest.json").read_text())
    assert manifest["vocabulary"] == f"hf:org/gtr@{first}"

    config = json.loads((GTR / "config.json").read_text())
    sizes = {
        "emb_dim": config["d_model"], "num_heads": config["num_heads"], "head_dim": config["d_kv"],
        "mlp_dim": config["d_ff"], "num_encoder_layers": config["num_layers"], "num_decoder_layers": 0,
    }  # fmt: skip
    train = [
        *here, "--gin_file=runs/dual_encoder.gin", "--INITIAL_CHECKPOINT=hf:org/gtr",
        "--gin.train.batch_size=8",
        *(f"--gin.T5Config.{name}={value}" for name, value in sizes.items()),
        "--gin.T5Config.mlp_activations=('relu',)",
        "--gin.DualEncoder.vector_dim=9", "--gin.DataConfig.passage_length=16",
    ]  # fmt: skip
    status, made, err = cli("train", *train, "--STEPS=1")
    assert status == 0, err
    described = json.loads((Path(made["model"]) / "model.json").read_text())
    assert described["initial_checkpoint"] == f"hf:org/gtr@{first}"
    assert described["settings"]["query_prompt"] == "find: "

    # Another state of the branch is noticed; the one that the run began with is still there by its name.
    hub.push("org/gtr", gtr | {"README.md": b"# another"})
    status, _, err = cli("train", *train, "--STEPS=2")
    assert status == 2
    assert f"go on with --INITIAL_CHECKPOINT=hf:org/gtr@{first}" in err

    # A run that goes on downloads nothing, keeps its prompts, and by a commit's name needs no hub at all.
    hub.push("org/gtr", gtr)
    shutil.rmtree(tmp_path / "hf")
    hub.fetched.clear()
    status, made, err = cli("train", *train, "--STEPS=2")
    assert (status, made and made["step"]) == (0, 2), err
    assert set(hub.fetched) <= {"modules.json"}  # which tells the commit
    train = [x.replace("hf:org/gtr", f"hf:org/gtr@{first}") for x in train]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert cli("train", *train, "--STEPS=3")[1]["step"] == 3
    status, _, err = cli("train", *train, "--gin.DualEncoder.query_prompt='other: '", "--STEPS=4")
    assert status == 2
    assert "settings is" in err
    # Where no checkpoint is left, it begins with the weights again, or says that they cannot be fetched.
    shutil.rmtree(Path(made["model"]) / "checkpoints")
    status, _, err = cli("train", *train, "--STEPS=3")
    assert status == 2
    assert f"INITIAL_CHECKPOINT: hf:org/gtr@{first}: cannot be fetched" in err


def test_another_vocabulary_than_the_repositorys_is_told_by_its_name(hub: Hub, collection):
    commit = hub.push("org/gtr", files_of(GTR))
    network = open_pretrained(GTR).network
    with pytest.raises(UserError, match=f"--VOCABULARY=hf:org/gtr@{commit}$"):
        InitialCheckpoint("hf:org/gtr").arrays_for(
            DualEncoder(T5Config(**network), vector_dim=9), collection.vocabulary_path
        )


def test_convert_from_the_hub(hub: Hub, cli, source, tmp_path):
    first = hub.push("org/gtr", files_of(GTR))
    here = [f"--COLLECTION={source}", f"--WORK_DIR={tmp_path}", "--INITIAL_CHECKPOINT=hf:org/gtr"]
    status, made, err = cli("convert", *here)
    assert status == 0, err
    assert made["model"] == str(tmp_path / "models" / "gtr")
    described = json.loads((tmp_path / "models" / "gtr" / "model.json").read_text())
    assert described["initial_checkpoint"] == f"hf:org/gtr@{first}"
    status, _, err = cli("convert", *here[:-1], "--INITIAL_CHECKPOINT=hf:org/none")
    assert status == 2
    assert err.count("\n") == 1
    assert "INITIAL_CHECKPOINT: hf:org/none: no such" in err
