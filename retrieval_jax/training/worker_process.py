"""A process whose death is an exception here, for a library that may end the process it runs in."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe

from retrieval_jax.core.errors import UserError


class WorkerDied(Exception):
    """The process ended instead of answering; how, in a few words."""


class WorkerProcess:
    """Calls functions in a process of its own, one after another; a context manager.

    The process begins anew, with nothing of this one's state, at the first call and at the next after a
    death. What it says goes to stderr.

    Args:
      prepare, args: a function that it calls first, and its arguments.
    """

    def __init__(self, prepare: Callable, *args):
        self._first = (prepare, args)
        self._process = None

    def __call__(self, function: Callable, *args) -> object:
        """What a function of an installed module gives there; all of it must be picklable.

        Raises WorkerDied, the UserError that it raises, or RuntimeError with the traceback of any other
        error.
        """
        if self._process is None:
            self._begin()
            self._ask(*self._first)
        return self._ask(function, args)

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def _begin(self) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=2)
        theirs.close()

    def _ask(self, function: Callable, args: tuple) -> object:
        try:
            self._pipe.send((function, args))
            given, error = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = self._process.wait()
            self._end()
            raise WorkerDied(
                f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            ) from None
        if error is not None:
            raise error
        return given

    def _end(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.kill()  # of SIGTERM libraries may tell at length
            self._process.wait()
            self._process = None


def _answer(pipe: Connection) -> None:
    """What the process does until the other end of the pipe is closed, be it by a death."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: the parent tells of it
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(_answer_to(*pipe.recv()))


def _end_with(parent: int) -> None:
    """Ends this process soon after a killed parent, though it be compiling for minutes."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _answer_to(function: Callable, args: tuple) -> tuple[object, Exception | None]:
    try:
        return function(*args), None
    except UserError as error:  # as gin makes others of it, which cannot be pickled
        return None, UserError(str(error).splitlines()[0])
    except Exception:
        return None, RuntimeError(traceback.format_exc())


if __name__ == "__main__":
    _answer(Connection(int(sys.argv[1])))
