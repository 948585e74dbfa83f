"""Two processes with four simulated devices each, against one with eight and one with one."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import gin
import pytest
from tiny_training import SKIPS, batches, curve, poisoned, retriever, spiky, train

from retrieval_jax.checkpoints import checksums
from retrieval_jax.core.errors import UserError
from retrieval_jax.mesh import multihost

SCRIPT = """
import sys, json, shutil, time
from pathlib import Path
devices, folder, here = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
work = json.loads(sys.argv[4])
import gin, jax, numpy as np
jax.config.update("jax_num_cpu_devices", devices)
sys.path.insert(0, here)
import pytest
from retrieval_jax.core.errors import UserError
from tiny_training import batches, retriever, train
from retrieval_jax.mesh import multihost, partitioning

multihost.initialize("train")
for model_parallelism, source, target, steps in work:
    gin.bind_parameter("make_mesh.model_parallelism", model_parallelism)
    if source:
        while not (folder / source / "done").exists():
            time.sleep(0.1)
        multihost.on_process_0(lambda: shutil.copytree(folder / source, folder / target))
    rows = multihost.local_rows(partitioning.make_mesh(), 8)

    def own(position):
        for batch in batches(position):
            yield {name: x[rows] for name, x in batch.items()}

    mesh = partitioning.make_mesh()
    train(retriever(), own, lambda params: {}, folder / target, steps=steps, log_every=1, mesh=mesh)
    multihost.on_process_0(lambda: (folder / target / "done").touch())
    print(json.dumps(rows.tolist()), flush=True)

# Meshes in other orders: a model over both processes, and a process's shards of data apart from each other.
if jax.process_count() > 1:
    apart = np.array(jax.devices()).reshape(2, 4).T
    for devices, read in ((apart, range(8)), (apart.reshape(8, 1), range(jax.process_index(), 8, 2))):
        mesh = jax.sharding.Mesh(devices, ("data", "model"))
        rows = multihost.local_rows(mesh, 8)
        assert rows.tolist() == [*read]
        whole = np.arange(24).reshape(8, 3)
        assert multihost.global_batch_shapes(mesh, {"x": whole[rows]}) == {"x": (8, 3)}
        array = multihost.make_global_batch(mesh, {"x": whole[rows]})["x"]
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    with pytest.raises(UserError, match="train.batch_size: 12 does not divide over the mesh's 8 shards"):
        multihost.local_rows(mesh, 12)
"""


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(devices: int, processes: int, folder: Path, work: list) -> list[subprocess.Popen]:
    """Processes that do some work: (model parallelism, folder to go on from, folder, steps) each."""
    address = free_address()
    argv = [sys.executable, "-c", SCRIPT, str(devices), str(folder), str(Path(__file__).parents[1])]
    started = []
    for process in range(processes):
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        if processes > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(process),
            }
        started.append(
            subprocess.Popen(
                [*argv, json.dumps(work)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return started


def ended(started: list[subprocess.Popen]) -> list[list]:
    """What each printed: which rows of a batch it read, for each piece of its work."""
    outputs = [process.communicate(timeout=400) for process in started]
    for process, (_, err) in zip(started, outputs, strict=True):
        assert process.returncode == 0, "\n".join(line for line in err.splitlines() if "Gloo" not in line)[
            :6000
        ]
    return [[json.loads(line) for line in printed(out)] for out, _ in outputs]


def printed(out: str) -> list[str]:
    """Without the lines of Gloo, which connects processes on CPUs and writes that to stdout."""
    return [line for line in out.splitlines() if "[Gloo]" not in line and line.startswith(("[", "{"))]


def test_joining_is_refused_in_one_line_where_it_cannot_be(monkeypatch):
    multihost.initialize("import")  # not asked to: alone
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", free_address())
    with pytest.raises(UserError, match="import: runs in one process"):
        multihost.initialize("import")
    with pytest.raises(UserError, match=r"multihost: .*JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        multihost.initialize("train")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES: 'two' is not a number"):
        multihost.initialize("train")


def losses(folder: Path) -> list[float]:
    return [p["loss"] for p in curve(folder) if "loss" in p]


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layouts_have_the_same_losses_and_go_on_from_each_others_checkpoints(tmp_path: Path, thorough: bool):
    one = [(2, None, "eight", 3), (2, "two", "eight_from_two", 5)]
    two = [(1, None, "two", 3), (2, "eight", "two_from_eight", 5)]
    if thorough:
        one += [(1, None, "eight_by_data", 5), (1, "one", "eight_from_one", 5)]
        two += [(2, None, "two_by_model", 5), (1, "one", "two_from_one", 5)]
    started = [*start(8, 1, tmp_path, one), *start(4, 2, tmp_path, two)]
    try:
        run = {"batches": batches, "evaluator": lambda params: {}, "log_every": 1}
        train(retriever(), folder=tmp_path / "whole", steps=5, **run)
        train(retriever(), folder=tmp_path / "one", steps=3, **run)
        (tmp_path / "one" / "done").touch()
        for source in ("eight", "two"):
            while not (tmp_path / source / "done").exists():
                assert all(process.poll() is None for process in started), ended(started)
                time.sleep(0.1)
            shutil.copytree(tmp_path / source, tmp_path / f"one_from_{source}")
            train(retriever(), folder=tmp_path / f"one_from_{source}", steps=5, **run)
        _, first, second = ended(started)
    finally:
        for process in started:
            process.kill()
    whole = losses(tmp_path / "whole")
    assert len(whole) == 5
    for name in ("eight", "two"):
        assert losses(tmp_path / name) == pytest.approx(whole[:3], rel=1e-5)
    later = [name for _, _, name, steps in one + two if steps == 5]
    for name in (*later, "one_from_eight", "one_from_two"):
        assert losses(tmp_path / name) == pytest.approx(whole, rel=1e-5), name
    # Each reads its half of a batch; no device's rows are read where they do not lie.
    assert first == [[0, 1, 2, 3]] * len(two)
    assert second == [[4, 5, 6, 7]] * len(two)


def command(argv: list[str], devices: int) -> list[subprocess.Popen]:
    """`retrieval-jax train` in two processes."""
    address = free_address()
    started = []
    for process in range(2):
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(process),
        }
        full = [sys.executable, "-m", "retrieval_jax.main", "train", *argv, "--json"]
        started.append(
            subprocess.Popen(full, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return started


@pytest.mark.slow
@pytest.mark.parametrize("retriever", ["naive", "dual_encoder"])
def test_the_command_in_two_processes_trains_evaluates_and_is_preempted(
    work, arguments, cli, tmp_path: Path, retriever: str
):
    """SIGTERM to the second process alone ends both after the same step."""
    assert cli("docids", *arguments)[0] == 0
    settings = {"STEPS": 400, "train.eval_every": 200, "train.save_every": 1000, "train.log_every": 1}
    hits = "dev/Hits@10"
    if retriever == "dual_encoder":
        settings["DenseEvaluator.pool_size"] = 60
        hits = "dev_pool/Hits@10"

    def argv(model: Path) -> list[str]:
        settings["MODEL_DIR"] = str(model)
        given = [f"--gin.{name}={value!r}" for name, value in settings.items()]
        return [*arguments, f"--gin_file=runs/{retriever}.gin", *given]

    status, alone, _ = cli("train", *argv(tmp_path / "alone"))
    assert status == 0

    folder = tmp_path / "two"
    started = command(argv(folder), devices=2)
    path = folder / "learning_curve.jsonl"
    while not path.exists() or path.read_text().count("\n") < 20:
        assert all(process.poll() is None for process in started), [p.communicate() for p in started]
        time.sleep(0.02)
    started[1].terminate()
    told = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [143, 143], told
    (step,) = (int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    assert 20 <= step < 400
    for out, err in told:
        assert not printed(out)
        assert f"step {step} of 400 is saved" in err.splitlines()[-1]

    started = command([*argv(folder), "--gin.make_mesh.model_parallelism=2"], devices=2)
    told = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    (made,) = map(json.loads, printed(told[0][0]))
    assert not printed(told[1][0])
    assert made["step"] == 400
    assert losses(folder) == pytest.approx(losses(tmp_path / "alone"), rel=0.02)
    assert len(losses(folder)) == 400
    # Ten dev queries: one near-tie may fall the other way.
    assert made[hits] == pytest.approx(alone[hits], abs=0.11)
    assert made[hits] > 0.3


LAGGING = """
import os, sys, threading, time
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 1)
sys.path.insert(0, sys.argv[2])
import gin
import numpy as np
from tiny_training import batches, retriever, train
from tiny_training import SKIPS, poisoned, spiky
from retrieval_jax.core import locks
from retrieval_jax.core.errors import UserError
from retrieval_jax.checkpoints import checkpoints
from retrieval_jax.mesh import multihost
from retrieval_jax.checkpoints.checkpoints import Checkpoints

multihost.initialize("train")
folder, first = Path(sys.argv[1]), jax.process_index() == 0

def own(position):
    for batch in batches(position):
        yield {name: x[:4] if first else x[4:] for name, x in batch.items()}

if sys.argv[3] == "whole":
    checkpoints.in_background = lambda: True
run = {"batches": own, "folder": folder, "save_every": 2, "log_every": 1}
train(retriever(), evaluator=lambda params: {"MRR@10": 0.5}, steps=4, **run)
if not first:  # a listing from before the newest checkpoint: of step 2 alone
    whole = Checkpoints.steps
    Checkpoints.steps = lambda self: [step for step in whole(self) if step <= 2]
elif sys.argv[3] == "damaged":
    os.truncate(folder / "checkpoints/4/params/manifest.ocdbt", 10)
made = train(retriever(), evaluator=lambda params: {"MRR@10": 0.1}, steps=6, keep=1, **run)
assert made["step"] == 6, made
if sys.argv[3] == "whole":
    for name, value in SKIPS.items():
        gin.bind_parameter(name, value)

    def own_with_poison(position):
        for batch in poisoned(position, at=4, poison=1):
            yield {name: x[:4] if first else x[4:] for name, x in batch.items()}

    made = train(spiky(), own_with_poison, lambda params: {}, folder / "skips", steps=6, log_every=1)
    assert made["skipped"] == 1, made

def fails():
    raise ValueError("of no kind that is told")

try:
    multihost.on_process_0(fails)
except ValueError:
    assert first
except UserError as error:
    assert not first and "process 0 met an error" in str(error)
else:
    raise AssertionError

assert multihost.on_every_process(lambda: "done") == "done"
try:
    multihost.on_every_process(lambda: None if first else fails())
except ValueError:
    assert not first
except UserError as error:
    assert first and "process 1 met an error" in str(error)
else:
    raise AssertionError

shared, held = folder / "shared", threading.Event()

def other_command():
    with locks.lock(shared):
        held.set()
        time.sleep(1)
        shared.write_text("finished")

if first:
    threading.Thread(target=other_command).start()
    held.wait()
with multihost.lock(shared):
    assert shared.read_text() == "finished"  # no process goes on before process 0 has the lock
"""


@pytest.mark.parametrize("newest", ["whole", pytest.param("damaged", marks=pytest.mark.slow)])
def test_the_first_process_decides_where_to_go_on_whatever_the_others_see(tmp_path: Path, newest: str):
    address, started = free_address(), []
    for process in range(2):
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address}
        env |= {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(process)}
        argv = [sys.executable, "-c", LAGGING, str(tmp_path), str(Path(__file__).parents[1]), newest]
        started.append(subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True))
    try:
        told = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], told
    assert f"going on from step {4 if newest == 'whole' else 2}" in told[0]
    assert checksums.find_damage(tmp_path / "checkpoints" / "6") is None
    assert (tmp_path / "checkpoints" / "6" / checksums.NAME).exists()  # written in the background, or not
    # The best on dev, which the second process does not know of, stays beside the newest.
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == (
        {"4", "6"} if newest == "whole" else {"6"}
    )
    train(retriever(), batches, lambda params: {}, tmp_path / "alone", steps=6, save_every=2, log_every=1)
    assert losses(tmp_path)[-2:] == pytest.approx(losses(tmp_path / "alone")[-2:], rel=1e-5)
    if newest == "whole":  # where the fourth update was skipped
        for name, value in SKIPS.items():
            gin.bind_parameter(name, value)
        batches_of = functools.partial(poisoned, at=4, poison=1)
        train(spiky(), batches_of, lambda params: {}, tmp_path / "alone_skips", steps=6, log_every=1)
        assert losses(tmp_path / "skips") == pytest.approx(losses(tmp_path / "alone_skips"), rel=1e-5)
        assert len(losses(tmp_path / "skips")) == 5
