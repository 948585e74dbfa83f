"""Importing: records, splits, subsets and vocabulary, read back; what happens to bad lines and kills."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from reading import read

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import EOS, Vocabulary
from retrieval_jax.verbs.importing import import_collection


@pytest.fixture(scope="module")
def model(source: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vocabulary, so that not every import learns one."""
    folder = tmp_path_factory.mktemp("vocabulary")
    import_collection(str(source), str(folder), vocab_size=1000)
    return str(folder / "collection" / "sentencepiece.model")


@pytest.fixture(scope="module")
def imported(source: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """The small collection, written as one shard."""
    folder = tmp_path_factory.mktemp("imported")
    import_collection(str(source), str(folder), vocabulary_path=model)
    return Collection(folder / "collection")


def everything(collection: Collection) -> tuple:
    queries = {split: collection.queries(split) for split in collection.query_counts}
    return list(collection.passages()), queries, collection.ids.to_pylist()


def shards(collection: Collection) -> int:
    return len(list(collection.folder.glob("*/passages/*/*record*")))


def test_records_give_back_the_source(source: Path, imported: Collection):
    passages, queries = read(source)
    assert everything(imported) == (passages, queries, [p.id for p in passages])
    assert imported.passage_count == len(passages)
    assert imported.query_counts == {split: len(judged) for split, judged in queries.items()}
    assert shards(imported) == 1
    assert not (imported.folder / "scratch").exists()


@pytest.mark.parametrize("beam_options", [(), ("--runner=DirectRunner",)])
def test_several_shards_hold_the_same(
    source: Path, model: str, imported: Collection, tmp_path: Path, beam_options
):
    import_collection(
        str(source), str(tmp_path), vocabulary_path=model, shard_bytes=10_000, beam_options=beam_options
    )
    sharded = Collection(tmp_path / "collection")
    assert shards(sharded) > 3
    assert everything(sharded) == everything(imported)
    assert sharded.fingerprint == imported.fingerprint


def test_the_manifest_says_what_was_read_and_written(source: Path, imported: Collection):
    manifest = storage.read_manifest(imported.folder, "import")
    assert manifest["passages"] == imported.passage_count
    assert manifest["skipped"] == {}
    assert set(manifest["files"]) == {str(file) for file in source.iterdir()}
    records = {str(f.relative_to(imported.folder)) for f in imported.folder.rglob("*.array_record-*")}
    assert set(manifest["records"]) == records
    for name, checksum in {**manifest["files"], **manifest["records"]}.items():
        path = imported.folder / name  # the names of source files are absolute
        assert hashlib.sha256(path.read_bytes()).hexdigest() == checksum


def test_the_fingerprint_is_of_the_contents(source: Path, model: str, imported: Collection, tmp_path: Path):
    def fingerprints(name: str, change: dict[str, tuple[str, str]]) -> tuple[str, dict[str, str]]:
        folder = tmp_path / name / source.name
        folder.mkdir(parents=True)
        for file in source.iterdir():
            text = file.read_text()
            for old, new in [change[file.name]] if file.name in change else []:
                assert old in text
                text = text.replace(old, new)
            (folder / file.name).write_text(text)
        import_collection(str(folder), str(tmp_path / name / "work"), vocabulary_path=model)
        made = Collection(tmp_path / name / "work" / "collection")
        return made.fingerprint, made.query_fingerprints

    first, second = imported.get([0, 1])
    query = imported.queries("train")[0]
    now, of_queries = imported.fingerprint, imported.query_fingerprints
    assert fingerprints("same", {}) == (now, of_queries)
    text, same = fingerprints("text", {"docs.tsv": (first.text[:40], "changed")})
    assert same == of_queries
    changed_id = {"docs.tsv": (f"{second.id}\t", "changed\t"), **_qrels(second.id, "changed")}
    other_id, _ = fingerprints("id", changed_id)
    assert len({now, text, other_id}) == 3
    grade = f"{query.id}\t{query.id}\t1", f"{query.id}\t{query.id}\t2"
    for name, change in {"queries": (query.text, "changed"), "qrels": grade}.items():
        passages, others = fingerprints(name, {f"{name}.train.tsv": change})
        assert passages == now
        assert {split for split in of_queries if others[split] != of_queries[split]} == {"train"}


def _qrels(old: str, new: str) -> dict[str, tuple[str, str]]:
    """The change of a passage's id in the qrels: it has one test query."""
    return {"qrels.test.tsv": (f"\t{old}\t", f"\t{new}\t")}


def test_bad_lines_stop_the_import_or_are_counted(
    source: Path, model: str, imported: Collection, tmp_path: Path, capsys
):
    folder = tmp_path / "bad"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with (folder / "docs.tsv").open("ab") as docs:
        docs.write(b"one\tcolumn\nbad\tutf\t\xff\n" + b"two\tcolumns\n" * 4)
    work = tmp_path / "work"
    with pytest.raises(UserError, match=r"docs\.tsv:101: 2 tab-separated.*4 × wrong columns, 1 × not UTF-8"):
        import_collection(str(folder), str(work), vocabulary_path=model)
    assert not list(work.iterdir())

    made = import_collection(str(folder), str(work), vocabulary_path=model, on_error="skip")
    assert made["skipped"] == {"wrong columns": 5, "not UTF-8": 1}
    told = capsys.readouterr().err.replace("\n", "")
    assert f"left out 5 × wrong columns: {folder}/docs.tsv:101, {folder}/docs.tsv:103" in told
    assert everything(Collection(work / "collection")) == everything(imported)

    with pytest.raises(UserError, match="ON_ERROR: no way 'ignore'"):
        import_collection(str(folder), str(work), on_error="ignore")


def test_a_subset_is_a_collection(source: Path, model: str, imported: Collection, tmp_path: Path):
    def subset(name: str, size: int, seed: int = 0, **options) -> Collection:
        made = import_collection(
            str(source),
            str(tmp_path / name),
            vocabulary_path=model,
            subset=size,
            subset_seed=seed,
            **options,
        )
        assert made["passages"] == size
        return Collection(tmp_path / name / "collection")

    small = subset("a", 40)
    passages, queries, ids = everything(small)
    assert passages == [p for p in imported.passages() if p.id in set(ids)]  # in the source's order
    for split in ("dev", "test"):
        assert queries[split] == imported.queries(split)
    assert queries["train"] == [q for q in imported.queries("train") if set(q.positives) <= set(ids)]
    told = storage.read_manifest(small.folder, "import")["subset"]
    assert told["of_passages"] == 100
    assert told["dropped_queries"] == {"dev": 0, "test": 0, "train": 80 - len(queries["train"])}
    sharded = subset("b", 40, shard_bytes=10_000)
    assert everything(sharded) == everything(small)
    assert subset("e", 40).fingerprint == small.fingerprint != imported.fingerprint
    assert subset("c", 40, seed=1).fingerprint != small.fingerprint
    with pytest.raises(UserError, match="SUBSET: 10 passages are too few for the 20 "):
        subset("d", 10)


def test_a_killed_import_leaves_nothing_to_read(source: Path, model: str, tmp_path: Path):
    settings = {
        "COLLECTION": str(source),
        "WORK_DIR": str(tmp_path / "work"),
        "VOCABULARY": model,
        "import_collection.shard_bytes": 300,
    }
    command = [sys.executable, "-m", "retrieval_jax.main", "import"]
    command += [f"--gin.{name}={value!r}" for name, value in settings.items()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("work/.collection.*/*/passages/*/small_docs-train*")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    with pytest.raises(UserError, match="nothing finished here"):
        Collection(tmp_path / "work" / "collection")
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    import_collection(str(source), str(tmp_path / "work"), vocabulary_path=model)
    assert Collection(tmp_path / "work" / "collection").passage_count == 100
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["collection"]


def test_vocabulary_has_t5s_special_ids_and_pads(imported: Collection):
    vocabulary = Vocabulary(imported.vocabulary_path)
    assert vocabulary.size % 128 == 0
    long, short = "optimizer " * 50, "Gradient Clipping"
    tokens = vocabulary.batch([long, short, ""], 8)
    assert tokens.shape == (3, 8)
    assert tokens[0, -1] == EOS
    ids = vocabulary.encode(short)
    assert tokens[1].tolist() == [*ids, EOS] + [0] * (7 - len(ids))
    assert tokens[2].tolist() == [EOS] + [0] * 7
    assert vocabulary.encode("GRADIENT clipping") == ids  # case is folded


def test_t5s_own_vocabulary_can_be_given(source: Path, shared: Path, tmp_path: Path):
    model = shared / "data" / "t5vocab" / "t5_spiece_no_bos.model"
    import_collection(str(source), str(tmp_path / "work"), vocabulary_path=str(model))
    vocabulary = Vocabulary(Collection(tmp_path / "work" / "collection").vocabulary_path)
    assert vocabulary.size == 32128
    text = "translate English to German: That is good."
    assert vocabulary.batch([text], 10)[0].tolist() == [13959, 1566, 12, 2968, 10, 466, 19, 207, 5, 1]


def test_a_broken_vocabulary_is_named(tmp_path: Path):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"bad\.model: not a SentencePiece model"):
        Vocabulary(tmp_path / "bad.model")
