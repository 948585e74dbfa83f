"""Which shapes are worth a line: numbers by hand, and the package's own configurations."""

import dataclasses

import jax
import pytest

from retrieval_jax.mesh import partitioning
from retrieval_jax.mesh.hardware import CHIPS
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.training.slow_shapes import _Work, slow_search, slow_training

BASE = T5Config(32128, 768, 12, 64, 2048, 12, 12, dtype="bfloat16")
V4, RULES = CHIPS["v4"], partitioning.DEFAULT_RULES
BUSY = {"FLOP/s": 20.0, "memory bandwidth": 5.0}


def mesh(data: int = 1, model: int = 1):
    return jax.sharding.AbstractMesh((data, model), partitioning.MESH_AXES)


def shapes(rows: int = 64, inputs: int = 128, targets: int = 8) -> dict[str, tuple[int, int]]:
    return {"encoder_input_tokens": (rows, inputs), "decoder_input_tokens": (rows, targets)}


def lines(config: T5Config = BASE, batch=None, data: int = 1, model: int = 1, least_ms=BUSY, **settings):
    retriever = GenerativeRetriever(config, **settings)
    return slow_training(retriever, batch or shapes(), mesh(data, model), RULES, 1, V4, least_ms)


@pytest.mark.parametrize(
    ("config", "batch"),
    [
        (BASE, shapes()),
        (BASE, shapes(inputs=512, targets=64)),
        (BASE, shapes(inputs=32)),
        (dataclasses.replace(BASE, vocab_size=32_100), shapes()),  # 32,128: 0.1% of the softmax
        (T5Config(32128, 512, 6, 64, 1024, 8, 8), shapes()),
        (T5Config(32128, 1024, 16, 64, 2816, 24, 24), shapes()),
        (T5Config(32128, 2048, 32, 64, 5120, 24, 24), shapes()),
        (T5Config(32128, 4096, 64, 64, 10240, 24, 24), shapes()),
    ],
)
def test_published_sizes_have_none(config: T5Config, batch: dict):
    assert lines(config, batch) == []


def test_the_products_are_those_of_the_layers():
    """One layer each, 8 wide, two heads of 4, an MLP of 16, a softmax of 32; 3 tokens read, 2 written."""
    config = T5Config(32, 8, 2, 4, 16, 1, 1)
    work = _Work(config, 8, 2, 4, 8, 16, 32, inputs=3, S=3, targets=2, T=2, decodes=True)
    projections, mlp = 8 * 8, 3 * 8 * 16
    encoder = 3 * (4 * projections + mlp) + 2 * 2 * 3 * 3 * 4  # q·k and weights·v: two heads, 3 × 3, of 4
    decoder = 2 * (6 * projections + mlp) + 3 * 2 * projections + 2 * 2 * 2 * (2 + 3) * 4
    assert work.products() == encoder + decoder + 2 * 8 * 32


def test_narrow_heads_and_the_share_that_they_waste():
    config = dataclasses.replace(BASE, head_dim=48)
    (line,) = lines(config)
    assert line.startswith("T5Config.head_dim: on a chip the width of a head, 48, is computed as 128: ")
    assert line.endswith("% of all products are wasted: choose 64 or 128")

    def layer(tokens: int, joined: int, head: int) -> float:  # of an encoder without the rest
        return tokens * (4 * 768 * joined + 3 * 768 * 2048 + 2 * 12 * head * 128)

    batch = {"left_encoder_input_tokens": (64, 128), "right_encoder_input_tokens": (64, 1, 128)}
    model = DualEncoder(dataclasses.replace(config, num_decoder_layers=0))
    (line,) = slow_training(model, batch, mesh(), RULES, 1, V4, BUSY)
    wasted = 1 - layer(1, 12 * 48, 48) / layer(1, 640, 128)
    assert f": {wasted:.0%} of all products are wasted" in line


@pytest.mark.parametrize(
    ("changes", "setting", "numbers"),
    [
        ({"emb_dim": 520}, "T5Config.emb_dim", "520, is computed as 640"),
        ({"mlp_dim": 1100}, "T5Config.mlp_dim", "1,100, is computed as 1,152"),
        ({"num_heads": 3, "mlp_dim": 256}, "T5Config.num_heads", "192, is computed as 256"),
    ],
)
def test_widths_between_tiles(changes: dict, setting: str, numbers: str):
    found = lines(dataclasses.replace(BASE, **changes))
    if setting == "T5Config.mlp_dim":  # 3% of the step's products
        assert found == []
        return
    (line,) = found
    assert line.startswith(f"{setting}: ")
    assert numbers in line
    assert line.endswith("choose a multiple of 128")


def test_a_mesh_that_cuts_heads_out_of_their_tiles():
    """Four chips share 12 heads of 64: each has 192 of 256 lanes."""
    (line,) = lines(model=4)
    assert line.startswith("make_mesh.model_parallelism: on a chip the width of all heads, 192, ")
    assert lines(model=2) == []
    large = T5Config(32128, 1024, 16, 64, 2816, 24, 24)
    assert lines(large, model=4) == []  # 704 of 768 in the MLP alone


def test_one_token_a_row_and_few_rows_a_chip():
    """Atomic docids: with a softmax of millions the decoder's one token a row is most of the work."""
    atomic = dataclasses.replace(BASE, output_size=8_847_360, separate_target_embedding=True)
    few = lines(atomic, shapes(rows=2, inputs=32, targets=1), max_logits_per_block=None)
    assert [line.partition(":")[0] for line in few] == ["train.batch_size"]
    assert "tokens of targets, 2, is computed as 8: " in few[0]
    assert lines(atomic, shapes(rows=16, inputs=32, targets=1)) == []


def test_a_step_that_waits_for_its_parameters():
    (line,) = lines(least_ms={"FLOP/s": 1.0, "memory bandwidth": 4.0})
    assert line.startswith("train.batch_size: ")
    assert "75% of its arithmetic is idle: a batch 4.0 times as large" in line
    assert lines(least_ms={"FLOP/s": 3.0, "memory bandwidth": 4.0}) == []


def test_blocks_of_a_softmax():
    atomic = dataclasses.replace(BASE, output_size=1 << 20, separate_target_embedding=True)
    batch = shapes(rows=4096, inputs=32, targets=1)
    assert lines(atomic, batch, max_logits_per_block=1 << 26) == []
    (narrow,) = lines(atomic, batch, max_logits_per_block=1 << 18)
    assert narrow.startswith(
        "GenerativeRetriever.max_logits_per_block: 262,144 logits of 4,096 tokens a chip are "
    )
    assert "blocks of 64 outputs" in narrow
    assert narrow.endswith(f"set {512 * 4096:,} or more")  # 2 · 275e12 FLOP/s / 1228e9 byte/s: 447
    (whole,) = lines(atomic, batch, max_logits_per_block=1 << 33)
    assert whole.endswith("set None")
    naive = shapes(rows=64, inputs=128, targets=8)
    assert lines(BASE, naive, max_logits_per_block=1 << 33) == []  # the softmax is a small part of this step


def test_searches_of_few_queries():
    assert slow_search(BASE, 32, 40, mesh(), RULES, V4) == []
    padded, few = slow_search(BASE, 12, 40, mesh(data=16), RULES, V4)
    assert padded.startswith("make_index.batch_size: 12 queries are searched as 16, ")
    assert "25% of the work is wasted: set 16" in padded
    # In bfloat16 a v4 multiplies by a parameter 224 times while it reads one.
    assert "for 40 tokens a step: 82% of its arithmetic is idle: up to 96 queries" in few
