"""gin_configs/papers: each row takes a step, shrunken, on six passages; some go through all verbs."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from test_papers import TRAINED, binding, configured

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.batches import batches
from retrieval_jax.examples.training_data import DataConfig
from retrieval_jax.main import main
from retrieval_jax.mesh import partitioning
from retrieval_jax.training.run import make_model, train_dataset
from retrieval_jax.training.step import TrainState, abstract_state, make_train_step

SIZES = (
    "msmarco_100k/semantic_base_d2q.gin",
    "msmarco_full/atomic_base_d2q.gin",
    "msmarco_full/naive_xl_d2q.gin",
    "msmarco_full/semantic_2d_large_pawa_d2q.gin",
    "multi_positive_msmarco/rand1_lh_curriculum.gin",
    "multi_positive_msmarco/sum_marg_lh_curriculum.gin",
    "pag_msmarco/dense_base.gin",
    "pag_msmarco/seq2seq_base.gin",
    "ripor_msmarco/seq2seq_base.gin",
)
"""Rows whose programs differ from others' in sizes, or in an objective that has tests of its own."""
LIBRARY = Path(__file__).parents[1] / "data" / "library"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Bindings that shrink any row to the library, imported and with synthetic queries and docids by rows."""
    folder = tmp_path_factory.mktemp("papers")
    predictions, vectors = folder / "predictions", folder / "vectors.npy"
    predictions.mkdir()
    (predictions / "sample.txt").write_text("".join(f"which one is number {n}\n" for n in range(6)))
    np.save(vectors, np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32))
    settings = {
        "COLLECTION": str(LIBRARY),
        "WORK_DIR": str(folder / "work"),
        "VOCABULARY": str(LIBRARY / "sentencepiece.model"),
        "SUBSET": None,
        "SPLIT": "test",
        "generate_queries.predictions": str(predictions),
        "semantic.clusters_per_node": 2,
        "semantic.leaf_size": 2,
        "make_mesh.model_parallelism": 1,
        "train.batch_size": 4,
        "DataConfig.input_length": 12,
        "DataConfig.passage_length": 12,
        "T5Config.emb_dim": 16,
        "T5Config.num_heads": 2,
        "T5Config.head_dim": 8,
        "T5Config.mlp_dim": 16,
        "T5Config.num_encoder_layers": 1,
        "T5Config.num_decoder_layers": 1,
        "DualEncoder.vector_dim": 16,
    }
    bindings = [f"{name}={value!r}" for name, value in settings.items()]

    def verb(name: str, row: str, *more: str) -> None:
        made = [f"--gin.{setting}" for setting in (*bindings, *more)]
        assert main([name, f"--gin_file=papers/{row}.gin", *made]) == 0

    verb("import", "msmarco_100k/bm25")
    for row in ("msmarco_1m/naive_base_d2q", "msmarco_100k/atomic_base_d2q_100"):
        verb("generate-queries", row)
    verb("generate-queries", "nq_100k/naive_base_firstp_daq_in_domain_d2q_labelled")
    for docids in ("atomic", "naive"):
        verb("docids", f"msmarco_full/{docids}_base_d2q")
    for docids in ("semantic_base", "semantic_2d_base_pawa"):
        verb("docids", f"msmarco_full/{docids}_d2q", f"EMBEDDINGS={str(vectors)!r}")
    for row in ("ripor_msmarco/rank_base", "pag_msmarco/rank_base"):
        verb("docids", row, f"EMBEDDINGS={str(vectors)!r}")
    verb("sets", "pag_msmarco/joint_base", "make_sets.weights='bm25'")
    verb("index", "msmarco_100k/bm25")
    verb("mine", "msmarco_100k/bm25", "mine.name='bm25'", "mine.depth=3")
    of_bm25 = "score_pairs.candidates=('bm25',)"
    verb("score", "msmarco_100k/bm25", of_bm25, "score_pairs.name='cross_encoder'")
    work = Workspace(folder / "work")
    for name in ("rank_base", "joint_base"):
        shutil.copytree(work.negatives("bm25"), work.negatives(name))
        shutil.copytree(work.scores("cross_encoder"), work.scores(name))
    return bindings


def shrunken(row: str, library: list[str]):
    """(model, number -> batch, steps of the stages before the last) of a row on the library."""
    of = configured(row)
    own = ["T5Config.pawa_layers=1"] if binding("T5Config", "pawa_layers") else []
    own += ["DualEncoder.gradcache_chunk_size=4"] if binding("DualEncoder", "gradcache_chunk_size") else []
    of = configured(row, *library, *own)
    work = Workspace(Path(of("%WORK_DIR")))
    collection = Collection(work.collection)
    kind = binding("train", "docids")
    table = DocidTable.open(work.docids(kind)) if kind else None
    retriever = of("train.retriever").configurable.wrapped
    size = Vocabulary(collection.vocabulary_path).size
    model = make_model(retriever, of("train.optimizer").scoped_configurable_fn, size, table)
    examples = train_dataset(DataConfig(), work, collection, model, table)

    def batch(position: int) -> dict[str, np.ndarray]:
        size = of("train.batch_size")
        return next(batches(examples.stages(), examples.targets, {}, size, 0, position * size))

    return model, batch, [steps for steps, _ in examples.stages()][:-1]


def program(model, batch: dict) -> tuple:
    """What a training step is compiled from: rows that agree in it need only one compilation."""
    plain = {k: v for k, v in vars(model).items() if k not in ("module", "decode_module", "optimizer_def")}
    facts = sorted((k, getattr(v, "__name__", str(v))) for k, v in plain.items())
    shapes = sorted((name, x.shape) for name, x in batch.items())
    return type(model).__name__, str(getattr(model, "settings", "")), tuple(facts), tuple(shapes)


def some_state(abstract: TrainState) -> TrainState:
    """Random parameters, and the rest as it begins; quicker than compiling what makes them."""
    rng = np.random.default_rng(0)
    random = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), abstract.params)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    return jax.device_put(zeros.replace(params=random))


@pytest.mark.parametrize("sizes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_row_takes_a_step_on_the_library(sizes, library):
    """All have their examples and model made; each distinct program among them is compiled and run.

    Without `sizes` all but those of SIZES.
    """
    steps: dict[tuple, list[str]] = {}
    for row in TRAINED:
        model, batch, earlier = shrunken(row, library)
        first = batch(0)
        later = batch(sum(earlier))  # of the stage after a curriculum
        assert {name: x.shape for name, x in later.items()} == {name: x.shape for name, x in first.items()}
        assert all(np.any(x > 0) for x in first.values() if x.ndim == 2 and x.shape[1] > 1), row
        key = program(model, first)
        steps.setdefault(key, []).append(row)
        if len(steps[key]) > 1 or (row in SIZES and not sizes):
            continue
        mesh, shapes = partitioning.make_mesh(), {name: x.shape for name, x in first.items()}
        abstract = abstract_state(model, mesh, shapes)
        state, first = some_state(abstract), jax.device_put(first)
        compiled = make_train_step(model, mesh, abstract, 0).lower(state, first).compile()
        _, told = compiled(state, first)
        assert np.isfinite(told["loss"]), row
        assert told["gradient_norm"] > 0, row
    # Atomic (once more with the wide softmax), naive of three kinds of networks, semantic, PAWA of two and
    # with consistency; GTR and four objectives; RIPOR's three trainings, and PAG's but for the dense encoder.
    assert len(steps) == 2 + 3 + 1 + 3 + 1 + 4 + 3 + 5, [rows[0] for rows in steps.values()]
    assert sum(map(len, steps.values())) == len(TRAINED)
    assert {*SIZES} <= {rows[0] for rows in steps.values()}


def test_bm25_rows_answer(library, cli):
    small = [f"--gin.{setting}" for setting in library]
    for name in ("bm25", "bm25_d2q"):
        for verb in ("index", "search"):
            status, made, error = cli(verb, f"--gin_file=papers/msmarco_full/{name}.gin", *small)
            assert status == 0, error
        assert made["queries"] == 2
    status, made, error = cli("evaluate", "--gin_file=papers/msmarco_full/bm25.gin", *small)
    assert status == 0, error
    assert {"bm25", "bm25_d2q"} <= made["metrics"].keys()
    assert made["metrics"]["bm25"]["MRR@10"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atomic_base_d2q", "naive_base_firstp_d2q_labelled", "gtr_base"])
def test_a_row_goes_through_all_verbs(name: str, library, cli, tmp_path):
    row = f"--gin_file=papers/msmarco_full/{name}.gin"
    small = [f"--gin.{setting}" for setting in (*library, f"MODEL_DIR={str(tmp_path / name)!r}", "STEPS=1")]
    for verb in ("import", *(["docids"] if name != "gtr_base" else []), "train", "index", "search"):
        status, made, error = cli(verb, row, *small)
        assert status == 0, error
    assert made["queries"] == 2
    status, made, error = cli("evaluate", row, *small)
    assert status == 0, error
    assert name in made["metrics"]
