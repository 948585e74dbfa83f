"""One process at a time has the lock of a folder; the next one has it however that process ends."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from retrieval_jax.core.locks import lock

HOLD = """
import sys
from retrieval_jax.core.locks import lock

with lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("killed", [False, True], ids=["released", "killed"])
def test_a_lock_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str], killed: bool):
    folder, had = tmp_path / "deep" / "thing", threading.Event()
    command = [sys.executable, "-c", HOLD, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"

    def wait() -> None:
        with lock(folder):
            had.set()

    waiting, told = threading.Thread(target=wait), ""
    waiting.start()
    while not told:
        told = capsys.readouterr().err
        time.sleep(0.01)
    assert told == f"{folder}: another process is making it: waiting for that to end\n"
    assert not had.is_set()
    if killed:
        holder.kill()
    holder.communicate("\n")
    waiting.join()
    assert had.is_set()
    assert not [*folder.parent.iterdir()]  # neither the folder nor the lock's file
