"""A collection's vectors: made once, in parts that survive a kill, by several processes, and kept."""

import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from retrieval_jax.core import storage, unfinished
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection
from retrieval_jax.embeddings import encoding
from retrieval_jax.embeddings.encoding import encode_collection

MODEL = {"model": "letters"}

# Encodes by counting letters, in parts of 16; killed where it would encode the third part's passages.
SCRIPT = """
import os, signal, sys
import jax
import numpy as np
from retrieval_jax.data.collection import Collection
from retrieval_jax.embeddings import encoding
from retrieval_jax.mesh import multihost

multihost.initialize("index")
encoding.PART = 16
calls = 0

def encode(texts, advance):
    global calls
    calls += 1
    if sys.argv[3] == "killed" and calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[3] == "failing" and calls == 2 and jax.process_index() == 1:
        return np.full((len(texts), 5), np.nan)
    advance(len(texts))
    return np.array([[text.count(letter) for letter in "aeiou"] for text in texts], np.float32)

collection, folder = Collection(sys.argv[1]), encoding.Path(sys.argv[2])
found = encoding.encode_collection(folder, {"model": "letters"}, collection, lambda: encode)
print(calls, found.vectors_NxE.shape[0])
"""


def letters(texts: list[str]) -> np.ndarray:
    return np.array([[text.count(letter) for letter in "aeiou"] for text in texts], np.float32)


class Encoder:
    """Counts letters, and what it is asked for."""

    def __init__(self):
        self.texts: list[str] = []

    def __call__(self, texts, advance):
        self.texts += texts
        advance(len(texts))
        return letters(texts)


def all_texts(collection: Collection) -> list[str]:
    return [passage.full_text for passage in collection.passages()]


def test_a_killed_encoding_goes_on_where_it_was(collection: Collection, tmp_path, python, monkeypatch):
    folder = tmp_path / "letters"
    result = python(SCRIPT, collection.folder, folder, "killed")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not folder.exists()
    monkeypatch.setattr(encoding, "PART", 16)
    encoder, texts = Encoder(), all_texts(collection)
    found = encode_collection(folder, MODEL, collection, lambda: encoder)
    assert encoder.texts == texts[32:]
    np.testing.assert_array_equal(found.vectors_NxE, letters(texts))
    assert found.ids.equals(collection.ids)
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]

    again = encode_collection(folder, MODEL, collection, Encoder)
    assert again.manifest == found.manifest
    # Another model's are made anew, and not taken for parts of this one's.
    other = Encoder()
    encode_collection(folder, {"model": "other"}, collection, lambda: other)
    assert other.texts == texts


def test_bad_vectors_are_told_and_what_was_before_is_kept(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "PART", 16)
    folder, texts = tmp_path / "letters", all_texts(collection)

    def spoilt(some, advance):
        vectors = letters(some)
        if texts[20] in some:
            vectors[some.index(texts[20]), 3] = np.nan
        return vectors

    with pytest.raises(UserError, match="letters: the vector of row 20 has an infinity or NaN"):
        encode_collection(folder, MODEL, collection, lambda: spoilt)
    encoder = Encoder()
    encode_collection(folder, MODEL, collection, lambda: encoder)
    assert encoder.texts == texts[16:]


def test_a_part_that_was_torn_is_named(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "PART", 16)
    folder = tmp_path / "letters"
    unfinished = tmp_path / "letters.unfinished"

    def torn(some, advance):
        part = unfinished / "00000.npz"
        if part.exists():
            part.write_bytes(part.read_bytes()[:100])
        return letters(some)

    with pytest.raises(UserError, match=r"letters.unfinished/00000.npz: cannot be read .*delete it"):
        encode_collection(folder, MODEL, collection, lambda: torn)
    (unfinished / "00000.npz").unlink()
    encoder = Encoder()
    encode_collection(folder, MODEL, collection, lambda: encoder)
    assert encoder.texts == all_texts(collection)[:16]


def test_only_what_is_new_is_encoded(collection, grown: Collection, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "PART", 16)
    folder = tmp_path / "letters"
    encode_collection(folder, MODEL, collection, Encoder)
    encoder = Encoder()
    found = encode_collection(folder, MODEL, grown, lambda: encoder)
    known = set(all_texts(collection))
    texts = all_texts(grown)
    assert encoder.texts == [text for text in texts if text not in known]
    assert len(encoder.texts) == 2  # one that is new, one that was changed
    np.testing.assert_array_equal(found.vectors_NxE, letters(texts))
    assert storage.read_manifest(folder, "index")["encoded"] == 2

    count = grown.passage_count - 5
    fewer = types.SimpleNamespace(
        fingerprint="fewer", passage_count=count, ids=grown.ids[:count], get=grown.get
    )
    found = encode_collection(folder, MODEL, fewer, lambda: pytest.fail("no model is needed"))
    np.testing.assert_array_equal(found.vectors_NxE, letters(texts[:count]))


def test_several_devices_take_several_parts_at_once(collection, tmp_path, python, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    result = python(SCRIPT, collection.folder, tmp_path / "letters", "whole")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) == -(-collection.passage_count // (3 * 16))
    np.testing.assert_array_equal(
        np.load(tmp_path / "letters" / "vectors.npy"), letters(all_texts(collection))
    )


def in_two_processes(collection: Collection, folder: Path, how: str) -> list[tuple[int, str, str]]:
    """Returns the exit status, stdout and stderr of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for process in range(2):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(process),
        }
        command = [sys.executable, "-c", SCRIPT, str(collection.folder), str(folder), how]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=environment, **pipes))
    outputs = [process.communicate(timeout=100) for process in running]
    return [(p.returncode, *output) for p, output in zip(running, outputs, strict=True)]


def test_two_processes_share_the_work(collection, tmp_path):
    folder = tmp_path / "letters"
    outputs = in_two_processes(collection, folder, "whole")
    count = collection.passage_count
    calls = [int(out.splitlines()[-1].split()[0]) for _, out, _ in outputs]  # after Gloo's own lines
    assert sum(calls) == -(-count // 16), outputs
    assert abs(calls[0] - calls[1]) <= 1
    np.testing.assert_array_equal(np.load(folder / "vectors.npy"), letters(all_texts(collection)))


def test_where_one_process_fails_the_other_ends_too(collection, tmp_path):
    folder = tmp_path / "letters"
    (status, _, told), (other_status, _, other_told) = in_two_processes(collection, folder, "failing")
    assert status != 0 != other_status
    assert "process 1 met an error" in told
    assert "has an infinity or NaN" in other_told
    in_two_processes(collection, folder, "whole")
    np.testing.assert_array_equal(np.load(folder / "vectors.npy"), letters(all_texts(collection)))


def test_what_a_kill_left_behind_is_removed(collection, tmp_path):
    folder, recipe = tmp_path / "letters", MODEL | {"collection": collection.fingerprint}
    encode_collection(folder, MODEL, collection, Encoder)
    scratch = tmp_path / "letters.unfinished"
    unfinished.begin(scratch, recipe | {"part": encoding.PART}, [])  # killed before it was removed
    encode_collection(folder, MODEL, collection, Encoder)
    assert not scratch.exists()
    unfinished.begin(scratch, {"of": "another model"}, [])  # that one is still needed
    encode_collection(folder, MODEL, collection, Encoder)
    assert scratch.exists()
