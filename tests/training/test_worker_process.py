"""A process whose death is an exception: real ones, that really die."""

import math
import os
import signal
import subprocess
import sys

import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.mesh.partitioning import make_mesh
from retrieval_jax.training.worker_process import WorkerDied, WorkerProcess


def test_it_answers_dies_and_begins_anew():
    with WorkerProcess(sys.setrecursionlimit, 1234) as child:
        first = child(os.getpid)
        assert first not in (None, os.getpid())
        assert child(math.gcd, 12, 18) == 6
        assert child(sys.getrecursionlimit) == 1234
        for number, name in ((signal.SIGSEGV, "SIGSEGV"), (signal.SIGKILL, "SIGKILL")):
            with pytest.raises(WorkerDied, match=f"signal {name}"):
                child(signal.raise_signal, number)
        with pytest.raises(WorkerDied, match="status 3"):
            child(os._exit, 3)
        assert child(os.getpid) != first
        assert child(sys.getrecursionlimit) == 1234
        with pytest.raises(UserError, match=r"^make_mesh.model_parallelism: 3 does not divide [^\n]*$"):
            child(make_mesh, 3, ["one", "other"])
        with pytest.raises(RuntimeError, match="ValueError"):
            child(math.sqrt, -1)


PARENT = """
import os, time
from retrieval_jax.training.worker_process import WorkerProcess
with WorkerProcess(os.getpid) as child:
    print(child(os.getpid), flush=True)
    child(time.sleep, 600)
"""


def test_it_ends_with_a_parent_that_is_killed_while_it_works():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert int(parent.stdout.readline()) != parent.pid
    parent.kill()
    parent.communicate(timeout=60)  # to the end of stderr, which the child has too
