"""The lock that a process holds on a folder while it makes it."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log


@contextlib.contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
    """Holds the lock of a folder. If another process has it, says so once and waits.

    The operating system releases the lock when the process ends, however it ends. There are no locks in a
    bucket, and on a file system without them. A thread must not take the same lock twice.

    Args:
      folder: the folder, which need not exist.

    Raises:
      UserError: the lock's file cannot be written.
    """
    folder = paths.as_path(folder)
    if paths.is_remote(folder):
        yield
        return
    path = folder.with_name(f".{folder.name}.lock")
    descriptor = _locked(path, folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        with contextlib.suppress(OSError):  # a forked child that still has the file must not keep the lock
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _locked(path: Path, folder: Path) -> int:
    """Returns an open descriptor of the file at `path`, with its lock."""
    told = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}): check the path") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    log(f"{folder}: another process is making it: waiting for that to end")
                    told = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # this file system has no locks
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The holder before removed the file: who waited for that one has the lock of nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)
