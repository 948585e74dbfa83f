"""A worker process whose death is an exception, for a library that may end the process in which it runs."""

import contextlib
import functools
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
    """The process ended instead of answering. The message says how."""


class WorkerProcess:
    """Calls functions in a process of its own, one after another. It is a context manager.

    The process starts at the first call, and again at the next call after a death, without any state of this
    process. What it prints goes to stderr.

    Args:
      prepare: the function that a new process calls first.
      *args: its arguments.
    """

    def __init__(self, prepare: Callable, *args):
        self._first = (prepare, args)
        self._process = None

    def __call__(self, function: Callable, *args, **kwargs) -> object:
        """Calls a function in the process.

        Args:
          function: a function of an installed module.
          *args: its arguments, which must be picklable, as must be its result.
          **kwargs: its keyword arguments, likewise.

        Returns:
          What the function returns.

        Raises:
          WorkerDied: the process ended.
          UserError: the function raised it.
          RuntimeError: the function raised another error; the message is its traceback.
        """
        if self._process is None:
            self._begin()
            self._ask(*self._first)
        return self._ask(functools.partial(function, **kwargs), args)

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
    """Answers calls until the other end of the pipe is closed, which a death does, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: the parent tells of it
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(_answer_to(*pipe.recv()))


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent was killed, even if it is compiling for minutes."""
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
