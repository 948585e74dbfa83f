"""ir_datasets: what it has locally is read; what it cannot have is said in one line."""

import sys

import pytest
from reading import error_of, read, write

from retrieval_jax.data.collection import Passage, Query
from retrieval_jax.data.sources.from_packages import ir_datasets_source

ir_datasets = pytest.importorskip("ir_datasets")


@pytest.fixture
def registered(tmp_path):
    """Two splits of a corpus that exist on this machine alone: tiny-local/train and tiny-local/dev/small."""
    files = {
        "docs.tsv": "d1\tfirst text\nd2\tsecond text\n",
        "train.tsv": "q1\twho?\n",
        "train.qrels": "q1 0 d1 1\n",
        "dev.tsv": "q2\twhat?\nq3\tunjudged\n",
        "dev.qrels": "q2 0 d2 2\nq2 0 d1 0\n",
    }
    write(tmp_path, files)

    def local(name: str):
        return ir_datasets.util.LocalDownload(str(tmp_path / name))

    docs = ir_datasets.formats.TsvDocs(local("docs.tsv"))
    names = {"tiny-local": "train", "tiny-local/train": "train", "tiny-local/dev/small": "dev"}
    names["tiny-local/trec-dl-2019/judged"] = "dev"
    for name, split in names.items():
        queries = ir_datasets.formats.TsvQueries(local(f"{split}.tsv"))
        qrels = ir_datasets.formats.TrecQrels(local(f"{split}.qrels"), {})
        ir_datasets.registry.register(name, ir_datasets.datasets.base.Dataset(docs, queries, qrels))
    yield tmp_path
    for name in names:
        del ir_datasets.registry._registered[name]


def test_reads_splits_of_one_corpus(registered):
    source = ir_datasets_source("tiny-local/train,tiny-local/dev/small")
    assert source.name == "tiny_local"
    passages, queries = read(source)
    assert passages == [Passage("d1", "", "first text"), Passage("d2", "", "second text")]
    assert queries == {
        "dev": [Query("q2", "what?", {"d2": 2}, ("d1",))],
        "train": [Query("q1", "who?", {"d1": 1})],
    }


def test_a_split_has_a_name_that_files_and_commands_can_hold(registered):
    assert [*read(ir_datasets_source("tiny-local/trec-dl-2019/judged"))[1]] == ["trec_dl_2019_judged"]


def test_a_dataset_without_splits_is_test(registered):
    assert read(ir_datasets_source("tiny-local"))[1] == {"test": [Query("q1", "who?", {"d1": 1})]}


def test_a_name_that_does_not_exist():
    message = error_of(lambda: ir_datasets_source("no-such-thing"))
    assert message == "ir_datasets:no-such-thing: no such dataset: see https://ir-datasets.com"


def test_without_the_file_or_the_network(registered, tmp_path):
    (registered / "docs.tsv").unlink()
    source = ir_datasets_source("tiny-local/train")
    assert error_of(lambda: read(source)).startswith("ir_datasets:tiny-local/train: cannot be had (")


def test_splits_of_two_corpora_are_refused(registered):
    message = error_of(lambda: ir_datasets_source("tiny-local/train,vaswani"))
    assert "different passages" in message


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    message = error_of(lambda: ir_datasets_source("vaswani"))
    assert "not installed: pip install 'retrieval_jax[ir_datasets]'" in message
