import gzip

import ir_measures
import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from run_files import write_run

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.trec import format_run, iterate_run, read_run, write_qrels

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
    lambda word: word.split() == [word]
)
SCORES = st.floats(-1e30, 1e30) | st.sampled_from([0.0, -0.0, 1.0, float(np.nextafter(1.0, 0.0)), 1e-300])
RUNS = st.dictionaries(
    WORDS, st.lists(st.tuples(WORDS, SCORES), max_size=6, unique_by=lambda result: result[0]), max_size=4
)


def order(run):
    return {qid: [pid for pid, _ in results] for qid, results in run.items() if results}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trec")


@settings(deadline=None, max_examples=100)
@given(run=RUNS, suffix=st.sampled_from(["", ".gz"]))
def test_a_run_keeps_its_order_for_every_reader(folder, run, suffix):
    path = folder / f"run.trec{suffix}"
    write_run(path, run, "test")
    back = read_run(path)
    assert order(back) == order(run)
    for results in back.values():
        scores = np.array([score for _, score in results], np.float32)
        assert (scores[1:] < scores[:-1]).all()


@settings(deadline=None, max_examples=50)
@given(scores=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), unique=True, max_size=8))
def test_scores_that_already_decrease_are_written_exactly(folder, scores):
    run = {"q": [(f"p{i}", score) for i, score in enumerate(sorted(scores, reverse=True))]}
    write_run(folder / "exact.trec", run, "test")
    assert read_run(folder / "exact.trec") == (run if scores else {})


def test_the_lines_of_a_run(tmp_path):
    run = {"q1": [("b", np.float32(0.5)), ("a", 0.5), ("c", 2.0)], "q2": [], "q3": [("a", 0.1)]}
    write_run(tmp_path / "new" / "run.trec", run, "bm25")
    below = np.nextafter(np.float32(0.5), np.float32(0))
    assert (tmp_path / "new" / "run.trec").read_text().splitlines() == [
        "q1 Q0 b 1 0.5 bm25",
        f"q1 Q0 a 2 {float(below)!r} bm25",
        f"q1 Q0 c 3 {float(np.nextafter(below, np.float32(0)))!r} bm25",
        "q3 Q0 a 1 0.1 bm25",
    ]


@pytest.mark.parametrize("pids", [["a", "b", "c"], ["c", "b", "a"]])
def test_trec_eval_sees_our_order_of_tied_scores(tmp_path, pids):
    # Differences that float64 holds and float32 does not: trec_eval would go by docid.
    run = {"q": [(pid, 1.0 - i * 1e-12) for i, pid in enumerate(pids)]}
    write_run(tmp_path / "run.trec", run, "test")
    docs = {doc.doc_id: doc.score for doc in ir_measures.read_trec_run(str(tmp_path / "run.trec"))}
    for rank, pid in enumerate(pids, start=1):
        judge = pytrec_eval.RelevanceEvaluator({"q": {pid: 1}}, {"recip_rank"})
        assert judge.evaluate({"q": docs})["q"]["recip_rank"] == pytest.approx(1 / rank)


def test_a_run_of_another_tool_is_ranked_by_score(tmp_path):
    (tmp_path / "run.trec").write_text(
        "q Q0 late 10 1e-3 t\r\n\nother Q0 x 1 1 t\nq\tQ0\tfirst\t22\t9.0\tt\n"
    )
    assert read_run(tmp_path / "run.trec") == {"q": [("first", 9.0), ("late", 1e-3)], "other": [("x", 1.0)]}


@settings(deadline=None, max_examples=50)
@given(run=RUNS)
def test_a_run_is_read_query_by_query(folder, run):
    path = folder / "queries.trec"
    write_run(path, run, "test")
    assert dict(iterate_run(path)) == {qid: dict(results) for qid, results in read_run(path).items()}


def test_queries_whose_lines_are_apart_are_told(tmp_path):
    (tmp_path / "run.trec").write_text("a Q0 p 1 2 t\nb Q0 p 1 1 t\na Q0 q 2 1 t\n")
    with pytest.raises(UserError, match=r"run.trec:3: query 'a' again, after others: sort"):
        list(iterate_run(tmp_path / "run.trec"))


@settings(deadline=None, max_examples=100)
@given(
    results=st.dictionaries(WORDS, st.sampled_from([0.5, 0.5 + 1e-12, 1.0, -2.0]), min_size=1, max_size=6),
    data=st.data(),
)
def test_the_order_is_trec_evals(folder, results, data):
    lines = data.draw(st.permutations([f"q Q0 {pid} 0 {score!r} beir" for pid, score in results.items()]))
    (folder / "foreign.trec").write_text("\n".join(lines) + "\n")
    for rank, (pid, _) in enumerate(read_run(folder / "foreign.trec")["q"], start=1):
        judge = pytrec_eval.RelevanceEvaluator({"q": {pid: 1}}, {"recip_rank"})
        assert judge.evaluate({"q": results})["q"]["recip_rank"] == pytest.approx(1 / rank)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("q Q0 b 2 0.5", "5 columns where a TREC run has 6 (qid Q0 docid rank score tag)"),
        ("q Q0 b 2 0.5 my tag", "7 columns"),
        ("q Q0 b two 0.5 t", "rank 'two' is not a whole number"),
        (f"q Q0 b 1{'0' * 400} 0.5 t", "rank '1000"),
        ("q Q0 b 1.5 0.5 t", "rank '1.5' is not a whole number"),
        ("q Q0 b 1_0 0.5 t", "rank '1_0' is not a whole number"),
        ("q Q0 b 2 high t", "score 'high' is not a finite number"),
        ("q Q0 b 2 nan t", "score 'nan'"),
        ("q Q0 b 2 1_0 t", "score '1_0' is not a finite number"),
        ("q Q0 a 2 0.5 t", "passage 'a' a second time for query 'q'"),
        ("q Q0 \udcff 2 0.5 t", "not UTF-8"),
    ],
)
def test_a_malformed_run_names_the_line_and_the_mend(tmp_path, line, what):
    path = tmp_path / "run.trec"
    path.write_bytes(f"q Q0 a 1 1.0 t\n\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        read_run(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: {what}")
    assert message.endswith("correct this line, or write the run again with `retrieval-jax search`")
    assert "\n" not in message


@settings(deadline=None, max_examples=50)
@given(
    qrels=st.dictionaries(WORDS, st.dictionaries(WORDS, st.integers(-2, 9), min_size=1, max_size=4)),
    suffix=st.sampled_from(["", ".gz"]),
)
def test_qrels_are_read_by_trec_eval(folder, qrels, suffix):
    path = folder / f"qrels{suffix}"
    write_qrels(path, qrels)
    with (gzip.open if suffix else open)(path, "rt", encoding="utf-8") as file:
        assert pytrec_eval.parse_qrel(file) == qrels


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["q Q0 a 1 1.0 t", "q Q0 b 2 3.0 t", "q Q0 c 3 2.0 t"], True),
        (["q Q0 c 3 1.0 t", "q Q0 b 1 3.0 t", "q Q0 a 2 2.0 t"], False),
        (["q Q0 a 0 1.0 t", "q Q0 b 0 3.0 t"], False),  # BEIR
        (["q Q0 a 1 1.0 t", "q Q0 b 2 1.0 t"], True),  # a tie
        (["q Q0 b 1 1.0 t", "q Q0 a 2 1.0 t"], False),
    ],
)
def test_ranks_that_contradict_the_scores_are_told(tmp_path, capsys, lines, told):
    (tmp_path / "run").write_text("\n".join(lines))
    read_run(tmp_path / "run")
    assert (
        "the ranks of 1 of 1 queries tell another order" in " ".join(capsys.readouterr().err.split())
    ) == told


def test_a_byte_order_mark_is_no_part_of_a_query_id(tmp_path):
    lines = "\ufeffq1 Q0 d1 1 2.5 tag\r\nq1 Q0 d2 2 1.5 tag\r\n\ufeffq1 Q0 d3 3 0.5 tag\n"
    (tmp_path / "run").write_bytes(lines.encode())
    assert read_run(tmp_path / "run") == {"q1": [("d1", 2.5), ("d2", 1.5), ("d3", 0.5)]}


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.trec: no such file"):
        read_run(tmp_path / "none.trec")
    with pytest.raises(UserError, match="cannot be read"):
        read_run(tmp_path)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"q Q0 a 1 1.0 t\n")[:-9])
    with pytest.raises(UserError, match=r"cut\.gz: cannot be read"):
        read_run(tmp_path / "cut.gz")
    (tmp_path / "plain.gz").write_bytes(b"q Q0 a 1 1.0 t\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_run(tmp_path / "plain.gz")


@pytest.mark.parametrize(
    ("run", "tag"),
    [
        ({"a query": [("p", 1.0)]}, "t"),
        ({"q": [("p\u00a0x", 1.0)]}, "t"),
        ({"q": [("", 1.0)]}, "t"),
        ({"q": [("p", 1.0)]}, "my tag"),
        ({"q": [("p", 1.0), ("p", 0.5)]}, "t"),
        ({"q": [("p", float("nan"))]}, "t"),
        ({"q": [("p", 1.0), ("r", float("-inf"))]}, "t"),
        ({"q": [("p", 1e39)]}, "t"),
        ({"q": [("p", -3.4028234663852886e38), ("r", -3.4028234663852886e38)]}, "t"),
    ],
)
def test_a_run_that_the_format_cannot_hold_is_refused(run, tag):
    with pytest.raises(UserError, match=r"^run\.trec: "):
        format_run("run.trec", run, tag)


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="taken: cannot be written"):
        write_qrels(tmp_path / "taken", {"q": {"p": 1}})
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]
    with pytest.raises(UserError, match="whitespace"):
        write_qrels(tmp_path / "qrels", {"q": {"a b": 1}})
