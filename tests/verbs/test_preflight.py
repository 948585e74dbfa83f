"""Preflight: what is assumed without data, against real tables and batches; real compilations of both kinds.

On eight simulated CPU devices everything but the compiler is what a TPU slice gets. Where libtpu is installed
(the extra "tpu"), its compiler is asked too.
"""

import glob
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import gin
import jax
import pytest

from retrieval_jax import main
from retrieval_jax.core import configuration
from retrieval_jax.core.configuration import gin_folder
from retrieval_jax.core.errors import UserError
from retrieval_jax.decoding.trie import capacity
from retrieval_jax.docids.kinds import docid_kind
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.mesh.hardware import CHIPS, GIB, parse_topology
from retrieval_jax.mesh.partitioning import MESH_AXES, make_mesh
from retrieval_jax.verbs.preflight import configured, preflight
from retrieval_jax.verbs.table import configure_verbs

NO_LIBTPU = "libtpu, the TPU's compiler, is not installed: pip install -e '.[tpu]'"


@pytest.fixture(autouse=True)
def _gin_is_left_as_it_was():
    yield
    gin.clear_config()


def test_without_libtpu_one_line_says_how_to_get_it(cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # as if it were not installed
    status, _, err = cli("preflight", "--gin.TOPOLOGY='v4:2x2x1'")
    assert status == 2
    assert err.splitlines() == [
        "retrieval-jax: preflight: libtpu, the TPU's compiler, is not installed: "
        "pip install 'retrieval_jax[tpu]' (in a checkout: pip install -e '.[tpu]')"
    ]


def test_one_line_says_that_the_compiler_died(cli, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("libtpu", reason=NO_LIBTPU)
    monkeypatch.setattr("retrieval_jax.verbs.preflight._prepare", signal.raise_signal)
    monkeypatch.setattr(configuration, "given", lambda: [signal.SIGSEGV])
    status, _, err = cli("preflight", "--gin.TOPOLOGY='v4:2x2x1'")
    assert status == 2
    assert err.splitlines() == [
        "retrieval-jax: preflight: the TPU's compiler itself broke down on v4:2x2x1 (signal SIGSEGV): "
        "set another preflight.optimization (None is its default effort), or another topology"
    ]


@pytest.mark.parametrize(
    ("topology", "hint"),
    [("v9:2x2", "v4:2x2x1 … 8x8x8"), ("v5e:3x3", "v5e:2x2, v5e:2x4"), ("v4", "v4:2x2x1")],
)
def test_an_unknown_slice_names_those_that_there_are(topology: str, hint: str):
    with pytest.raises(UserError, match=f"TOPOLOGY: no slice '{topology}'.*{hint}"):
        preflight(topology)


def test_every_gin_file_of_a_slice_says_what_it_is():
    files = sorted((gin_folder() / "tpu").glob("*.gin"))
    assert {file.stem.split("_")[0] for file in files} == set(CHIPS)
    for file in files:
        text = file.read_text()
        topology = re.search("^TOPOLOGY = '(.*)'$", text, re.MULTILINE)[1]
        chip, shape = parse_topology(topology)
        assert file.stem == topology.replace(":", "_")
        chips = math.prod(map(int, shape.split("x")))
        assert f" {chips} chip" in text
        assert f"{chip.hbm / GIB:.2f} GiB" in text
        assert chips % int(re.search(r"parallelism = (\d+)", text)[1]) == 0


def test_assumed_docids_are_no_smaller_than_real_ones(arguments, work, cli):
    for kind in ("atomic", "naive_digits"):
        assert cli("docids", *arguments, f"--gin.DOCIDS='{kind}'")[0] == 0
        table = DocidTable.open(work.docids(kind))
        shape = docid_kind(kind).shape(len(table.passage_ids), vocab_size=1024)
        assert shape.output_size == table.output_size
        assert shape.length == table.length
        assert shape.has_docid_vocab == table.has_docid_vocab


def test_the_collection_and_its_docids_are_used_where_they_are(arguments, work, cli):
    assert cli("docids", *arguments, "--gin.DOCIDS='naive'")[0] == 0
    _, files, bindings, _ = main.parse(["train", "--gin_file=runs/naive.gin", *arguments])
    configuration.configure(files, bindings)
    real = configured(search=False, passages=None, vocab_size=None)
    table = DocidTable.open(work.docids("naive"))
    assert real.shapes["decoder_target_tokens"] == (32, table.length)
    assert real.facts["collection"] == str(work.collection)
    assert real.facts["passages"] == len(table.passage_ids)
    assumed = configured(search=False, passages=10**6, vocab_size=None)
    assert assumed.facts["collection"] == "assumed"
    assert assumed.model.config.vocab_size == 32_128


def test_sets_have_the_shape_of_those_on_disk_or_of_those_to_make(arguments, work, cli):
    def planned(name: str) -> dict:
        given = ["--gin.make_sets.m=5", "--gin.DataConfig.negatives=2", f"--SETS={name}"]
        _, files, bindings, _ = main.parse(["train", "--gin_file=runs/lexical.gin", *arguments, *given])
        configuration.configure(files, bindings)
        shapes = configured(search=False, passages=None, vocab_size=None).shapes
        return {name: shape[1:] for name, shape in shapes.items() if name.startswith("set_")}

    assert planned("none_yet") == {"set_tokens": (3, 5), "set_impacts": (3, 5)}
    made = ["--SETS=seven", "--gin.make_sets.m=7", "--gin.make_sets.impacts=False"]
    assert cli("sets", *arguments, *made)[0] == 0
    assert planned("seven") == {"set_tokens": (3, 7)}


def test_a_planned_search_has_all_docids_of_passages_with_several(
    arguments, work, cli, collection, tmp_path: Path
):
    """Those of the table where there is one, else those of the file that it would be made of."""
    file, passages = tmp_path / "docids.json", collection.passage_count
    docids = {
        id: [[i // 64, i % 64, n] for n in range(1 + i % 3)]
        for i, id in enumerate(collection.ids.to_pylist())
    }
    file.write_text(json.dumps(docids))
    extra = sum(map(len, docids.values())) - passages
    of_file = ["--gin.DOCIDS='file'", f"--gin.docid_file.path='{file}'"]
    assert cli("docids", *arguments, *of_file)[0] == 0
    _, files, bindings, _ = main.parse(["train", "--gin_file=runs/naive.gin", *arguments, *of_file])
    configuration.configure(
        files, [*bindings, "T5Config.lexical_head = True", "make_index.sets = 'none_yet'"]
    )
    for sizes in ((None, None), (passages, 1024)):
        plan = configured(True, *sizes)
        assert plan.facts["docids"].endswith("(assumed)") == (sizes[0] is not None)
        planning = plan.program(make_mesh(1)).memory["planning"]
        assert planning.docids.max_docids == 3
        assert planning.docids.extra_passage_M.shape == (capacity(extra),)
        assert planning.docids.local_id_NxL.shape == (capacity(passages + extra), 3)
    configuration.configure(files, [*bindings, "T5Config.lexical_head = True"])
    assert "planning" not in configured(True, passages, 1024).program(make_mesh(1)).memory
    # Of this kind, sets need no name; where no collection is read, they are of the shape of those to make.
    kind = "make_index.kind = 'planned'"
    configuration.configure(files, [*bindings, "T5Config.lexical_head = True", kind])
    assert "planning" in configured(True, passages, 1024).program(make_mesh(1)).memory


ON_CPUS = """
import importlib, json
import jax
jax.config.update("jax_num_cpu_devices", 8)
from retrieval_jax.core import configuration
from retrieval_jax.training.program import DoesNotDivide
from retrieval_jax.verbs import preflight as p, table
from retrieval_jax.mesh.hardware import CHIPS
from retrieval_jax.mesh.partitioning import make_mesh

def run(mesh, *bindings, search=False, hbm=2**40, file="runs/naive.gin"):
    configuration.configure([file], ["T5Config.num_heads = 2", "DataConfig.input_length = 16", *bindings])
    plan = p.configured(search, 100_000, 1024)
    report = plan.measure("cpu", mesh, hbm)
    told = p.summary(plan, report, CHIPS["v4"], mesh.size)
    return told | {"held": report.argument_bytes, "peak": report.peak}

for module in (*(module for module, _ in table.VERBS.values()), *table.CONFIGURABLE):
    importlib.import_module(module)
one, two = make_mesh(1), make_mesh(2)
whole = run(one)
told = {
    "whole": whole,
    "halves": run(two),
    "skips": run(one, "LossSpikeGuard.on_spike = 'skip'"),
    "small": run(one, hbm=2**10),
    "atomic search": run(two, search=True, file="runs/atomic.gin"),
    "rq search": run(two, "DOCIDS = 'rq_4x32'", search=True),
}
try:
    run(make_mesh(8))
except DoesNotDivide as error:
    told["eighths"] = str(error)
print(json.dumps(told))
"""


def test_a_real_compilation_on_eight_cpus():
    script = [sys.executable, "-c", ON_CPUS]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    whole, halves = told["whole"], told["halves"]
    # Parameters of 256 wide with 2 heads: embedding and softmax, an encoder layer, a decoder layer.
    E, J, F, V = 256, 2 * 64, 256, 1024
    matrices = 2 * V * E + (4 * E * J + 3 * E * F) + (8 * E * J + 3 * E * F)
    rest = 2 * 2 * 32 + 7 * E  # position biases, norms
    # AdamW keeps two moments; and the three counts and the rate of its parts.
    assert whole["held"]["parameters"] == 4 * (matrices + rest)
    assert 0 < whole["held"]["optimizer"] - 2 * whole["held"]["parameters"] < 64
    assert whole["held"]["batch"] == 4 * (128 // 8) * (16 + 3 * 6)
    assert halves["held"]["parameters"] == 2 * matrices + 4 * (rest - 32 * 2)
    assert whole["fits"]
    assert whole["peak"] > sum(whole["held"].values())
    assert whole["flops_per_step"] == whole["model_flops_per_step"] == halves["flops_per_step"]
    assert halves["peak"] < whole["peak"]
    assert told["skips"]["peak"] > whole["peak"]  # its gradients are all there before any is used
    assert told["skips"]["held"] == whole["held"]
    assert not told["small"]["fits"]
    assert "parameters, optimizer, batch alone take" in told["small"]["verdict"]
    assert told["small"]["compile_seconds"] == 0
    for kind in ("atomic", "rq"):
        search = told[f"{kind} search"]
        assert search["fits"]
        assert search["gib_per_chip"].keys() == {"parameters", "batch", "docids", "temporaries"}
        assert "least_days" not in search
    assert "does not divide" in told["eighths"]


ON_TPUS = """
import contextlib, io, json
from retrieval_jax.core import configuration
from retrieval_jax import main
from retrieval_jax.verbs.preflight import on_slice, try_slice
tiny = ["T5Config.num_heads=4", "DataConfig.input_length=16", "preflight.vocab_size=1024"]
files = ["runs/naive.gin", "tpu/v4_2x2x1.gin"]
out = io.StringIO()
with contextlib.redirect_stdout(out):
    bindings = [*tiny, "preflight.price=1e6"]
    arguments = [*(f"--gin_file={file}" for file in files), *(f"--gin.{binding}" for binding in bindings)]
    assert main.main(["preflight", "--json", *arguments]) == 0
told = {"v4": json.loads(out.getvalue())}
configuration.configure(files[:1], [*tiny, "make_mesh.model_parallelism=2"])
told["v5e"], *_ = on_slice("v5e:2x2", (False, 1000, 1024), 1)
configuration.configure(files[:1], [*tiny, "train.batch_size=300_000"])
told["large batch"], *_ = on_slice("v5e:1x1", (False, 1001, 1024), 1)
configuration.configure(files[:1], [*tiny, "make_mesh.model_parallelism=2"])
told["large vocabulary"] = try_slice("v5e:1x1", (False, 1000, 10_000_000), parallelism=2, optimization=1)
print(json.dumps(told))
"""


def test_the_tpu_compiler_on_two_generations():
    pytest.importorskip("libtpu", reason=NO_LIBTPU)
    script = [sys.executable, "-c", ON_TPUS]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    v4, v5e, large = told["v4"], told["v5e"], told["large batch"]
    assert (v4["topology"], v5e["topology"]) == ("v4:2x2x1", "v5e:2x2")
    assert (v4["mesh"], v5e["mesh"]) == ("data 1 × model 4", "data 2 × model 2")
    assert (v4["hbm_gib"], v5e["hbm_gib"]) == (30.75, 15.75)
    for fitting in (v4, v5e):
        assert fitting["fits"]
        assert 0 < fitting["gib_per_chip"]["parameters"] < fitting["peak_gib"] < 1
        assert fitting["flops_per_step"] == fitting["model_flops_per_step"]
    assert v4["least_cost"] == pytest.approx(v4["least_days"] * 24 * 4 * 1e6, abs=0.01)
    # Of 4 heads of 64 and an MLP of 256 each of 4 chips has half a tile.
    assert {line.partition(":")[0] for line in v4["warnings"]} == {"make_mesh.model_parallelism"}
    assert v4["smallest"] == "v4:2x2x1"
    assert v4["slices"] == {"v4:2x2x1": {key: v4[key] for key in ("mesh", "fits", "peak_gib")}}
    assert not large["fits"]
    assert large["peak_gib"] > large["hbm_gib"]
    assert "too many" in large["verdict"]
    larger = told["large vocabulary"]
    assert not larger["fits"]
    assert larger["mesh"] == "data 1 × model 1"
    # Embedding and softmax of 256 wide, and two moments of each, are too large before any compiling.
    assert larger["peak_gib"] == pytest.approx(3 * 2 * 4 * 256 * 10_000_000 / GIB, rel=0.01)
    # Nothing but our own lines, with the seconds that compiling took.
    assert all(re.match(r"v\de:|v4:", line) for line in result.stderr.splitlines()), result.stderr


@pytest.mark.skipif(bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*")), reason="there may be a TPU")
def test_without_a_tpu_libtpu_neither_hinders_nor_tells():
    pytest.importorskip("libtpu", reason=NO_LIBTPU)
    script = "from retrieval_jax.core.progress import quiet_libraries as q; q(); import jax; jax.devices()"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_PLATFORMS", "TPU_"))}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stderr == ""


CUT_HEADS = ["make_mesh.model_parallelism"]  # four chips share 12 heads of 64: 192 of 256 lanes on each


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ("msmarco_full/naive_base_d2q", CUT_HEADS),
        ("msmarco_full/atomic_base_d2q", CUT_HEADS),
        ("msmarco_full/naive_large_d2q", []),
        ("msmarco_full/semantic_2d_large_pawa_d2q", []),
        ("msmarco_full/naive_xl_d2q", []),
        ("msmarco_full/naive_xxl_d2q", []),
        ("msmarco_100k/gtr_base", CUT_HEADS),
    ],
)
def test_of_published_rows_only_what_is_deserved_is_called_slow(row: str, settings: list[str]):
    configure_verbs([f"papers/{row}.gin"], [])
    chip, shape = parse_topology(gin.query_parameter("%TOPOLOGY"))
    together = gin.query_parameter("make_mesh.model_parallelism")
    chips = math.prod(map(int, shape.split("x")))
    mesh = jax.sharding.AbstractMesh((chips // together, together), MESH_AXES)
    plan = configured(search=False, passages=gin.get_bindings("preflight").get("passages"), vocab_size=None)
    lines = plan.slow(mesh, chip, {"FLOP/s": 2.0, "memory bandwidth": 1.0})
    assert [line.partition(":")[0] for line in lines] == settings
