"""Queries and their qrels: which queries a split has, and what their judgements are."""

import pytest
from reading import read, write
from test_layouts import BEIR, HEADER, MSMARCO, PASSAGES, QUERIES, TSV

from retrieval_jax.data.collection import Query


def test_a_byte_order_mark_in_trec_qrels_is_no_part_of_an_id(tmp_path):
    marked = {name: "\ufeff" + text for name, text in MSMARCO.items() if name.startswith("qrels")}
    assert read(write(tmp_path / "marked", MSMARCO | marked)) == read(write(tmp_path / "plain", MSMARCO))


def test_splits_share_one_file_of_queries(tmp_path):
    """BEIR's queries.jsonl serves all splits, and each split has the queries that its qrels name."""
    more = {"qrels/test.tsv": HEADER + "q4\td2\t1\nq1\td1\t2\n"}
    passages, queries = read(write(tmp_path, BEIR | more))
    assert passages == PASSAGES
    assert queries == QUERIES | {"test": [Query("q1", "who?", {"d1": 2}), Query("q4", "when?", {"d2": 1})]}


@pytest.mark.parametrize("layout", [TSV, MSMARCO])
def test_splits_that_share_a_file_of_queries_share_its_header(tmp_path, layout):
    headed = {name: "qid\tquery\n" + text for name, text in layout.items() if name.startswith("queries")}
    assert read(write(tmp_path, layout | headed))[1] == QUERIES


def test_the_header_of_qrels_may_be_left_out(tmp_path):
    bare = {name: text.removeprefix(HEADER) for name, text in BEIR.items()}
    assert read(write(tmp_path, bare)) == (PASSAGES, QUERIES)


def test_splits_may_share_a_query(tmp_path):
    shared = {"queries.test.tsv": "q1\twho?\n", "qrels.test.tsv": "q1\td2\t1\n"}
    _, queries = read(write(tmp_path, TSV | shared))
    assert queries == QUERIES | {"test": [Query("q1", "who?", {"d2": 1})]}


def test_the_same_qrel_twice_is_one_qrel(tmp_path):
    assert read(write(tmp_path, TSV | {"qrels.train.tsv": TSV["qrels.train.tsv"] * 2})) == (PASSAGES, QUERIES)


def test_a_query_may_be_empty(tmp_path):
    _, queries = read(write(tmp_path, TSV | {"queries.train.tsv": "q1\t\nq2\twhat?\n"}))
    assert queries["train"][0] == Query("q1", "", {"d1": 1, "d3": 1})
