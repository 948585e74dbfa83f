"""Paths on local disks and in Google Cloud Storage (gs://BUCKET/…), used through the same functions.

A local path is a `pathlib.Path`. A remote one is an `etils.epath.Path`, which has the same interface and uses
TensorFlow's file layer. A bucket holds whole objects, each written at once: it cannot append to a file,
rename a folder at no cost, or map a file into memory. A file that must be mapped, or is read by a library
that does not know gs://, is first copied to this machine by `ensure_local`.

The environment variable RETRIEVAL_JAX_CACHE (default ~/.cache/retrieval_jax) names the folder of these
copies.
"""

import contextlib
import errno
import hashlib
import importlib.util
import os
import posixpath
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar

# For TensorFlow, which reads them when it is imported. It would remember for 5 seconds what there was: too
# long where another process changes it. And it would give each file that is read a buffer of 64 MiB.
os.environ.setdefault("GCS_STAT_CACHE_MAX_AGE", "0")
os.environ.setdefault("GCS_READ_CACHE_BLOCK_SIZE_MB", "16")
SCHEME = "gs://"
_CHUNK = 1 << 26  # bytes copied at once
_TOLD = 1 << 26  # from so many bytes on a copy shows a bar
_LONGEST_COPY = 24 * 60 * 60  # seconds
_AT_ONCE = 16  # requests; each spends most of its time waiting


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def as_path(path: str | os.PathLike) -> Path:
    """Converts a text to a path. `~` stands for the home folder.

    Args:
      path: a local path or a gs:// one.

    Returns:
      The path: pathlib's, or etils' for a remote one.

    Raises:
      UserError: it has a scheme other than gs://.
    """
    text = os.fspath(path)
    if not is_remote(text):
        if "://" in text:
            raise UserError(f"{text}: neither a local path nor one of {SCHEME}: name one of these")
        return Path(text).expanduser() if text == "~" or text.startswith("~/") else Path(text)
    from etils import epath

    return epath.Path(text)


def has_client() -> bool:
    """Returns whether Google's own client is installed, which Orbax needs to ask about buckets."""
    try:
        return importlib.util.find_spec("google.cloud.storage") is not None
    except ModuleNotFoundError:
        return False


def absolute(path: str | os.PathLike) -> Path:
    """Returns the path from the root, with links resolved; a remote path is absolute already."""
    return as_path(path) if is_remote(path) else as_path(path).resolve()


def require_local(path: str | os.PathLike, what: str) -> None:
    """Raises UserError if a path is remote.

    Args:
      path: the path.
      what: what lies there, for the message.
    """
    if is_remote(path):
        raise UserError(
            f"{path}: {what} must lie on a local disk: copy it there, only the rest may be remote"
        )


def relative(path: str | os.PathLike, folder: str | os.PathLike) -> str:
    """Returns the relative path from a folder to a path, for `join`.

    If only one of the two is remote, there is no relative path, and the result is the absolute path.
    """
    if is_remote(path) != is_remote(folder):
        return str(absolute(path))
    return os.path.relpath(path, folder)


def join(folder: str | os.PathLike, relative_path: str) -> Path:
    """Returns the path that a result of `relative` leads to from a folder, also if it has ".." in a bucket.

    Args:
      folder: the folder.
      relative_path: a relative or an absolute path.
    """
    folder = as_path(folder)
    if is_remote(relative_path) or (is_remote(folder) and os.path.isabs(relative_path)):
        return as_path(relative_path)
    if is_remote(folder):
        return as_path(SCHEME + posixpath.normpath(f"{str(folder).removeprefix(SCHEME)}/{relative_path}"))
    return folder / relative_path


def join_inside(folder: Path, name: object, where: str | os.PathLike) -> Path:
    """Returns the path of a file whose name another file says, and which must lie in a folder.

    Args:
      folder: the folder.
      name: the relative path that the file says.
      where: the file that says it, for the error.

    Raises:
      UserError: the name is absolute, remote or has a part "..".
    """
    text = str(name)
    if os.path.isabs(text) or is_remote(text) or ".." in text.split("/"):
        raise UserError(f"{where}: names {text!r}, which is not in its folder: use weights that you trust")
    return folder / text


def io_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that reading and writing raise: OSError, and TensorFlow's if it is loaded."""
    tf = sys.modules.get("tensorflow")
    return (OSError, tf.errors.OpError) if tf else (OSError,)


def error_text(error: Exception) -> str:
    """Returns the message of an exception of `io_errors` as one line."""
    text = getattr(error, "strerror", None) or getattr(error, "message", None) or str(error)
    return text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__


def check_bucket(path: Path) -> None:
    """Raises UserError if a path is remote and its bucket cannot be read."""
    try:
        _ = is_remote(path) and path.exists()
    except io_errors() as error:
        hint = "check its name, and your credentials (`gcloud auth application-default login`)"
        raise UserError(f"{path}: cannot be read ({error_text(error)}): {hint}") from None


def size(path: Path) -> int:
    """Returns the size of a file in bytes."""
    return path.stat().length if is_remote(path) else path.stat().st_size


def files(folder: Path) -> list[Path]:
    """Returns all files below a folder, sorted."""
    if is_remote(folder):
        return sorted(root / name for root, _, names in folder.walk() for name in names)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def remove(folder: Path) -> None:
    """Removes a folder and everything in it, if it exists."""
    if is_remote(folder):
        folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def copy(source: Path, target: Path, advance: Callable[[int], None] | None = None) -> None:
    """Copies a file; both paths may be local or remote.

    Args:
      source: the file to read.
      target: the file to write, in a folder that exists.
      advance: called with the number of bytes after each chunk.
    """
    with source.open("rb") as read, target.open("wb") as write:
        write.write(b"")  # an empty file is one, too: in a bucket only what is written to is made
        while chunk := read.read(_CHUNK):
            write.write(chunk)
            if advance:
                advance(len(chunk))


def link(source: Path, target: Path) -> None:
    """Makes the same local file available at another place, without a copy if the disk can.

    Neither file may be changed afterwards.
    """
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def copy_files(source: Path, target: Path, names: Sequence[str], what: str) -> None:
    """Copies files from one folder to another, several at once. Large copies show a progress bar.

    Args:
      source: the folder to copy from.
      target: the folder to copy to, local or remote.
      names: paths of the files below `source`.
      what: the name of the work on the progress bar.
    """
    sizes = [size(source / name) for name in names]

    def all_of_them(advance: Callable[[int], None] | None) -> None:
        def one(name: str) -> None:
            if not is_remote(target):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
            copy(source / name, target / name, advance)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(one, names))

    if sum(sizes) < _TOLD:
        return all_of_them(None)
    with bar(f"{what} (bytes)", sum(sizes)) as advance:
        all_of_them(advance)


def ensure_local(path: str | os.PathLike) -> Path:
    """Returns a local copy of a remote file or folder; a local path is returned as it is.

    The copy is kept, and used again while names, sizes and times of the remote files stay the same; after a
    change, it is replaced.

    Args:
      path: a file or folder, local or remote.

    Returns:
      The local path.

    Raises:
      FileNotFoundError: nothing is at a remote path.
      UserError: the copy failed.
    """
    path = as_path(path)
    if not is_remote(path):
        return path
    try:
        parent, state = _state(path)
        home = cache_folder() / _digest(str(path))
        kept = home / _digest(repr(state)) / path.name
        if not kept.exists():
            home.mkdir(parents=True, exist_ok=True)
            replaced = [folder for folder in home.iterdir() if _is_superseded(folder)]
            tmp = Path(tempfile.mkdtemp(dir=home, prefix="."))
            copy_files(parent, tmp, [name for name, *_ in state], f"fetch {path.name}")
            if _state(path)[1] != state:
                raise UserError(f"{path}: was changed while it was copied: the same command again")
            with contextlib.suppress(OSError):  # another process may have been as quick
                tmp.rename(kept.parent)
            for folder in (tmp, *replaced):
                remove(folder)
    except FileNotFoundError:
        raise
    except io_errors() as error:
        raise UserError(
            f"{path}: cannot be copied to {cache_folder()} ({error_text(error)}): try again"
        ) from None
    return kept


def _is_superseded(copy: Path) -> bool:
    """Returns whether a new copy replaces this one: it is finished, or a process began it and was killed.

    A process that still copies after _LONGEST_COPY counts as killed.
    """
    with contextlib.suppress(FileNotFoundError):
        return not copy.name.startswith(".") or time.time() - copy.stat().st_mtime > _LONGEST_COPY
    return False


def cache_folder() -> Path:
    """Returns the folder of the local copies of remote files."""
    given = os.environ.get("RETRIEVAL_JAX_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(home) / "retrieval_jax"


def _state(path: Path) -> tuple[Path, list[tuple[str, int, int]]]:
    """Returns (the parent of a remote path, (name from there, bytes, mtime in ns) of each of its files)."""
    import tensorflow as tf

    there = files(path) if path.is_dir() else [path]
    parent = path.parent

    def one(file: Path) -> tuple[str, int, int]:
        try:
            stat = tf.io.gfile.stat(str(file))
        except tf.errors.NotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from None
        return str(file.relative_to(parent)), stat.length, stat.mtime_nsec

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return parent, list(pool.map(one, there))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
