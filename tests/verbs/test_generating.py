"""`generate-queries`: sampled or read, killed or not, on one host or two: the same queries, each once."""

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from retrieval_jax.checkpoints import checkpoints, model_folder
from retrieval_jax.core import storage
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.generation import distinct
from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.query_generator import QueryGenerator

PASSAGE_LENGTH, INPUT_LENGTH = 16, 6


@pytest.fixture(scope="module")
def generator(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The binding of a query generator with random weights."""
    folder = tmp_path_factory.mktemp("models") / "doc2query"
    vocabulary = Vocabulary(collection.vocabulary_path)
    model = QueryGenerator(T5Config(vocabulary.size, 16, 2, 8, 32, 1, 1, embedding_init_std=3.0))
    shapes = {"encoder_input_tokens": (1, 4), "decoder_input_tokens": (1, 4)}
    variables = jax.jit(lambda key: model.get_initial_variables(key, shapes))(jax.random.key(0))
    params = nn.unbox(variables)["params"]
    facts = {"input_length": INPUT_LENGTH, "passage_length": PASSAGE_LENGTH}
    storage.write_json(folder / "model.json", model_folder.describe(model, **facts))
    shutil.copyfile(collection.vocabulary_path, folder / "sentencepiece.model")
    saved = checkpoints.Checkpoints(folder)
    saved.save(1, params, {"step": np.int32(1)})
    saved.close()
    return f"--gin.MODEL_DIR='{folder}'"


def settings(**values) -> list[str]:
    return [f"--gin.generate_queries.{name}={value!r}" for name, value in values.items()]


def everything(work: Workspace, name: str, collection: Collection) -> list[list[str]]:
    return SyntheticQueries(work.synthetic(name)).get(range(collection.passage_count))


@pytest.fixture(scope="module")
def sampled(work: Workspace, collection: Collection, arguments, generator) -> list[list[str]]:
    """What an uninterrupted run makes."""
    from retrieval_jax.main import main

    chosen = settings(name="whole", count=4, shard_size=8, batch_size=8)
    assert main(["generate-queries", *arguments, generator, *chosen]) == 0
    return everything(work, "whole", collection)


def test_every_passage_gets_its_own_queries_without_repetitions(
    sampled, work: Workspace, collection: Collection
):
    queries = SyntheticQueries(work.synthetic("whole"))
    manifest = json.loads((queries.folder / "manifest.json").read_text())
    assert manifest["made"] == 4 * collection.passage_count
    assert manifest["distinct"] == manifest["queries"] == queries.total == queries.counts.sum()
    assert queries.counts.tolist() == [len(some) for some in sampled]
    assert np.mean(queries.counts) > 3
    for some in sampled:
        assert len({q.casefold() for q in some}) == len(some)
        assert all(q == " ".join(q.split()) != "" for q in some)
    assert len({tuple(some) for some in sampled}) > 0.9 * collection.passage_count
    assert not (work.folder / "synthetic" / "whole.unfinished").exists()


def test_the_queries_are_those_that_the_model_samples(sampled, collection: Collection, generator):
    """One passage's, straight from the model."""
    opened = model_folder.load_model(generator.split("=")[1].strip("'"))
    row = collection.passage_count - 2
    passages = opened.vocabulary.batch([collection.passage(row).full_text], PASSAGE_LENGTH)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.array([row]))
    sample = jax.jit(opened.model.sample, static_argnums=(3, 4))
    tokens, _ = sample(opened.params, passages, keys, 4, INPUT_LENGTH)
    assert distinct(opened.vocabulary.decode(np.asarray(tokens)[0])) == sampled[row]


def test_again_it_makes_nothing_and_other_settings_make_others(
    sampled, work, collection, arguments, generator, cli
):
    argv = ["generate-queries", *arguments, generator]
    made = work.synthetic("whole").stat().st_mtime_ns
    status, result, _ = cli(*argv, *settings(name="whole", count=4, shard_size=8, batch_size=5))
    assert status == 0
    assert set(result) == {"synthetic", "passages", "made", "distinct", "queries"}
    assert work.synthetic("whole").stat().st_mtime_ns == made
    assert cli(*argv, *settings(name="other", count=4, shard_size=30, batch_size=5))[0] == 0
    assert everything(work, "other", collection) == sampled  # neither batches nor shards matter
    assert cli(*argv, *settings(name="other", count=4, seed=1))[0] == 0
    assert everything(work, "other", collection) != sampled


def test_killed_and_started_again_it_has_neither_duplicates_nor_holes(
    sampled, work: Workspace, collection: Collection, arguments, generator, cli
):
    argv = ["generate-queries", *arguments, generator, *settings(name="killed", count=4, shard_size=2)]
    argv += settings(batch_size=2)
    process = subprocess.Popen([sys.executable, "-m", "retrieval_jax.main", *argv])
    unfinished = work.folder / "synthetic" / "killed.unfinished"
    deadline = time.monotonic() + 120
    while not (unfinished / "00003.jsonl").exists():
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not work.synthetic("killed").exists()
    kept = list(unfinished.glob("*.jsonl"))
    assert len(kept) < 50
    (unfinished / "00001.jsonl").unlink()  # a hole, as another host's part would be
    status, _, err = cli(*argv)
    assert status == 0
    assert f"going on, {len(kept) - 1} of 50 shards are finished" in err
    assert everything(work, "killed", collection) == sampled
    assert not unfinished.exists()
    whole, killed = (SyntheticQueries(work.synthetic(name)) for name in ("whole", "killed"))
    assert whole.fingerprint == killed.fingerprint


HOST = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
from retrieval_jax.main import main
sys.exit(main(sys.argv[4:]))
"""


def test_two_hosts_with_two_devices_each_share_the_work(
    sampled, work: Workspace, collection: Collection, arguments, generator
):
    argv = ["generate-queries", *arguments, generator, *settings(name="hosts", count=4, shard_size=8)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, "2", str(host), *argv],
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    told = [host.communicate(timeout=300)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    assert "52/52" in told[0]  # passages
    assert "48/48" in told[1]
    assert everything(work, "hosts", collection) == sampled


def test_tokens_that_are_no_pieces_are_left_out(collection: Collection):
    vocabulary = Vocabulary(collection.vocabulary_path)
    word = vocabulary.encode("optimizer")
    tokens = np.array([[*word, 1, 0, 0], [2, *word, vocabulary.size - 1, 0], [1, *[0] * (len(word) + 2)]])
    assert vocabulary.model.vocab_size() < vocabulary.size
    assert vocabulary.decode(tokens) == ["optimizer", "optimizer", ""]


# ---- Released predictions


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    folder = tmp_path / "predictions"
    folder.mkdir()
    return folder


def sample_files(folder: Path, count: int, samples: int, pieces: int) -> None:
    """Files named and cut as the released ones; the last piece of the last sample is compressed."""
    for sample in range(samples):
        lines = [f"query {sample} of {row}\n" if (row + sample) % 5 else "\n" for row in range(count)]
        size = -(-count // pieces)
        for piece in range(pieces):
            text = "".join(lines[piece * size : (piece + 1) * size]).encode()
            path = folder / f"predicted_queries_topk_sample{sample:03}.txt{piece:03}-1004000"
            if (sample, piece) == (samples - 1, pieces - 1):
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(text))
            else:
                path.write_bytes(text)


def generate(cli, arguments, predictions: Path, **values) -> tuple[int, dict | None, str]:
    chosen = settings(predictions=str(predictions), **{"shard_size": 16, "count": 40, **values})
    return cli("generate-queries", *arguments, *chosen)


def test_files_with_a_line_a_passage(work: Workspace, collection: Collection, arguments, predictions, cli):
    count = collection.passage_count
    sample_files(predictions, count, samples=12, pieces=3)
    (predictions / "predicted_queries_topk_sample999.txt").write_text("Two\there\n" + "TWO \n" * (count - 1))
    status, result, _ = generate(cli, arguments, predictions, name="lines")
    assert status == 0
    expected = [
        [f"query {s} of {row}" for s in range(12) if (row + s) % 5]
        + (["Two", "here"] if row == 0 else ["TWO"])
        for row in range(count)
    ]
    assert everything(work, "lines", collection) == expected
    assert result["queries"] == sum(map(len, expected))
    assert result["made"] == 13 * count + 1  # with the empty lines
    generate(cli, arguments, predictions, name="first", count=2)
    assert everything(work, "first", collection) == [
        [f"query {s} of {row}" for s in range(2) if (row + s) % 5] for row in range(count)
    ]


def test_files_with_an_object_a_passage(work: Workspace, collection: Collection, arguments, predictions, cli):
    order = np.random.default_rng(0).permutation(collection.passage_count - 1).tolist()  # one has none
    objects = [
        {"id": collection.passage(row).id, "predicted_queries": [f"of {row}", f"OF {row}", "x"]}
        for row in order
    ]
    lines = [json.dumps(line) + "\n" for line in objects]
    (predictions / "a.jsonl").write_text("".join(lines[:30]))
    (predictions / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[30:]).encode()))
    status, result, _ = generate(cli, arguments, predictions, name="objects")
    assert status == 0
    expected = [[f"of {row}", "x"] for row in range(collection.passage_count - 1)]
    assert everything(work, "objects", collection) == [*expected, []]
    assert (result["made"], result["distinct"]) == (3 * len(order), 2 * len(order))


def test_what_is_wrong_with_predictions_is_told_with_its_place(work: Workspace, arguments, predictions, cli):
    (predictions / "a.txt").write_text("q\n" * 99)
    status, _, err = generate(cli, arguments, predictions, name="wrong")
    assert status == 2
    (line,) = [line for line in err.splitlines() if line.startswith("retrieval-jax:")]
    assert all(word in line for word in ["a.txt:99", "before the passages do", "100 passages"])
    assert not work.synthetic("wrong").exists()


# ---- The filter


def test_a_query_that_does_not_find_its_passage_is_left_out(
    work: Workspace, collection: Collection, arguments, predictions, cli
):
    count = collection.passage_count
    assert cli("index", *arguments)[0] == 0
    titles = [p.full_text.replace("\n", " ").replace("\t", " ")[:300] for p in collection.passages()]
    (predictions / "own.txt").write_text("".join(f"{title}\n" for title in titles))
    (predictions / "wrong.txt").write_text("".join(f"{titles[row - 1]}\n" for row in range(count)))
    kept = {"filter_searcher": "bm25", "filter_k": 1}
    status, result, _ = generate(cli, arguments, predictions, name="filtered", **kept)
    assert status == 0
    found = {
        (row, query) for row, some in enumerate(everything(work, "filtered", collection)) for query in some
    }
    assert len(found) == result["queries"] < result["distinct"]
    assert sum((row, " ".join(titles[row].split())) in found for row in range(count)) > 0.9 * count
    assert sum((row, " ".join(titles[row - 1].split())) in found for row in range(count)) < 0.1 * count
    status, everywhere, _ = generate(
        cli, arguments, predictions, name="filtered", filter_searcher="bm25", filter_k=count
    )
    assert everywhere["queries"] > result["queries"]  # another recipe is made anew


def test_what_cannot_be_sampled_from_is_told(arguments, generator, work: Workspace, tmp_path: Path, cli):
    other = tmp_path / "retriever"
    shutil.copytree(generator.split("=")[1].strip("'"), other)
    description = (other / "model.json").read_text().replace("QueryGenerator", "GenerativeRetriever")
    (other / "model.json").write_text(description)
    for extra, words in (
        ([f"--gin.MODEL_DIR='{other}'"], ["retriever: holds a generative model", "runs/doc2query.gin"]),
        ([], ["models/doc2query/model.json", "retrieval-jax train"]),
        (settings(predictions="/no/such/folder"), ["/no/such/folder", "check the path"]),
        (settings(predictions=str(tmp_path), filter_searcher="nobody"), ["no .txt or .jsonl"]),
    ):
        status, _, err = cli("generate-queries", *arguments, *extra)
        assert status == 2
        assert all(word in err for word in words), err
    status, _, err = cli("index", *arguments, generator)
    assert status == 2
    assert "holds a query generator, which finds no passages" in err
