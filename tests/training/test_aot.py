"""What compiling ahead of time says of memory, and the devices that it compiles for."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from retrieval_jax.mesh import partitioning
from retrieval_jax.mesh.hardware import GIB
from retrieval_jax.training.aot import MemoryReport, measure, needed
from retrieval_jax.training.program import Program

NO_LIBTPU = "libtpu, the TPU's compiler, is not installed: pip install -e '.[tpu]'"


def test_a_program_is_compiled_unless_its_arguments_alone_are_too_large(capsys):
    mesh = partitioning.all_devices()
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=partitioning.batch_sharding(mesh))
    program = Program(jax.jit(lambda x: x @ x), (x,), {"x": x})
    report = measure(program, 1e9, "here: compiling a product")
    assert report.argument_bytes == {"x": 4 * 64 * 64 // mesh.size}
    assert report.flops == 2 * 64**3
    assert report.fits
    assert report.peak >= 4 * 64 * 64 // mesh.size
    err = capsys.readouterr().err
    assert "here: compiling a product …" in err
    assert "here: fits: " in err
    small = measure(program, 100, "here: compiling a product")
    assert not small.compiled
    assert small.verdict.startswith("does not fit: x alone take")
    assert not capsys.readouterr().err


def test_the_verdict_compares_the_peak_with_the_memory():
    report = MemoryReport(4 * GIB, {"parameters": GIB}, 3 * GIB, flops=0, compiled=True)
    assert report.verdict == "fits: 3.00 of 4.00 GiB a chip, 1.00 to spare"
    large = dataclasses.replace(report, peak=6 * GIB)
    assert not large.fits
    assert large.verdict == "does not fit: 6.00 of 4.00 GiB a chip, 2.00 too many"


def test_what_the_compiler_says_is_read():
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 28.37G of 15.75G hbm. Exceeded …"
    assert needed(used, 0) == int(28.37 * GIB)
    temporaries = "Ran out of memory on HBM, the total memory required for HLO temporaries (512.00M) exceeds"
    assert needed(temporaries, GIB) == 1.5 * GIB
    assert needed("no number", 7) == 7


def test_every_topology_is_one_that_the_compiler_knows():
    pytest.importorskip("libtpu", reason=NO_LIBTPU)
    script = """
import math
from retrieval_jax.mesh.hardware import CHIPS, find_chip
from retrieval_jax.training.aot import devices_of, reach_compiler
reach_compiler()
for chip in CHIPS.values():
    for shape in chip.topologies:
        devices = devices_of(f"{chip.name}:{shape}")
        assert len(devices) == math.prod(map(int, shape.split("x"))), shape
        assert find_chip(devices[0].device_kind) == chip
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
