"""Paths on local disks and in Google Cloud Storage (gs://BUCKET/…), by the same calls.

A local path is pathlib's. A remote one is etils', which has pathlib's interface and asks TensorFlow's file
layer. A bucket holds whole objects, written at once: none is appended to, renamed at no cost, or mapped into
memory. What must be mapped, or is read by a library that knows no gs://, is first copied here by
`ensure_local`.

RETRIEVAL_JAX_CACHE (else ~/.cache/retrieval_jax) is where such copies lie.
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
_AT_ONCE = 16  # requests; each spends most of its time waiting


def is_remote(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith(SCHEME)


def as_path(path: str | os.PathLike) -> Path:
    """The path that a text names. Raises UserError for a scheme other than gs://."""
    text = os.fspath(path)
    if not is_remote(text):
        if "://" in text:
            raise UserError(f"{text}: neither a local path nor one of {SCHEME}: name one of these")
        return Path(text).expanduser() if text == "~" or text.startswith("~/") else Path(text)
    from etils import epath

    return epath.Path(text)


def has_client() -> bool:
    """Whether Google's own client is installed, which Orbax asks about buckets."""
    try:
        return importlib.util.find_spec("google.cloud.storage") is not None
    except ModuleNotFoundError:
        return False


def absolute(path: str | os.PathLike) -> Path:
    """The path from the root, without links; a remote one is whole as it is."""
    return as_path(path) if is_remote(path) else as_path(path).resolve()


def require_local(path: str | os.PathLike, what: str) -> None:
    """Raises UserError for a remote path of something that is only read from a disk."""
    if is_remote(path):
        raise UserError(
            f"{path}: {what} must lie on a local disk: copy it there, only the rest may be remote"
        )


def relative(path: str | os.PathLike, folder: str | os.PathLike) -> str:
    """The way from a folder to a path, for `join`; the whole path where only one of the two is remote."""
    if is_remote(path) != is_remote(folder):
        return str(absolute(path))
    return os.path.relpath(path, folder)


def join(folder: str | os.PathLike, way: str) -> Path:
    """Where `way` leads from a folder. Buckets know no "..": it is worked out here."""
    folder = as_path(folder)
    if is_remote(way) or (is_remote(folder) and os.path.isabs(way)):
        return as_path(way)
    if is_remote(folder):
        return as_path(SCHEME + posixpath.normpath(f"{str(folder).removeprefix(SCHEME)}/{way}"))
    return folder / way


def io_errors() -> tuple[type[Exception], ...]:
    """What reading and writing may raise: OSError, and TensorFlow's own where it is loaded."""
    tf = sys.modules.get("tensorflow")
    return (OSError, tf.errors.OpError) if tf else (OSError,)


def error_text(error: Exception) -> str:
    """What an error of `io_errors` says, in a line."""
    text = getattr(error, "strerror", None) or getattr(error, "message", None) or str(error)
    return text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__


def check_bucket(path: Path) -> None:
    """Raises UserError where a path is remote, and its bucket cannot be read."""
    try:
        _ = is_remote(path) and path.exists()
    except io_errors() as error:
        hint = "check its name, and your credentials (`gcloud auth application-default login`)"
        raise UserError(f"{path}: cannot be read ({error_text(error)}): {hint}") from None


def size(path: Path) -> int:
    """Bytes of a file."""
    return path.stat().length if is_remote(path) else path.stat().st_size


def files(folder: Path) -> list[Path]:
    """All files below a folder, sorted."""
    if is_remote(folder):
        return sorted(root / name for root, _, names in folder.walk() for name in names)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def remove(folder: Path) -> None:
    """Removes a folder and all in it, if it is there."""
    if is_remote(folder):
        folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def copy(source: Path, target: Path, advance: Callable[[int], None] | None = None) -> None:
    """Copies a file from anywhere to anywhere. `advance` is told how many more bytes are there."""
    with source.open("rb") as read, target.open("wb") as write:
        write.write(b"")  # an empty file is one, too: in a bucket only what is written to is made
        while chunk := read.read(_CHUNK):
            write.write(chunk)
            if advance:
                advance(len(chunk))


def copy_files(source: Path, target: Path, names: Sequence[str], what: str) -> None:
    """Copies files from below one folder to below another, several at once."""
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
    """A local path as it is; of a remote file or folder a copy on this machine, made unless it is there.

    A copy is known by its files' names, sizes and times, so a change is seen; the earlier copy then goes.
    Raises FileNotFoundError where there is nothing, UserError where it cannot be copied.
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
            earlier = [folder for folder in home.iterdir() if not folder.name.startswith(".")]
            tmp = Path(tempfile.mkdtemp(dir=home, prefix="."))
            copy_files(parent, tmp, [name for name, *_ in state], f"fetch {path.name}")
            if _state(path)[1] != state:
                raise UserError(f"{path}: was changed while it was copied: the same command again")
            with contextlib.suppress(OSError):  # another process may have been as quick
                tmp.rename(kept.parent)
            for folder in (tmp, *earlier):
                remove(folder)
    except FileNotFoundError:
        raise
    except io_errors() as error:
        raise UserError(
            f"{path}: cannot be copied to {cache_folder()} ({error_text(error)}): try again"
        ) from None
    return kept


def cache_folder() -> Path:
    """Where copies of remote files lie."""
    given = os.environ.get("RETRIEVAL_JAX_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(home) / "retrieval_jax"


def _state(path: Path) -> tuple[Path, list[tuple[str, int, int]]]:
    """(the folder that a remote file or folder lies in, its files: name from there, bytes, nanoseconds)."""
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
