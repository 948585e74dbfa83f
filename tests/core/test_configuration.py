"""The gin files: every one parses, and the published sizes are what they say."""

import functools
import importlib
import math

import gin
import jax
import jax.numpy as jnp
import pytest

from retrieval_jax.core import configuration
from retrieval_jax.core.errors import UserError
from retrieval_jax.docids.kinds import docid_kind
from retrieval_jax.examples.training_data import DataConfig
from retrieval_jax.models.contrastive import info_nce
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.objectives import cross_entropy, rdrop
from retrieval_jax.models.ranking import dpo, margin_mse
from retrieval_jax.models.t5 import T5
from retrieval_jax.training import settings_file
from retrieval_jax.training.optimizers import adafactor, adamw
from retrieval_jax.training.run import make_model
from retrieval_jax.verbs.table import CONFIGURABLE, VERBS

FOLDER = configuration.gin_folder()
# Those of t5x/ are for T5X's command line: tests/interop/test_t5x.py.
FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.gin") if path.parent.name != "t5x")


@pytest.fixture(autouse=True, scope="module")
def configurables():
    for module in (*(module for module, _ in VERBS.values()), *CONFIGURABLE):
        importlib.import_module(module)


@pytest.mark.parametrize("file", FILES)
def test_every_file_parses(file: str):
    configuration.configure([file], [])


@pytest.mark.parametrize(
    ("size", "millions"), [("small", 77), ("base", 248), ("large", 783), ("xl", 2850), ("xxl", 11135)]
)
def test_sizes_are_t5_11s(size: str, millions: int):
    """Parameters of the T5 1.1 checkpoints, with T5X's 32,128 embedding rows (shapes alone, no arrays)."""
    configuration.configure([f"models/{size}.gin"], [])
    model = T5(T5Config(vocab_size=32128))
    tokens = jnp.ones((1, 4), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6) == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(("file", "millions"), [("base_pawa", 761), ("large_pawa", 2131)])
def test_sizes_with_a_pawa_decoder_are_the_papers(file: str, millions: int):
    """761M and 2.1B in its table of sizes, with the semantic_2d docids of 8.8 million passages."""
    configuration.configure([f"models/{file}.gin", "docids/semantic_2d.gin", "runs/paper.gin"], [])
    docids = docid_kind("semantic_2d").shape(8_841_823, 32128)
    model = make_model(GenerativeRetriever, adafactor, 32128, docids)
    shapes = {"encoder_input_tokens": (1, 4), "decoder_input_tokens": (1, docids.length)}
    variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    assert count / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("size", ["small", "base", "large", "xl", "xxl"])
def test_dual_encoders_of_every_size(size: str):
    """GTR's: T5 1.1's encoder and a projection to 768, counted by hand (shapes alone, no arrays)."""
    configuration.configure([f"models/{size}.gin", "runs/gtr.gin"], [])
    model = make_model(DualEncoder, adafactor, 32128, None)
    loss = model.vector_loss
    assert (model.scale, loss.bidirectional, loss.objective is info_nce) == (100.0, True, True)
    shapes = {"left_encoder_input_tokens": (1, 4)}
    params = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))["params"]
    c = model.config
    J, gated = c.num_heads * c.head_dim, 3 * c.emb_dim * c.mlp_dim
    layers = c.num_encoder_layers * (4 * c.emb_dim * J + gated + 2 * c.emb_dim) + 32 * c.num_heads
    expected = 32128 * c.emb_dim + layers + c.emb_dim + c.emb_dim * 768
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize("file", ["multi_positive_nq", "multi_positive_msmarco"])
def test_the_multi_positive_papers_settings(file: str):
    bindings = ["DualEncoder.objective = @lse_pair", "lse_pair.positives = 'min'"]
    configuration.configure(["models/base.gin", f"runs/{file}.gin", "tasks/llm_then_human.gin"], bindings)
    model = make_model(DualEncoder, adamw, 32128, None)
    assert (model.scale, model.module.normalize, model.vector_loss.bidirectional) == (1.0, False, False)
    losses = model.vector_loss.objective(jnp.array([[2.0, 1.0]]), jnp.ones((1, 2), bool), jnp.zeros(1))
    assert float(losses[0]) == pytest.approx(math.log1p(math.exp(-1.0)))  # of the positive that scores 1
    data = DataConfig()
    assert (data.positives, data.negatives, data.passage_length) == (4, 4, 128)
    assert data.curriculum == ((1000, {"labelled_llm": 1.0}),)


def test_later_wins_and_a_run_file_is_below_what_the_person_gave():
    configuration.configure(["runs/one_minute.gin"], ["SEED=7"])
    assert gin.query_parameter("%SEED") == 7
    with configuration.run_file("runs/atomic.gin"):
        assert gin.query_parameter("%DOCIDS") == "atomic"
        assert gin.query_parameter("%STEPS") == 60
        assert gin.query_parameter("train.batch_size") == 128
        assert gin.query_parameter("%SEED") == 7
    with configuration.run_file("runs/atomic.gin", "STEPS = 5", "SEED = 5"):
        assert gin.query_parameter("%STEPS") == 5
        assert gin.query_parameter("%SEED") == 7
    with pytest.raises(UserError, match=r"atomics\.gin: no such file"), configuration.run_file("atomics.gin"):
        pass
    assert configuration.given() == (["runs/one_minute.gin"], ["SEED=7"])
    assert (gin.query_parameter("%DOCIDS"), gin.query_parameter("%SEED")) == ("naive", 7)


def test_a_broken_file_is_named_with_its_line(tmp_path, monkeypatch):
    file = tmp_path / "mine.gin"
    file.write_text("SEED = 3\ntrain.stepz = 4\n")
    with pytest.raises(UserError, match=r"mine\.gin:2: .*stepz"):
        configuration.configure([str(file)], [])
    file.write_text("SEED = 3\nK = abc\n")
    with pytest.raises(UserError, match=r"mine\.gin:2: not a value: write a number"):
        configuration.configure([str(file)], [])
    file.write_text("SEED = 3\ninclude 'sub/other.gin'\n")
    with pytest.raises(
        UserError, match=r"mine\.gin:2: include 'sub/other\.gin': no such file: paths are from"
    ):
        configuration.configure([str(file)], [])
    with pytest.raises(
        UserError, match=r"^--gin_file=no\.gin: no such file, from .*: there are runs/atomic\.gin"
    ):
        configuration.configure(["no.gin"], [])
    (tmp_path / "binary.gin").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"binary\.gin: not UTF-8 text: name a gin file"):
        configuration.configure([str(tmp_path / "binary.gin")], [])
    (tmp_path / "broken_module.py").write_text("import os\nx = = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    file.write_text("import broken_module\n")
    with pytest.raises(UserError, match=r"broken_module\.py:2: invalid syntax: mend the line"):
        configuration.configure([str(file)], [])
    with pytest.raises(UserError, match="SED: no such name: did you mean SEED"):
        configuration.configure([], ["SED=1"])


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("K=-3", "K: -3 is not a whole number of at least 1: set one that is"),
        ("K=1.5", "K: 1.5 is not a whole number of at least 1"),
        ("K='10'", "K: '10' is not a whole number of at least 1"),
        ("K=True", "K: True is not a whole number"),
        ("STEPS=-1", "STEPS: -1 is not a whole number of at least 0"),
        ("search.split=3", "search.split: 3 is not a text, in quotes of its own"),
        ("SEED=0.5", "SEED: 0.5 is not a whole number"),
        ("SEED=-1", "SEED: -1 is not a whole number of at least 0 and at most 4294967295"),
        ("SEED=99999999999999999999", "SEED: 99999999999999999999 is not a whole number of at least 0"),
        ("train.batch_size=0", "train.batch_size: 0 is not a whole number of at least 1"),
        ("train.max_minutes='5'", "train.max_minutes: '5' is not a number of at least 0 or None"),
        (
            "make_index.recall_target=1.5",
            "make_index.recall_target: 1.5 is not a number of at least 0 and at most 1",
        ),
        ("make_index.beams=None", "make_index.beams: None is not a whole number"),
        ("naive/train.eval_every=-1", "train.eval_every: -1 is not a whole number"),
        ("T5Config.dropout_rate=2", "T5Config.dropout_rate: 2 is not a number of at least 0 and at most 1"),
        ("learning_rate.peak=0", "learning_rate.peak: 0 is not a number above 0"),
        ("DataConfig.token_dropout=0.1", "DataConfig.token_dropout: 0.1 is not a mapping"),
        ("DualEncoder.bidirectional=1", "DualEncoder.bidirectional: 1 is not True or False"),
        ("train.steps=%STPES", "train.steps: %STPES: no such name: did you mean STEPS?"),
        ("K=%ELSEWHERE", "K: %ELSEWHERE: no such name: the names are COLLECTION, "),
        (
            "adamw.multipliers={'embeding': 50.0}",
            "adamw.multipliers: 'embeding' is not the name of a parameter's last module or of its array, as "
            "embedding or rel_embedding",
        ),
        (
            "adafactor.multipliers={'logit_dense': 9}",
            "adafactor.multipliers: 'logit_dense' is not the name of",
        ),
        ("adamw.multipliers={'embedding': '50'}", "adamw.multipliers: '50' is not a number"),
        ("adamw.multipliers={'decoder': 2.0}", "adamw.multipliers: 'decoder' is not the name of"),
        (
            "DataConfig.token_dropout={'firstpp': 0.1}",
            "DataConfig.token_dropout: 'firstpp' is not the name of a task, as firstp is: set one that is",
        ),
        (
            "DataConfig.token_dropout={'zzz': 0.1}",
            "DataConfig.token_dropout: 'zzz' is not the name of a task (firstp, daq, sentence, title, d2q, ",
        ),
        (
            "DataConfig.token_dropout={'daq': 1.5}",
            "DataConfig.token_dropout: 1.5 is not a number of at least 0",
        ),
        (
            "DataConfig.mixture={'labeled': 1}",
            "DataConfig.mixture: 'labeled' is not the name of a task, as lab",
        ),
        ("DataConfig.mixture={'daq': -1}", "DataConfig.mixture: -1 is not a number of at least 0"),
        ("DataConfig.mixture='2c'", "DataConfig.mixture: '2c' is not "),
        (
            "DataConfig.curriculum=[(9, {'dak': 1})]",
            "DataConfig.curriculum: 'dak' is not the name of a ta",
        ),
        (
            "DataConfig.curriculum=[(-1, {'daq': 1})]",
            "DataConfig.curriculum: -1 is not a whole number of at least 0",
        ),
        ("DataConfig.curriculum=[(9,)]", "DataConfig.curriculum: (9,) is not a list of 2"),
        (
            "InitialCheckpoint.missing_ok=('decoder/logit_dense',)",
            "InitialCheckpoint.missing_ok: 'decoder/logit_dense' is",
        ),
        (
            "InitialCheckpoint.missing_ok=('encoder/logits_dense',)",
            "InitialCheckpoint.missing_ok: 'encoder/logits_dense' is",
        ),
        ("InitialCheckpoint.resize_vocab=('encoder',)", "InitialCheckpoint.resize_vocab: 'encoder' is not "),
        (
            "axis_rules.rules=(('vocabulary', 'model'),)",
            "axis_rules.rules: 'vocabulary' is not the name of a logi",
        ),
        (
            "axis_rules.rules=(('vocab', ('model', 'date')),)",
            "axis_rules.rules: 'date' is not the name of an a",
        ),
        (
            "demo.steps={'naiv': 3}",
            "demo.steps: 'naiv' is not the name of a model that demo trains, as naive",
        ),
        ("T5Config.dtype='bf16'", "T5Config.dtype: 'bf16' is not the name of a dtype, as bfloat16 is"),
        ("T5Config.relpos_buckets=0", "T5Config.relpos_buckets: 0 is not a whole number of at least 4"),
        ("adamw.momentum_dtype='half'", "adamw.momentum_dtype: 'half' is not the name of a dtype"),
        ("train.random_bits='foo'", "train.random_bits: 'foo' is not the name of a generator of random bits"),
        ("demo.steps={'naive': 0}", "demo.steps: 0 is not a whole number of at least 1"),
        ("demo.generative=('rq_8x',)", "demo.generative: 'rq_8x' is not "),
        ("demo.dense=('dual_encoder',)", "demo.dense: 'dual_encoder' is not the name of a dense"),
        (
            "nave/train.steps=3",
            "nave/train.steps: nothing enters the scope 'nave': it must be the name of a ",
        ),
        ("foo/train.steps=3", "foo/train.steps: nothing enters the scope 'foo': it must be the name of a "),
        ("naive/foo/train.steps=3", "naive/foo/train.steps: nothing enters the scope 'foo'"),
        ("foo/STEPS=3", "foo/STEPS: no such name"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(binding: str, message: str):
    with pytest.raises(UserError) as caught:
        configuration.configure([], [binding])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("STEPS=abc", "--STEPS=abc: not a value: write a number, or a text in quotes"),
        ("STEPS=3 4", "--STEPS=3 4: not a value: "),
        ("STEPS=(3", "--STEPS=(3: not a value: "),
        ("STEP=2", "--STEP: no such name: did you mean STEPS?"),
        (
            "make_index.kind=exact",
            "--gin.make_index.kind=exact: not a value: write a number, or a text in quotes",
        ),
        (
            "GenerativeRetriever.objective=@rdorp",
            "--gin.GenerativeRetriever.objective=@rdorp: No configurable matching reference '@rdorp': did "
            "you mean rdrop? A module of your own needs the line `import MODULE` in a gin file",
        ),
        (
            "mine/trian.steps=3",
            "--gin.mine/trian.steps=3: No configurable matching 'trian': did you mean train?",
        ),
        ("T5Config.objective=@focal_loss", "--gin.T5Config.objective=@focal_loss: No configurable matching"),
    ],
)
def test_what_cannot_be_read_is_named_as_it_was_written(binding: str, message: str):
    with pytest.raises(UserError) as caught:
        configuration.configure([], [binding])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "binding",
    ["K=1", "train.max_minutes=None", "train.max_minutes=5", "DataConfig.mixture='3b'", "QUERY=''",
     "DataConfig.mixture={'firstp': 1}", "DataConfig.mixture={'labelled_a b/c': 1, 'firstp': 0}",
     "DataConfig.curriculum=((9, {'daq': 1}), (5, '3b'))", "rq_8x256/train.batch_size=64",
     "naive/semantic_2d/train.batch_size=64", "train.optimizer=@mine/adamw", "demo.steps=None",
     "demo.steps={'dual_encoder': 5, 'semantic': 3}", "demo.generative=('rq_2x16', 'atomic')",
     "adafactor.multipliers={'log_scale': 2, 'wi': 0.5, 'kernel': 1}",
     "InitialCheckpoint.resize_vocab=('decoder',)",
     "InitialCheckpoint.missing_ok=('encoder/layers_11/mlp', 'encoder/encoder/mlp/wi_0/kernel', 'log_scale')",
     "axis_rules.rules=(('vocab', ('model', 'data')), ('mlp', None))",
     "train.profile=(3, 4)", "train.optimizer=@adafactor"],
)  # fmt: skip
def test_a_value_that_can_be_is_taken(binding: str):
    configuration.configure([], [binding])


@pytest.mark.parametrize(
    ("binding", "value"),
    [
        ("COLLECTION=my docs/it's", "my docs/it's"),
        ("COLLECTION='quoted'", "quoted"),
        ('QUERY="quoted"', "quoted"),
        ("QUERY=42", "42"),  # it takes text
        ("QUERY=", ""),
        ("QUERY=a = b", "a = b"),
        ("QUERY=(un)supervised learning", "(un)supervised learning"),
        ('QUERY="exact phrase" search', '"exact phrase" search'),
        ("QUERY=%d format", "%d format"),
        ("QUERY=@property decorator", "@property decorator"),
        ("QUERY=it's", "it's"),
        ("WORK_DIR=gs://bucket/name", "gs://bucket/name"),
        ("MODEL_DIR=None", None),
        ("QUERY=None of them", "None of them"),
        ("DOCIDS=rq_8x256", "rq_8x256"),
        ("K=7", 7),
    ],
)
def test_a_macro_that_takes_text_takes_it_bare(binding, value):
    configuration.configure([], [binding])
    assert gin.query_parameter(f"%{binding.partition('=')[0]}") == value


def test_what_a_call_would_be_given_is_bound_by_a_partial_or_by_gin_or_is_the_default():
    gin.clear_config()
    assert configuration.argument(rdrop, "objective") is cross_entropy
    assert configuration.argument(rdrop, "none") is None
    assert configuration.argument(len, "none") is None
    bindings = ["rdrop.objective=@margin_mse", "GenerativeRetriever.objective=@strong/rdrop"]
    configuration.configure(["runs/naive.gin"], bindings)
    scoped = gin.query_parameter("GenerativeRetriever.objective").scoped_configurable_fn
    for function in (rdrop, functools.partial(rdrop, weight=2.0), scoped):
        assert configuration.argument(function, "objective") is margin_mse
    assert configuration.argument(functools.partial(rdrop, objective=dpo), "objective") is dpo


def test_the_scope_of_a_reference_has_parameters_of_its_own():
    def weight_of(*bindings: str) -> dict[str, str]:
        configuration.configure(
            ["runs/naive.gin"], ["GenerativeRetriever.objective=@strong/rdrop", *bindings]
        )
        texts = configuration.texts_of_parameters(settings_file.LEARNING)
        return {name: value for name, value in texts.items() if "rdrop." in name}

    assert weight_of()["strong/rdrop.weight"] == "1.0"
    found = weight_of("strong/rdrop.weight=9.0", "rdrop.weight=2.0")
    assert (found["strong/rdrop.weight"], found["rdrop.weight"]) == ("9.0", "2.0")
    assert weight_of("rdrop.weight=2.0")["strong/rdrop.weight"] == "2.0"
