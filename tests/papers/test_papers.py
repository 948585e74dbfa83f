"""gin_configs/papers: each row says what was published, and has its settings."""

import itertools
import math
import re
from pathlib import Path

import gin
import pytest

from retrieval_jax.core import configuration
from retrieval_jax.examples.mixtures import PAPER_MIXTURES as MIXTURES
from retrieval_jax.examples.training_data import DataConfig
from retrieval_jax.mesh.hardware import parse_topology
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.training.run import make_model

FOLDER = configuration.gin_folder() / "papers"
ROWS = sorted(str(file.relative_to(FOLDER)) for file in FOLDER.rglob("*.gin"))
TRAINED = [row for row in ROWS if "bm25" not in row]
GENERATIVE = [row for row in TRAINED if not re.search("gtr|multi_positive|ripor|pag", row)]

# What the generative-retrieval paper says. Collection: passages that preflight is told of, subset, most
# steps, input tokens, synthetic queries a passage.
COLLECTIONS = {
    "msmarco_100k": (100_000, 100_000, 1_000_000, 128, 40),
    "msmarco_1m": (1_000_000, 1_000_000, 9_000_000, 128, 40),
    "msmarco_full": (None, None, 9_000_000, 128, 40),  # preflight's own are 8,841,823
    "nq_100k": (109_000, None, 1_000_000, 64, 20),
    "triviaqa": (74_000, None, 1_000_000, 64, 15),
}
# Examples as a file's name has them: the tasks, and the synthetic queries.
EXAMPLES = {
    "labelled": ({"labelled"}, None),
    "firstp_labelled": ({"firstp", "labelled"}, None),
    "firstp_d2q_labelled": ({"firstp", "d2q", "labelled"}, "doc2query"),
    "d2q": ({"d2q"}, "doc2query"),
    "d2q_100": ({"d2q"}, "doc2query_100"),
    "daq_d2q_labelled": ({"daq", "d2q", "labelled"}, "doc2query"),
    "firstp_daq_d2q_labelled": ({"firstp", "daq", "d2q", "labelled"}, "doc2query"),
    "firstp_daq_in_domain_d2q_labelled": ({"firstp", "daq", "d2q", "labelled"}, "in_domain"),
}
NAME = re.compile(r"(atomic|naive|semantic_2d|semantic)_(base|large|xl|xxl)(_pawa)?(_consistency)?_(.+)")
SIZES = {"base": (768, 12), "large": (1024, 24), "xl": (2048, 24), "xxl": (4096, 24)}  # width, layers
CHIPS = {"base": 8, "large": 64, "xl": 64, "xxl": 128}  # and 64 for Base with atomic docids on FULL
# MRR@10 of T5 Base on 100k, 1M and FULL: examples -> of atomic, naive, semantic, PAWA docids.
MRR = {
    "labelled": ("0.0 1.1 0.0", "0.0 0.5 0.0", "0.0 0.0 0.0"),
    "firstp_labelled": ("0.0 23.9 19.2", "2.1 12.4 7.4", "0.0 7.5 3.1"),
    "firstp_d2q_labelled": ("79.2 77.7 76.8 77.1", "53.3 48.2 47.1 50.2", "14.2 13.2 6.4 9.0"),
    "d2q": ("80.3 78.7 78.5 78.2", "55.8 55.4 54.0 54.1", "24.2 13.3 11.8 17.3"),
}
# The multi-positive paper's: steps (40 epochs of 58,880 queries, 3 of 502,939; an epoch), batch, rate.
MULTI_POSITIVE = {
    "multi_positive_nq": (36_800, 920, 64, 1e-5),
    "multi_positive_msmarco": (11_788, 3_930, 128, 3e-5),
}


def configured(row: str, *bindings: str):
    """Configures a row; gives how to look a setting up."""
    configuration.configure([f"papers/{row}"], bindings)
    return gin.query_parameter


def configured_base(row: str, steps: int, batch_size: int, rate: float):
    """Configures a row of T5 Base that is trained so; gives how to look a setting up, and the data's."""
    of = configured(row)
    assert (of("%STEPS"), of("train.batch_size"), of("learning_rate.peak")) == (steps, batch_size, rate)
    assert (of("T5Config.emb_dim"), of("T5Config.num_encoder_layers")) == SIZES["base"]
    return of, DataConfig()


def comment(row: str) -> str:
    lines = (FOLDER / row).read_text().splitlines()
    return " ".join(line[2:] for line in itertools.takewhile(lambda line: line.startswith("# "), lines))


def test_there_is_a_row_for_each_published_figure():
    per_corpus = 4 * 3 + 2 + 1 + 3  # representations × docids, PAWA, consistency; GTR and two BM25
    # On 100k one with more queries; on FULL four of larger networks. A human row beside two times four
    # objectives × three kinds of labels. RIPOR's three trainings, and PAG's six.
    assert len(ROWS) == 3 * per_corpus + 1 + 4 + 2 * (3 * 3 + 2) + 2 * 4 * 3 + 1 + 3 + 6


@pytest.mark.parametrize("row", ROWS)
def test_a_row_opens_with_its_figure_and_chips_and_is_short(row: str):
    text, said = (FOLDER / row).read_text(), comment(row)
    assert re.match(r"(MRR@10|Recall@[15]) \d+\.\d\b|.*[Nn]o figure was at hand", said)
    assert "paper" in said
    assert "chips" in said
    settings = [line for line in text.splitlines() if line and not line.startswith(("#", "include"))]
    assert len(settings) <= 8
    readme = (FOLDER / "README.md").read_text()
    section = readme.split(f"\n`{Path(row).parent}/`")[1].split("\n`")[0]
    (listed,) = re.findall(rf"^\| `{Path(row).stem}` \|.*", section, re.MULTILINE)
    for figure in re.findall(r"\d+\.\d", listed):
        assert re.search(rf"\b{re.escape(figure)}\b", said), figure


@pytest.mark.parametrize("row", GENERATIVE)
def test_generative_rows_have_the_papers_settings(row: str):
    folder, name = Path(row).parent.name, Path(row).stem
    docids, size, pawa, consistency, examples = NAME.fullmatch(name).groups()
    passages, subset, steps, length, count = COLLECTIONS[folder]
    tasks, synthetic = EXAMPLES[examples]
    of = configured(row)

    assert of("train.retriever").selector.endswith("GenerativeRetriever")
    assert (of("%DOCIDS"), of("train.batch_size"), of("%STEPS")) == (docids, 512, steps)
    assert (of("learning_rate.peak"), of("T5Config.dropout_rate")) == (1e-3, 0.1)
    if docids == "atomic":
        assert of("learning_rate.warmup") == 10_000
    else:
        assert of("make_index.beams") == 40
    assert (of("T5Config.emb_dim"), of("T5Config.num_encoder_layers")) == SIZES[size]
    assert (of("T5Config.pawa_layers") > 0) if pawa else not binding("T5Config", "pawa_layers")
    assert bool(binding("GenerativeRetriever", "objective")) == bool(consistency)
    assert of("cross_entropy.z_loss") == 1e-4
    if consistency:
        assert of("GenerativeRetriever.objective").selector == "rdrop"
        assert of("rdrop.weight") == 1.0
    assert bool(of("%EMBEDDINGS")) == docids.startswith("semantic")
    if docids.startswith("semantic"):
        assert (of("semantic.clusters_per_node"), of("semantic.leaf_size")) == (10, 100)

    data = DataConfig()
    assert (data.input_length, data.chunk_length, data.chunks) == (length, 64, 10)
    assert (data.synthetic, data.token_dropout, data.curriculum) == (synthetic, {}, ())
    assert set(MIXTURES[data.mixture]) == tasks
    assert of("generate_queries.count") == (100 if synthetic == "doc2query_100" else count)
    assert of("%SUBSET") == subset
    assert binding("preflight", "passages") == passages
    check_places(row, of)
    wide = folder == "msmarco_full" and docids == "atomic"
    check_chips(row, of, 64 if wide else CHIPS[size])
    if wide:
        assert of("GenerativeRetriever.max_logits_per_block")
    kinds = ["atomic", "naive", "semantic", "semantic_2d"]
    if folder.startswith("msmarco") and size == "base" and examples in MRR and not consistency:
        figures = MRR[examples][[*COLLECTIONS].index(folder)].split()
        assert comment(row).startswith(f"MRR@10 {figures[kinds.index(docids)]}")


@pytest.mark.parametrize("row", [row for row in ROWS if "gtr" in row])
def test_gtr_rows(row: str):
    of = configured(row)
    assert (of("%DOCIDS"), of("train.batch_size"), of("%STEPS")) == (None, 2048, 20_000)
    assert (of("DualEncoder.scale"), DataConfig().passage_length) == (100.0, 256)
    check_places(row, of)
    check_chips(row, of, 8)


@pytest.mark.parametrize("row", [row for row in ROWS if "multi_positive" in row])
def test_multi_positive_rows_have_the_papers_settings(row: str):
    folder, name = Path(row).parent.name, Path(row).stem
    steps, epoch, batch_size, rate = MULTI_POSITIVE[folder]
    of = configured(row)
    model = make_model(DualEncoder, of("train.optimizer").scoped_configurable_fn, 100, None)
    assert (model.scale, model.module.normalize, model.vector_loss.bidirectional) == (1.0, False, False)
    data = DataConfig()
    assert (data.positives, data.negatives, data.passage_length) == (4, 4, 128)
    assert (of("train.batch_size"), of("learning_rate.peak")) == (batch_size, rate)
    objective, _, labels = name.rpartition("_")
    if objective:
        assert model.vector_loss.objective.__name__ == objective
    stages = [*data.curriculum, (of("%STEPS") - sum(n for n, _ in data.curriculum), data.mixture)]
    expected = {
        "human": [(steps, {"labelled_human": 1.0})],
        "homogeneous": [(steps, {"labelled_llm": 1.0})],
        "mixture": [(steps, {"labelled_llm": 1.0, "labelled_human": 1.0})],
        "curriculum": [(steps, {"labelled_llm": 1.0}), (epoch, {"labelled_human": 1.0})],
    }
    assert stages == expected[labels]
    check_places(row, of)
    check_chips(row, of, 8)


@pytest.mark.parametrize(
    ("name", "steps", "batch_size", "rate"),
    [  # 50 and 150 epochs of 502,939 queries
        ("dense", 98_230, 256, 5e-4),
        ("seq2seq", 250_000, 2048, 1e-3),
        ("rank", 73_673, 1024, 5e-4),
    ],
)
def test_ripor_rows_have_the_papers_settings(name: str, steps: int, batch_size: int, rate: float):
    row = f"ripor_msmarco/{name}_base.gin"
    of, data = configured_base(row, steps, batch_size, rate)
    if name == "dense":
        model = make_model(DualEncoder, of("train.optimizer").scoped_configurable_fn, 100, None)
        assert (model.module.pooling, model.module.normalize, model.scale) == ("decoder", False, 1.0)
        assert of("DualEncoder.distillation").selector == "dense_margin_mse"
        assert of("DualEncoder.objective_weight") == 0.0
    else:
        assert (of("%DOCIDS"), of("%EMBEDDINGS")) == ("rq_32x256", "work/ripor_msmarco/models/dense_base")
    if name == "seq2seq":
        assert set(MIXTURES[data.mixture]) == {"d2q"}
        assert of("learning_rate.warmup") == 0.045 * steps
        assert of("InitialCheckpoint.docid_centroids")
    if name == "rank":
        assert of("GenerativeRetriever.objective").selector == "margin_mse"
        assert of("GenerativeRetriever.score") == "logits"
        assert of("margin_mse.prefix_lengths") == of("mine.prefix_lengths") == (4, 8, 16, 32)
        assert of("make_index.beams") == 1000
        assert (data.mined, data.scores) == ("rank_base", "rank_base")
    check_begins(of, {"seq2seq": "dense", "rank": "seq2seq"}.get(name))
    check_places(row, of)
    check_chips(row, of, 8)


@pytest.mark.parametrize(
    ("name", "steps", "batch_size", "rate"),
    [  # 50 and 120 epochs of 502,939 queries
        ("dense", 98_230, 256, 5e-4),
        ("lexical", 200_000, 256, 5e-4),
        ("query", 200_000, 256, 5e-4),
        ("seq2seq", 250_000, 2048, 1e-3),
        ("rank", 58_938, 1024, 5e-4),
        ("joint", 58_938, 1024, 5e-4),
    ],
)
def test_pag_rows_have_the_papers_settings(name: str, steps: int, batch_size: int, rate: float):
    row = f"pag_msmarco/{name}_base.gin"
    of, data = configured_base(row, steps, batch_size, rate)
    assert (of("make_sets.m"), of("make_sets.impacts")) == (64, False)
    assert data.sets == ("lexical_base" if name in ("query", "joint") else None)
    if name in ("lexical", "query"):
        assert of("LexicalEncoder.distillation").selector == "dense_margin_mse"
        assert of("LexicalEncoder.objective_weight") == 0.0
    if name in ("seq2seq", "rank", "joint"):
        assert (of("%DOCIDS"), of("%EMBEDDINGS")) == ("rq_8x2048", "work/pag_msmarco/models/dense_base")
    assert binding("mine", "prefix_lengths") == ((4, 8) if name in ("rank", "joint") else None)
    if name == "rank":
        assert (of("margin_mse.prefix_lengths"), of("margin_mse.shares")) == ((4,), (0.5,))
    if name == "joint":
        assert of("GenerativeRetriever.objective").selector == "joint_ranking"
        assert of("GenerativeRetriever.score") == "logits"
        assert (of("joint_ranking.prefix_lengths"), of("joint_ranking.shares")) == ((4,), (0.5,))
        assert of("T5Config.lexical_head")
        assert (of("make_index.kind"), of("make_index.beams")) == ("planned", 10)
        assert of("InitialCheckpoint.averaged_with") == "work/pag_msmarco/models/query_base"
    before = {"query": "lexical", "seq2seq": "dense", "rank": "seq2seq", "joint": "rank"}
    check_begins(of, before.get(name))
    check_places(row, of)
    check_chips(row, of, 8)


def binding(function: str, name: str):
    return gin.get_bindings(function).get(name)


def check_begins(of, before: str | None) -> None:
    """A row names the row whose model it begins as; only a first one leaves it to the command line."""
    assert of("%INITIAL_CHECKPOINT") == (before and f"{of('%WORK_DIR')}/models/{before}_base")


def check_places(row: str, of) -> None:
    """A row's work lies in its collection's folder, its model and searcher are called as its file."""
    folder, name = Path(row).parent.name, Path(row).stem
    assert of("%WORK_DIR") == f"work/{folder}"
    assert of("%MODEL_DIR") == f"work/{folder}/models/{name}"
    assert of("%SEARCHER") == name
    assert binding("make_index", "name") == name
    assert binding("make_index", "model_dir") == binding("train", "model_dir")
    assert of("%SPLIT") == "dev"


def check_chips(row: str, of, chips: int) -> None:
    assert f" {chips} TPU v4 chips" in comment(row)
    chip, shape = parse_topology(of("%TOPOLOGY"))
    assert (chip.name, math.prod(map(int, shape.split("x")))) == ("v4", chips)
    parallelism = of("make_mesh.model_parallelism")
    assert of("train.batch_size") % (chips // parallelism) == 0
