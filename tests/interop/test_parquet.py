"""Parquet has each passage with its vector; PostgreSQL's pgvector then finds what exact search finds."""

import glob
import os
import pwd
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from model_folders import random_params, write_model_folder

from retrieval_jax.checkpoints.model_folder import load_model
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.embeddings.encoding import Embeddings
from retrieval_jax.embeddings.text_encoder import query_encoder
from retrieval_jax.interop import parquet
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.searcher import Searcher

QUERIES = ["smooth a noisy signal", "print a table", "learning rate"]


@pytest.fixture(scope="module")
def model_dir(collection: Collection, tmp_path_factory) -> Path:
    model = DualEncoder(T5Config(1152, 16, 2, 8, 20, 1, 1), vector_dim=6)
    folder = tmp_path_factory.mktemp("models") / "parquet_dense"
    write_model_folder(folder, model, random_params(model), collection)
    return folder


@pytest.fixture(scope="module")
def arguments_of_model(arguments: list[str], model_dir: Path) -> list[str]:
    return [*arguments, f"--MODEL_DIR={model_dir}"]


def test_a_row_for_each_passage(
    arguments_of_model, model_dir, work: Workspace, collection: Collection, cli, tmp_path, monkeypatch
):
    monkeypatch.setattr(parquet, "GROUP_BYTES", 4 * 6 * 7)  # seven passages
    monkeypatch.setattr(parquet, "GROUPS", 5)
    output = [f"--gin.export.output='{tmp_path / 'made'}'", "--gin.export.format='parquet'"]
    status, _, err = cli("export", *arguments_of_model, *output)
    assert status == 0, err
    files = sorted((tmp_path / "made").glob("*.parquet"))
    assert [file.name for file in files] == [f"passages-{i:05}-of-00003.parquet" for i in range(3)]
    assert [pq.ParquetFile(file).num_row_groups for file in files] == [5, 5, 5]
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    passages = list(collection.passages())
    assert [(row["id"], row["title"], row["text"]) for row in rows] == [
        (p.id, p.title, p.text) for p in passages
    ]
    expected = Embeddings.open(work.embeddings("parquet_dense")).vectors_NxE
    np.testing.assert_array_equal(np.array([row["vector"] for row in rows], np.float32), expected)
    assert np.unique(expected, axis=0).shape[0] > 90


def test_long_texts_make_small_row_groups(collection: Collection, tmp_path, monkeypatch):
    passages = [*collection.passages()]
    sizes = [len(passage.full_text.encode()) for passage in passages]
    monkeypatch.setattr(parquet, "TEXT_BYTES", 1000)
    vectors = np.arange(2 * len(passages), dtype=np.float32).reshape(-1, 2)
    parquet.write(tmp_path, Embeddings(tmp_path, vectors, collection.ids, None, {}), collection)
    (file,) = map(pq.ParquetFile, tmp_path.glob("*.parquet"))
    groups = [file.read_row_group(i) for i in range(file.num_row_groups)]
    assert len(groups) > 3
    assert max(group.num_rows for group in groups) > 1
    first = 0
    for group in groups:
        assert sum(sizes[first : first + group.num_rows - 1]) < 1000
        first += group.num_rows
    rows = [row for group in groups for row in group.to_pylist()]
    assert [row["id"] for row in rows] == [passage.id for passage in passages]
    np.testing.assert_array_equal([row["vector"] for row in rows], vectors)


def binaries() -> Path | None:
    """Where PostgreSQL's programs are: in PATH, or where Debian puts them."""
    found = shutil.which("initdb") or next(iter(sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))), None)
    return Path(found).resolve().parent if found else None


@pytest.fixture
def database(monkeypatch) -> Iterator[None]:
    """A new PostgreSQL on a socket in a folder of its own, which libpq's variables name."""
    programs = binaries()
    if programs is None:
        pytest.skip("needs PostgreSQL")
    who = {}
    if os.geteuid() == 0:  # it refuses to run as root
        if "postgres" not in {user.pw_name for user in pwd.getpwall()}:
            pytest.skip("needs a user other than root")
        who = {"user": "postgres", "group": "postgres", "extra_groups": []}
    folder = tempfile.mkdtemp(dir="/tmp")
    shutil.chown(folder, who.get("user"), who.get("group")) if who else None
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/", **who}
    subprocess.run(
        [programs / "initdb", "-D", f"{folder}/data", "-U", "me", "-A", "trust"], check=True, **quiet
    )
    server = subprocess.Popen(
        [programs / "postgres", "-D", f"{folder}/data", "-k", folder, "-h", ""], **quiet
    )
    try:
        for _ in range(100):
            if not subprocess.run([programs / "pg_isready", "-h", folder], check=False, **quiet).returncode:
                break
            time.sleep(0.1)
        for name, value in {"PGHOST": folder, "PGUSER": "me", "PGDATABASE": "postgres"}.items():
            monkeypatch.setenv(name, value)
        yield
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_pgvector_finds_what_exact_search_finds(
    arguments_of_model, model_dir, work: Workspace, cli, tmp_path, monkeypatch, database
):
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect() as db:
        there = db.execute("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'").fetchone()
    if not there:
        pytest.skip("needs pgvector")
    assert (
        cli("index", *arguments_of_model, "--gin.make_index.kind='exact'", "--gin.make_index.name='pg'")[0]
        == 0
    )
    output = [f"--gin.export.output='{tmp_path / 'made'}'", "--gin.export.format='parquet'"]
    no_model = [argument for argument in arguments_of_model if not argument.startswith("--MODEL_DIR")]
    assert cli("export", *no_model, "--SEARCHER=pg", *output)[0] == 0

    # The lines of the card, as they are there.
    card = (tmp_path / "made" / "README.md").read_text()
    (sql,), python = (re.findall(rf"```{kind}\n(.*?)```", card, re.DOTALL) for kind in ("sql", "python"))
    with psycopg.connect() as db:
        db.execute(sql)
    monkeypatch.chdir(tmp_path / "made")
    exec("\n".join(python), {})

    vectors = query_encoder(load_model(model_dir))(QUERIES)
    expected = Searcher.open(work.searcher("pg")).search(QUERIES, 10)
    with psycopg.connect() as db:
        for vector, ranked in zip(vectors, expected, strict=True):
            found = db.execute(
                "SELECT id, -(vector <#> %s::vector) FROM passages ORDER BY vector <#> %s::vector LIMIT 10",
                [str(vector.tolist())] * 2,
            ).fetchall()
            np.testing.assert_allclose([s for _, s in found], [s for _, s in ranked], rtol=1e-5)
            assert [passage for passage, _ in found] == [passage for passage, _ in ranked]
