"""Reading BEIR, TSV and MS MARCO folders: what is written comes back, in every form that such files have."""

import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import error_of, python_of, read, write

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection, Passage, Query
from retrieval_jax.data.sources import layouts
from retrieval_jax.data.sources.layouts import open_source

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
README = {  # folder -> passages, queries of each split
    "squad_dev": (2_067, {"train": 9_491, "test": 1_079}),
    "scifact": (5_183, {"train": 809, "test": 300}),
    "medquad": (16_407, {"train": 12_942, "test": 1_403}),
    "tldr": (7_425, {"train": 28_880, "test": 3_256}),
    "wordnet": (117_659, {"train": 43_553, "test": 4_786, "lemmas": 147_306}),
    "doct5q": (1_000, {"train": 47_441, "test": 6_966}),
    "limit_small": (46, {"test": 1_000}),
}

TSV = {
    "docs.tsv": "d1\tOne\tfirst text\nd2\t\tsecond text\nd3\tThree\t\n",
    "queries.train.tsv": "q1\twho?\nq2\twhat?\n",
    "qrels.train.tsv": "q1\td1\t1\nq2\td2\t2\nq1\td3\t1\n",
    "queries.val.tsv": "q3\twhere?\nq4\twhen?\nq5\twhy?\n",
    "qrels.val.tsv": "q3\td1\t0\nq3\td2\t-1\nq5\td1\t0\nq5\td3\t1\n",
}
HEADER = "query-id\tcorpus-id\tscore\n"
BEIR = {
    "corpus.jsonl": (
        '{"_id": "d1", "title": "One", "text": "first text"}\n'
        '{"_id": "d2", "text": "second text", "metadata": {"url": 1}}\n'
        '{"_id": "d3", "title": "Three", "text": ""}\n'
    ),
    "queries.jsonl": (
        '{"_id": "q1", "text": "who?"}\n{"_id": "q2", "text": "what?"}\n{"_id": "q3", "text": "where?"}\n'
        '{"_id": "q4", "text": "when?"}\n{"_id": "q5", "text": "why?"}\n'
    ),
    "qrels/train.tsv": HEADER + TSV["qrels.train.tsv"],
    "qrels/val.tsv": HEADER + TSV["qrels.val.tsv"],
}
MSMARCO = {
    "collection.tsv": "d1\tfirst text\nd2\tsecond text\nd3\tthird\n",
    "queries.train.tsv": "q1\twho?\nq2\twhat?\nq9\tnobody judged this\n",
    "qrels.train.tsv": "q1\t0\td1\t1\nq2 0 d2 2\nq1\t0\td3\t1\n",
    "queries.dev.small.tsv": TSV["queries.val.tsv"],
    "qrels.dev.small.tsv": "q3 0 d1 0\nq3 0 d2 -1\nq5 0 d1 0\nq5 0 d3 1\n",
    "queries.dev.tsv": "q5\tanother text, which no qrels use\n",
    "queries.eval.tsv": "q7\tno qrels here\n",
}
PASSAGES = [Passage("d1", "One", "first text"), Passage("d2", "", "second text"), Passage("d3", "Three", "")]
QUERIES = {
    "train": [Query("q1", "who?", {"d1": 1, "d3": 1}), Query("q2", "what?", {"d2": 2})],
    "dev": [
        Query("q3", "where?", {}, ("d1", "d2")),
        Query("q5", "why?", {"d3": 1}, ("d1",)),
    ],  # q4 has no grade
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("layout", [TSV, BEIR])
def test_reads_both_layouts_plain_and_compressed(tmp_path, layout, ending):
    folder = write(tmp_path / "My Data-v2", {name + ending: content for name, content in layout.items()})
    assert read(folder) == (PASSAGES, QUERIES)
    source = open_source(str(folder))
    assert source.name == "my_data_v2"
    assert len(source.files) == len(set(source.files))
    assert set(source.files) == {folder / (name + ending) for name in layout}


@pytest.mark.parametrize("layout", [TSV, BEIR])
def test_accepts_windows_line_ends_byte_order_marks_and_empty_lines(tmp_path, layout):
    windows = {name: "\ufeff" + text.replace("\n", "\r\n") + "\r\n\n" for name, text in layout.items()}
    assert read(write(tmp_path, windows)) == (PASSAGES, QUERIES)


def test_hidden_files_are_of_no_split(tmp_path):
    hidden = {"qrels/._val.tsv": "\x00\x05", "._corpus.jsonl": "\x00"}
    assert read(write(tmp_path / "beir", BEIR | hidden)) == (PASSAGES, QUERIES)


@pytest.mark.parametrize("layout", [TSV, BEIR])
def test_accepts_a_last_line_without_an_end(tmp_path, layout):
    files = {name: text.removesuffix("\n") for name, text in layout.items()}
    assert read(write(tmp_path, files)) == (PASSAGES, QUERIES)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_reads_ms_marco(tmp_path, ending):
    folder = write(tmp_path / "msmarco", {name + ending: text for name, text in MSMARCO.items()})
    passages = [Passage("d1", "", "first text"), Passage("d2", "", "second text"), Passage("d3", "", "third")]
    assert read(folder) == (passages, QUERIES)
    assert len(open_source(folder).files) == 5  # neither of the two that no qrels belong to


def test_a_title_may_be_null(tmp_path):
    corpus = BEIR["corpus.jsonl"].replace('"d2",', '"d2", "title": null,')
    assert read(write(tmp_path, BEIR | {"corpus.jsonl": corpus})) == (PASSAGES, QUERIES)


def test_files_that_were_joined_have_marks_within(tmp_path):
    """And texts keep their other odd characters."""
    docs = TSV["docs.tsv"].replace("d2", "\ufeffd2") + "d4\t\ta\u2028b\0c\rd\ufeff\n"
    passages, queries = read(write(tmp_path, TSV | {"docs.tsv": docs}))
    assert passages == [*PASSAGES, Passage("d4", "", "a\u2028b\0c\rd\ufeff")]
    assert queries == QUERIES


ids = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"), min_size=1, max_size=6
).filter(lambda x: x.split() == [x])
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
tsv_text = any_text.map(lambda text: re.sub(r"[\t\r\n]", "", text))


@st.composite
def collections(draw, text):
    keys = draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    passages = [Passage(key, draw(text), draw(text) + "x") for key in keys]
    positives = st.dictionaries(st.sampled_from(keys), st.integers(1, 10**9 - 1), min_size=1)
    queries = [
        Query(key, draw(text), draw(positives)) for key in draw(st.lists(ids, min_size=1, unique=True))
    ]
    return passages, {"test": queries}


def qrels(queries: list[Query]) -> str:
    return "".join(f"{q.id}\t{key}\t{grade}\n" for q in queries for key, grade in q.positives.items())


@settings(max_examples=50, deadline=None)
@given(collections(tsv_text))
def test_round_trip_of_tsv(collection):
    passages, queries = collection
    docs = "".join(f"{p.id}\t{p.title}\t{p.text}\n" for p in passages)
    files = {
        "docs.tsv": "\ufeff" + docs,  # without the mark, the reader would drop one from the first id
        "queries.test.tsv.gz": "\ufeff" + "".join(f"{q.id}\t{q.text}\n" for q in queries["test"]),
        "qrels.test.tsv": "\ufeff" + qrels(queries["test"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        assert read(write(Path(folder), files)) == (passages, queries)


@settings(max_examples=50, deadline=None)
@given(collections(any_text), st.booleans())
def test_round_trip_of_beir(collection, ascii_only):
    passages, queries = collection
    docs = [{"_id": p.id, "title": p.title, "text": p.text} for p in passages]
    asked = [{"_id": q.id, "text": q.text} for q in queries["test"]]
    files = {
        "corpus.jsonl": "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in docs),
        "queries.jsonl.gz": "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in asked),
        "qrels/test.tsv": HEADER + qrels(queries["test"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        assert read(write(Path(folder), files)) == (passages, queries)


@pytest.mark.parametrize("path", ["absent", "docs.tsv"])
def test_the_folder_must_be_one(tmp_path, path):
    write(tmp_path, TSV)
    assert error_of(lambda: open_source(tmp_path / path)).startswith(
        f"{tmp_path / path}: there is no such folder"
    )


@pytest.mark.parametrize("name", README)
def test_reads_the_real_collections(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not on this machine")
    passages, queries = read(SHARED / name)
    assert (len(passages), {split: len(asked) for split, asked in queries.items()}) == README[name]


def test_a_layout_from_outside_the_package_goes_first(tmp_path, monkeypatch, cli):
    monkeypatch.setattr(layouts, "_OTHERS", [])
    (example,) = python_of("retrieval_jax/data/README.md")
    (tmp_path / "cards_layout_module.py").write_text(example)
    (tmp_path / "cards.gin").write_text("import cards_layout_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = write(tmp_path / "docs", {"cards.txt": "d1|red|fox\nd2|blue|bird\n", "notes.jsonl": "[]\n"})
    with pytest.raises(UserError):  # the notes' name is like Tevatron's
        read(folder)
    command = [
        "import",
        f"--COLLECTION={folder}",
        f"--WORK_DIR={tmp_path / 'work'}",
        f"--gin_file={tmp_path}/cards.gin",
    ]
    status, made, err = cli(*command, "--gin.import_collection.vocab_size=40")
    assert status == 0, err
    assert (made["passages"], made["queries"]) == (2, {"test": 2})
    collection = Collection(tmp_path / "work/collection")
    assert list(collection.passages()) == [Passage("d1", "", "d1|red|fox"), Passage("d2", "", "d2|blue|bird")]
    assert [query.positives for query in collection.queries("test")] == [{"d1": 1}, {"d2": 1}]
    with pytest.raises(ValueError, match="a layout 'Cards' is registered already"):
        layouts.register_layout(layouts._OTHERS[0])
    for file in folder.iterdir():
        file.unlink()
    assert "Cards needs cards.txt" in error_of(lambda: open_source(folder))
