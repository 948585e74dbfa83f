"""Exported folders: opened elsewhere with nothing else at hand, they answer as the searcher did."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib
import numpy as np
import pytest
from jax import export
from model_folders import random_params, write_model_folder

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.interop.stablehlo import load_program
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.training.run import docid_softmax

CONFIG = T5Config(1152, 16, 2, 8, 20, 1, 1, scan_layers=True)
QUERIES = ["smooth a noisy signal", "Adam with weight decay", "print a table"]
KINDS = ("naive", "atomic", "exact", "scann", "bm25")


@pytest.fixture(scope="session")
def searchers(work, arguments, collection, tmp_path_factory):
    """Searchers of random models; what they find is theirs alone."""
    from retrieval_jax.main import main

    folder = tmp_path_factory.mktemp("models")
    for kind in ("naive", "atomic"):
        assert main(["docids", *arguments, f"--gin.DOCIDS='{kind}'"]) == 0
        table = DocidTable.open(work.docids(kind))
        config = T5Config(1152, 16, 2, 8, 20, 1, 1, **docid_softmax(table))
        model = GenerativeRetriever(config, score="logits" if kind == "naive" else "log_prob")
        facts = {"docids": kind, "docids_fingerprint": table.fingerprint()}
        write_model_folder(folder / kind, model, random_params(model), collection, **facts)
    model = DualEncoder(CONFIG, vector_dim=6)
    write_model_folder(folder / "dense", model, random_params(model), collection)
    for kind in KINDS:
        place = folder / ("dense" if kind in ("exact", "scann") else kind)
        model_dir = None if kind == "bm25" else str(place)
        flags = [f"--gin.MODEL_DIR={model_dir!r}", f"--gin.make_index.name='x_{kind}'"]
        if kind in ("exact", "scann"):
            flags.append(f"--gin.make_index.kind='{kind}'")
        assert main(["index", *arguments, *flags]) == 0
    return folder


def exported(cli, arguments, kind: str, folder: Path, format: str = "searcher") -> Path:
    flags = [
        f"--gin.SEARCHER='x_{kind}'",
        f"--gin.export.format='{format}'",
        f"--gin.export.output='{folder}'",
    ]
    status, made, err = cli("export", *arguments, *flags)
    assert status == 0, err
    assert made["export"] == str(folder)
    assert made["format"] == format
    return folder


OPENS = """
import json, sys
class No:  # what shall not be needed
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("tensorflow", "seqio", "tensorflow_datasets"):
            raise ImportError(name)
sys.meta_path.insert(0, No())
from retrieval_jax.search.searcher import Searcher
print(json.dumps(Searcher.open(sys.argv[1]).search(json.loads(sys.argv[2]), 5)))
"""


def elsewhere(folder: Path, script: str, *arguments: str) -> str:
    """What a script prints that runs in another place and process."""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": root if "retrieval_jax" in script else "",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), *arguments],
        cwd=folder.parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_opened_elsewhere(cli, work, arguments, searchers, tmp_path, kind):
    """On another machine, as far as one can be played: moved, another process, and no TensorFlow."""
    expected = Searcher.open(work.searcher(f"x_{kind}")).search(QUERIES, 5)
    moved = tmp_path / "elsewhere" / "folder"
    moved.parent.mkdir()
    exported(cli, arguments, kind, tmp_path / "made").rename(moved)
    if kind in ("naive", "exact"):
        found = json.loads(elsewhere(moved, OPENS, json.dumps(QUERIES)))
    else:
        found = Searcher.open(moved).search(QUERIES, 5)
    for a, b in zip(found, expected, strict=True):
        assert [pid for pid, _ in a] == [pid for pid, _ in b]
        assert len(b) > (kind == "bm25")
        np.testing.assert_allclose([s for _, s in a], [s for _, s in b], rtol=1e-5)
    assert not list(moved.rglob("*.pkl"))
    assert not list(moved.rglob("*.bin"))
    if kind != "bm25":
        assert (moved / "model" / "config.gin").read_text() == "# how it was made\n"


def test_it_tells_what_was_measured(cli, work, arguments, searchers, tmp_path):
    """Of each split by its name; and nothing of a searcher of that name that was replaced since."""
    metrics = {}
    for split in ("dev", "test"):
        for verb in ("search", "evaluate"):
            assert cli(verb, *arguments, "--gin.SEARCHER='x_bm25'", f"--SPLIT={split}")[0] == 0
        metrics[split] = storage.read_json(work.metrics, "")["x_bm25"]
    assert metrics["dev"] != metrics["test"]
    folder = exported(cli, arguments, "bm25", tmp_path / "made")
    manifest = storage.read_manifest(folder, "export")
    assert manifest["recipe"]["metrics"] == metrics
    assert metrics["test"]["MRR@10"] > 0
    assert manifest["files"] == storage.file_checksums(folder)
    numbers = " | ".join(f"{metrics[split]['MRR@10']:.3f}" for split in metrics)
    card = (folder / "README.md").read_text().splitlines()
    assert {"| metric | dev | test |", f"| MRR@10 | {numbers} |"} <= {*card}

    of = ["index", *arguments, "--gin.make_index.name='x_bm25'"]
    assert cli(*of, f"--gin.MODEL_DIR='{searchers / 'naive'}'")[0] == 0
    folder = exported(cli, arguments, "bm25", tmp_path / "made")
    assert storage.read_manifest(folder, "export")["recipe"]["metrics"] == {}
    assert "## Metrics" not in (folder / "README.md").read_text()
    assert cli(*of, "--gin.MODEL_DIR=None")[0] == 0


def test_the_card_of_a_searcher_loads_it(cli, arguments, searchers, tmp_path, monkeypatch, capsys):
    card = (exported(cli, arguments, "naive", tmp_path / "made") / "README.md").read_text()
    assert "| docids | naive |" in card
    assert "library_name: retrieval_jax" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "made")
    exec(code, {})
    assert capsys.readouterr().out.count("\n") == len(Searcher.open(".").search(QUERIES[:1], 10)[0])


def test_a_changed_folder_is_refused(cli, arguments, searchers, tmp_path):
    whole = exported(cli, arguments, "naive", tmp_path / "whole")
    folder = tmp_path / "changed"

    def refused(match: str, change) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        change()
        with pytest.raises(UserError, match=match):
            Searcher.open(folder)

    def flip(name: str) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    def retell(**facts: object) -> None:
        path = folder / storage.MANIFEST
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    for name in (
        "model/weights.safetensors",
        "model/sentencepiece.model",
        "docids/tokens.npy",
        "model/model.json",
    ):
        refused(f"{name} was changed after it was exported", lambda name=name: flip(name))
    refused(r"docids/ids\.arrow is missing", lambda: (folder / "docids" / "ids.arrow").unlink())
    refused(r"model/more\.pkl was added", lambda: (folder / "model" / "more.pkl").write_bytes(b"x"))
    refused("manifest.json was changed", lambda: retell(beams=3))
    Searcher.open(whole)


ALONE = """
import json, sys
from pathlib import Path
import jax, numpy as np
from safetensors.numpy import load_file
sys.modules["retrieval_jax"] = None
folder = Path(sys.argv[1])
program = jax.export.deserialize(bytearray((folder / sys.argv[2]).read_bytes()))
files = [folder / f"{name}.safetensors" for name in ("weights", "docids")]
arrays = [load_file(path) for path in files if path.exists()]
out = program.call(*arrays, np.array(json.loads(sys.argv[3]), np.int32))
print(json.dumps(jax.tree.map(lambda x: np.asarray(x).tolist(), out)))
"""


@pytest.mark.parametrize("kind", ["naive", "atomic", "scann"])
def test_programs_run_without_this_package(cli, work, arguments, searchers, tmp_path, kind):
    """With jax and safetensors alone, for any number of queries, they find what the searcher does."""
    folder = exported(cli, arguments, kind, tmp_path / "made", "stablehlo")
    ours = Searcher.open(work.searcher(f"x_{kind}"))
    script = ALONE.replace('"retrieval_jax"', '"retrieval" "_jax"')
    for count in (1, 3):
        queries = QUERIES[:count]
        if kind == "scann":
            encoder = ours.encoder
            tokens = encoder.vocabulary.batch(queries, 24).tolist()
            found = json.loads(elsewhere(folder, script, "encode_queries.stablehlo", json.dumps(tokens)))
            np.testing.assert_allclose(found, encoder(queries), rtol=0, atol=1e-5)
            continue
        tokens = ours.vocabulary.batch(queries, 24).tolist()
        rows, scores = json.loads(elsewhere(folder, script, "search.stablehlo", json.dumps(tokens)))
        for ranking, own, score in zip(ours.search(queries, 5), rows, scores, strict=True):
            assert [ours.table.passage_ids[row].as_py() for row in own[:5]] == [pid for pid, _ in ranking]
            np.testing.assert_allclose(score[:5], [s for _, s in ranking], rtol=0, atol=1e-4)
    programs = list(folder.glob("*.stablehlo"))
    weights = (folder / "weights.safetensors").stat().st_size
    assert weights > 40_000  # more than the texts' embedding, which no program holds
    assert all(b"/retrieval_jax/" not in path.read_bytes() for path in programs)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["jax"], manifest["jaxlib"]) == (jax.__version__, jaxlib.__version__)
    assert manifest.get("score") == {"naive": "logits", "atomic": "log_prob"}.get(kind)
    versions = {export.deserialize(path.read_bytes()).calling_convention_version for path in programs}
    assert versions == {manifest["calling_convention_version"]}
    # Scores and vectors are of products that no accelerator rounds; see tests/models/test_bfloat16.py.
    assert all("HIGHEST" in export.deserialize(path.read_bytes()).mlir_module() for path in programs)


@pytest.mark.parametrize(
    "change",
    [
        # What an older jaxlib meets in a newer one's program, and conventions of a later and an earlier jax.
        lambda exported: {"mlir_module_serialized": exported.mlir_module_serialized[:-100]},
        lambda exported: {"calling_convention_version": 99},
        lambda exported: {"calling_convention_version": 1},
    ],
)
def test_a_program_of_another_jax_is_read_or_told_of_in_one_line(tmp_path, change):
    exported = export.export(jax.jit(lambda x: 2 * x))(jax.ShapeDtypeStruct((3,), np.float32))
    storage.write_json(tmp_path / "manifest.json", {"format": storage.FORMAT, "jax": "0.99.1"})
    (tmp_path / "search.stablehlo").write_bytes(exported.serialize())
    np.testing.assert_array_equal(load_program(tmp_path, "search").call(np.ones(3, np.float32)), [2, 2, 2])
    changed = dataclasses.replace(exported, **change(exported)).serialize()
    (tmp_path / "search.stablehlo").write_bytes(changed)
    with pytest.raises(
        UserError, match=rf"written by jax 0.99.1, and jax {jax.__version__} cannot read it: .*"
    ):
        load_program(tmp_path, "search")
    with pytest.raises(UserError, match=r"encode_queries\.stablehlo: no such program"):
        load_program(tmp_path, "encode_queries")


def test_t5x_and_hugging_face_of_a_searcher(cli, work, arguments, searchers, tmp_path):
    from retrieval_jax.checkpoints.model_folder import load_model
    from retrieval_jax.checkpoints.pretrained import open_pretrained
    from retrieval_jax.interop.writers import layers_of

    params = layers_of(load_model(searchers / "naive").params)
    for format in ("t5x", "huggingface"):
        folder = exported(cli, arguments, "naive", tmp_path / format, format)
        again = open_pretrained(folder)
        assert again.arrays.keys() == params.keys()
        for name, array in params.items():
            np.testing.assert_array_equal(again.arrays[name].read(), array.read())
    assert (tmp_path / "t5x" / "checkpoint_7").is_dir()
    docids = DocidTable.open(tmp_path / "huggingface" / "docids")
    assert docids.fingerprint() == DocidTable.open(work.docids("naive")).fingerprint()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--gin.export.format='onnx'"], "export.format: no format 'onnx': searcher, huggingface"),
        (["--gin.SEARCHER='x_bm25'", "--gin.export.format='huggingface'"], "BM25 has no weights"),
        (
            ["--gin.SEARCHER='x_scann'", "--gin.export.format='huggingface'"],
            "a dual encoder: --gin.export.format",
        ),
        (["--gin.SEARCHER='x_naive'", "--gin.export.format='sentence_transformers'"], "not a dual encoder"),
        (["--gin.SEARCHER='none'"], "nothing finished here"),
    ],
)
def test_what_cannot_be_exported_is_named(cli, arguments, searchers, flags, match):
    status, made, err = cli("export", *arguments, *flags)
    assert status == 2
    assert made is None
    assert match in err
    assert err.count("\n") == 1
