"""What lies on disk is whole or absent: files and folders are written aside and renamed when finished.

In a bucket (gs://…, see paths.py) nothing is renamed. A file is an object there, and so whole or absent by
itself. A folder is made on this machine, then copied, its manifest last: what a kill leaves has none.

On a disk one process at a time makes a folder NAME: it holds a lock on `.NAME.lock`, fills `.NAME.making`,
and moves the earlier folder to `.NAME.old` until the new one is in its place. No other file is touched.

A finished folder holds a `manifest.json`: the recipe it was made by (its inputs and settings) and what it
contains. The same recipe again is not made again; another recipe makes the folder anew.
"""

import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log

T = TypeVar("T")
MANIFEST = "manifest.json"
FORMAT = 1  # of finished folders; another one is refused, so a change of what files mean raises it


def atomic_write(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file whole or not at all; makes missing folders; compresses where the path ends in `.gz`.

    Raises UserError where it cannot be written.
    """
    path = paths.as_path(path)
    data = gzip.compress(data) if path.suffix == ".gz" else data
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if paths.is_remote(path):
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp.write_bytes(data)
        os.replace(tmp, path)
    except paths.io_errors() as error:
        if not paths.is_remote(path):
            with contextlib.suppress(OSError):
                tmp.unlink()
        raise UserError(
            f"{path}: cannot be written ({paths.error_text(error)}): choose another path"
        ) from None


def write_json(path: str | os.PathLike, value: object) -> None:
    atomic_write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | os.PathLike, hint: str) -> dict:
    """The JSON object in a file; UserError (with the hint) where it is missing or broken."""
    try:
        return json.loads(paths.as_path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file: {hint}") from None
    except paths.io_errors() as error:
        raise UserError(f"{path}: cannot be read ({paths.error_text(error)}): check the path") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): {hint}") from None


def write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    """Writes the manifest of a folder, with the version of its format."""
    write_json(folder / MANIFEST, {"format": FORMAT, **manifest})


def read_manifest(folder: str | os.PathLike, verb: str) -> dict:
    """Reads the manifest of a finished folder.

    Args:
      folder: the folder.
      verb: the verb that makes such folders, for the hint of an error.

    Returns:
      what the folder's `make` returned, and its "recipe".

    Raises:
      UserError: there is no finished folder, its manifest is damaged, or another version of this package made
        it.
    """
    if not finished(folder):
        raise UserError(f"{folder}: nothing finished here: make it with `retrieval-jax {verb}`")
    return _read_manifest(paths.as_path(folder), f"delete the folder, then `retrieval-jax {verb}`")


def _read_manifest(folder: Path, hint: str = "delete the folder, then the same command again") -> dict:
    manifest = read_json(folder / MANIFEST, hint)
    version = manifest.pop("format", None)
    if version is None:
        raise UserError(f"{folder}: was made by an earlier version of retrieval_jax: {hint}")
    if version != FORMAT:
        raise UserError(f"{folder}: has format {version}, and this retrieval_jax reads {FORMAT}: {hint}")
    return manifest


def finished(folder: str | os.PathLike) -> bool:
    """Whether a finished folder lies there. One that a kill left moved aside is first moved back."""
    folder = paths.as_path(folder)
    if (folder / MANIFEST).is_file():
        return True
    if paths.is_remote(folder) or not (_old(folder) / MANIFEST).is_file():
        return False
    with contextlib.suppress(OSError, UserError), lock(folder):
        _move_back(folder)
    return (folder / MANIFEST).is_file()


def is_up_to_date(folder: str | os.PathLike, recipe: dict) -> bool:
    """Whether the folder is finished and was made by that recipe."""
    if not finished(folder):
        return False
    return _read_manifest(paths.as_path(folder))["recipe"] == json.loads(json.dumps(recipe))


@contextlib.contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
    """Holds the lock of a folder; where another process has it, says so once and waits.

    The system releases it when its process ends, however it ends. In a bucket, and on a file system
    without locks, there is none. A thread must not take the same lock twice.

    Raises UserError where the lock's file cannot be written.
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
    """An open descriptor of the file at `path` that has its lock."""
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


def build_once(folder: str | os.PathLike, recipe: dict, make: Callable[[Path], dict]) -> dict:
    """Gives the manifest of `folder`, which `make` fills unless it already holds the same recipe's work.

    `make` writes into the (empty, local) folder that it is handed and returns what the manifest shall say.
    A kill leaves at most a hidden folder (in a bucket, files without a manifest), which the next call
    removes. Of processes that build the same folder at once the second waits, then finds it finished. A
    folder that no `build_once` made is never overwritten: UserError.
    """
    folder = paths.as_path(folder)
    recipe = json.loads(json.dumps(recipe))
    if is_up_to_date(folder, recipe):
        return _read_manifest(folder)
    with lock(folder):
        if same := _same(folder, recipe):
            return same
        tmp = folder.with_name(f".{folder.name}.making")
        remote = paths.is_remote(folder)
        ours = (folder / MANIFEST).is_file() or (remote and tmp.exists())
        if folder.exists() and not ours:
            raise UserError(f"{folder}: holds files of something else: name another folder, or delete it")
        return (_build_remote if remote else _build_local)(folder, tmp, recipe, make)


def _same(folder: Path, recipe: dict) -> dict | None:
    """The manifest of a folder whose lock is held, where that recipe made it."""
    if not paths.is_remote(folder):
        _move_back(folder)
    path = folder / MANIFEST
    manifest = _read_manifest(folder) if path.is_file() else None
    return manifest if manifest and manifest["recipe"] == recipe else None


def _old(folder: Path) -> Path:
    """Where a finished folder lies while another takes its place."""
    return folder.with_name(f".{folder.name}.old")


def _move_back(folder: Path) -> None:
    """Undoes the first of the two renames, where a kill came before the second."""
    if not folder.exists() and (_old(folder) / MANIFEST).is_file():
        _old(folder).rename(folder)


def _build_local(folder: Path, tmp: Path, recipe: dict, make: Callable[[Path], dict]) -> dict:
    """`build_once` on a disk, by the process that has the lock."""
    paths.remove(tmp)
    paths.remove(_old(folder))
    try:
        tmp.mkdir()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}): check the path") from None
    try:
        manifest = {"recipe": recipe, **json.loads(json.dumps(make(tmp)))}
        write_manifest(tmp, manifest)
        if folder.exists():
            folder.rename(_old(folder))
        try:
            tmp.rename(folder)
        except OSError as error:
            _move_back(folder)
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}): the same command again"
            ) from None
        paths.remove(_old(folder))
    finally:
        paths.remove(tmp)
    return manifest


def _build_remote(folder: Path, mark: Path, recipe: dict, make: Callable[[Path], dict]) -> dict:
    """`build_once` in a bucket. The mark tells the next call that files without a manifest are a kill's."""
    atomic_write(mark, b"what lies beside is being made\n")  # fails before the work, if it must
    with tempfile.TemporaryDirectory(prefix="retrieval_jax.") as scratch:
        tmp = Path(scratch) / folder.name
        tmp.mkdir()
        try:
            manifest = {"recipe": recipe, **json.loads(json.dumps(make(tmp)))}
        except BaseException:
            if not folder.exists() or (folder / MANIFEST).is_file():
                mark.unlink(missing_ok=True)
            raise
        try:
            (folder / MANIFEST).unlink(missing_ok=True)
            paths.remove(folder)
            names = [str(path.relative_to(tmp)) for path in paths.files(tmp)]
            paths.copy_files(tmp, folder, names, f"send {folder.name}")
        except paths.io_errors() as error:
            raise UserError(
                f"{folder}: cannot be written ({paths.error_text(error)}): check the path"
            ) from None
        write_manifest(folder, manifest)
        mark.unlink(missing_ok=True)
    return manifest


def write_arrays(path: Path, holder: object) -> None:
    """Writes a dataclass whose fields are NumPy arrays to a safetensors file, for `build_once`'s folders."""
    from safetensors.numpy import save_file

    save_file({field.name: getattr(holder, field.name) for field in dataclasses.fields(holder)}, path)


def read_arrays(path: Path, holder: type[T], hint: str) -> T:
    """The dataclass that `write_arrays` wrote; UserError (with the hint) where the file does not hold it."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return holder(**load_file(paths.ensure_local(path)))
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): {hint}") from None


def digest(parts: Iterable[str | bytes]) -> str:
    """A short SHA-256 of a sequence of texts or bytes, each with its length."""
    sha = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()[:16]


def checksum(path: Path) -> str:
    """The SHA-256 of a file's contents."""
    with paths.ensure_local(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_checksums(folder: Path) -> dict[str, str]:
    """{path below it: SHA-256} of all files but the manifest, to be kept in that."""
    files = [path for path in paths.files(folder) if path != folder / MANIFEST]
    with ThreadPoolExecutor() as pool:
        names = (str(p.relative_to(folder)) for p in files)
        return dict(zip(names, pool.map(checksum, files), strict=True))


def check_files(folder: Path, manifest: dict) -> None:
    """Raises UserError unless the files are those whose checksums the manifest has, and no others."""
    there = file_checksums(folder)
    for name in sorted(there.keys() | manifest["files"].keys()):
        was, now = manifest["files"].get(name), there.get(name)
        if was != now:
            what = "is missing" if now is None else "was added" if was is None else "was changed"
            raise UserError(f"{folder}: {name} {what} after it was exported: copy or export it again")
    if manifest.get("manifest_digest") != manifest_digest(manifest):
        raise UserError(f"{folder}: {MANIFEST} was changed after it was exported: copy or export it again")


def manifest_digest(manifest: dict) -> str:
    """A digest of all else that a manifest says."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_digest"}
    return digest([json.dumps(rest, sort_keys=True)])


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: for splits that never move."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64
