"""Files and folders that are complete or absent: they are written elsewhere and renamed when finished.

Nothing is renamed in a bucket (gs://…, see `paths`). There a file is an object, which is complete or absent
by itself, and a folder is made on this machine and then copied, its manifest last: a folder that a kill left
incomplete has none.

On a disk, one process at a time makes a folder NAME: it holds its lock (`.NAME.lock`, see locks.py), fills
`.NAME.making`, and moves the earlier folder to `.NAME.old` until the new one is in its place. No other file
is touched.

A finished folder holds a `manifest.json`: the version of its format, the recipe that it was made by (its
inputs and settings), and facts about its content. A folder is not made again for the same recipe, and is
replaced for another one.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.locks import lock

T = TypeVar("T")
MANIFEST = "manifest.json"
FORMAT = 1  # of finished folders; another one is refused, so a change of what files mean raises it
EDITABLE = ("README.md", ".gitattributes")  # a model card, and what a hub puts beside it
DOWNLOADED = (".cache", ".git")  # folders that `hf download` and `git clone` leave in what they fetch


def atomic_write(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file completely or not at all, and makes missing folders. A path in `.gz` is compressed.

    Args:
      path: the file, local or remote.
      data: its content.

    Raises:
      UserError: it cannot be written.
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
    """Writes a value to a JSON file, completely or not at all. Raises UserError if it cannot be written."""
    atomic_write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | os.PathLike, hint: str, kind: type[T] = dict) -> T:
    """Reads the JSON object (or list) in a file.

    Args:
      path: the file, local or remote.
      hint: the remedy in the message if the file is missing or damaged.
      kind: what the file holds, dict or list.

    Raises:
      UserError: the file is missing, unreadable or damaged, or holds something else.
    """
    try:
        found = json.loads(paths.as_path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file: {hint}") from None
    except paths.io_errors() as error:
        raise UserError(f"{path}: cannot be read ({paths.error_text(error)}): check the path") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): {hint}") from None
    if not isinstance(found, kind):
        raise UserError(f"{path}: holds no JSON {'object' if kind is dict else 'list'}: {hint}")
    return found


def write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    """Writes the manifest of a folder.

    Args:
      folder: the folder.
      manifest: its content, without the version of its format, which is added.
    """
    write_json(folder / MANIFEST, {"format": FORMAT, **manifest})


def read_manifest(folder: str | os.PathLike, verb: str) -> dict:
    """Reads the manifest of a finished folder.

    Args:
      folder: the folder.
      verb: the verb that makes such folders, for the hint in messages.

    Returns:
      What the folder's `make` returned (see `build_once`), and the recipe as "recipe".

    Raises:
      UserError: there is no finished folder, its manifest is damaged, or another version of this package made
        it.
    """
    if not finished(folder):
        raise UserError(f"{folder}: nothing finished here: make it with `retrieval-jax {verb}`")
    return _read_manifest(paths.as_path(folder), f"delete the folder, then `retrieval-jax {verb}`")


def _read_manifest(folder: Path, hint: str = "delete the folder, then the same command again") -> dict:
    manifest = read_json(folder / MANIFEST, hint)
    if not isinstance(manifest.get("recipe", {}), dict):
        raise UserError(f"{folder / MANIFEST}: is no manifest: {hint}")
    version = manifest.pop("format", None)
    if version is None:
        raise UserError(f"{folder}: was made by an earlier version of retrieval_jax: {hint}")
    if version != FORMAT:
        raise UserError(f"{folder}: has format {version}, and this retrieval_jax reads {FORMAT}: {hint}")
    return manifest


def finished(folder: str | os.PathLike) -> bool:
    """Returns whether a finished folder is there. One that a kill left half replaced is first restored."""
    folder = paths.as_path(folder)
    if (folder / MANIFEST).is_file():
        return True
    if paths.is_remote(folder) or not (_old(folder) / MANIFEST).is_file():
        return False
    with contextlib.suppress(OSError, UserError), lock(folder):
        _move_back(folder)
    return (folder / MANIFEST).is_file()


def finished_folders(parent: Path, pattern: str = "*") -> list[Path]:
    """Returns the finished folders in a folder whose names fit a pattern, by name.

    Those with a dot before their names are being made or replaced, and are none of them.
    """
    found = (path.parent for path in parent.glob(f"{pattern}/{MANIFEST}"))
    return sorted(folder for folder in found if not folder.name.startswith("."))


def is_up_to_date(folder: str | os.PathLike, recipe: dict) -> bool:
    """Returns whether the folder is finished and was made by this recipe.

    Raises:
      UserError: its manifest is damaged, or another version of this package made it.
    """
    if not finished(folder):
        return False
    return _read_manifest(paths.as_path(folder))["recipe"] == json.loads(json.dumps(recipe))


def build_once(folder: str | os.PathLike, recipe: dict, make: Callable[[Path], dict]) -> dict:
    """Makes a folder, unless it was already made by the same recipe.

    A kill leaves at most a hidden folder (in a bucket, files without a manifest), which the next call
    removes. If several processes make the same folder at once, the others wait and then find it finished.

    Args:
      folder: the folder, local or remote.
      recipe: everything that its content depends on, as JSON.
      make: a function that writes the content into the empty local folder that it is given, and returns facts
        for the manifest.

    Returns:
      The manifest: the recipe as "recipe", and the facts.

    Raises:
      UserError: the folder cannot be written, holds files that `build_once` did not make (they are never
        replaced), or was made by another version of this package.
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
    """Returns the manifest of a folder whose lock is held, if this recipe made it."""
    if not paths.is_remote(folder):
        _move_back(folder)
    path = folder / MANIFEST
    manifest = _read_manifest(folder) if path.is_file() else None
    return manifest if manifest and manifest["recipe"] == recipe else None


def _old(folder: Path) -> Path:
    """Returns where a finished folder lies while another takes its place."""
    return folder.with_name(f".{folder.name}.old")


def _remove_old(folder: Path) -> None:
    """Removes what another folder replaced: its manifest first, or a kill leaves half that looks whole."""
    with contextlib.suppress(FileNotFoundError):
        (_old(folder) / MANIFEST).unlink()
    paths.remove(_old(folder))


def _move_back(folder: Path) -> None:
    """Undoes the first of the two renames if a kill came before the second."""
    if not folder.exists() and (_old(folder) / MANIFEST).is_file():
        _old(folder).rename(folder)


def _build_local(folder: Path, tmp: Path, recipe: dict, make: Callable[[Path], dict]) -> dict:
    """Does the work of `build_once` on a disk, in the process that has the lock."""
    paths.remove(tmp)
    _remove_old(folder)
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
        _remove_old(folder)
    finally:
        paths.remove(tmp)
    return manifest


def _build_remote(folder: Path, mark: Path, recipe: dict, make: Callable[[Path], dict]) -> dict:
    """Does the work of `build_once` in a bucket. The mark tells files without a manifest after a kill."""
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
    """Writes a dataclass whose fields are NumPy arrays, or None, to a safetensors file.

    Args:
      path: the file, in a folder that `build_once` makes.
      holder: the dataclass.
    """
    from safetensors.numpy import save_file

    fields = {field.name: getattr(holder, field.name) for field in dataclasses.fields(holder)}
    save_file({name: array for name, array in fields.items() if array is not None}, path)


def read_arrays(path: Path, holder: type[T], hint: str) -> T:
    """Reads a file that `write_arrays` wrote.

    Args:
      path: the file, local or remote.
      holder: the dataclass's type.
      hint: the remedy in the message if the file is damaged.

    Returns:
      The dataclass.

    Raises:
      UserError: the file cannot be read, or holds other fields.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return holder(**load_file(paths.ensure_local(path)))
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): {hint}") from None


def digest(parts: Iterable[str | bytes]) -> str:
    """Returns a short SHA-256 (16 hexadecimal digits) of texts or bytes and their lengths."""
    sha = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()[:16]


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file's content, as hexadecimal digits."""
    with paths.ensure_local(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_checksums(folder: Path) -> dict[str, str]:
    """Returns {path below the folder: SHA-256} of the files; without manifest, EDITABLE and DOWNLOADED."""
    below = {path.relative_to(folder): path for path in paths.files(folder)}
    names = [p for p in below if str(p) not in (MANIFEST, *EDITABLE) and p.parts[0] not in DOWNLOADED]
    with ThreadPoolExecutor() as pool:
        sums = pool.map(checksum, (below[name] for name in names))
        return dict(zip(map(str, names), sums, strict=True))


def check_files(folder: Path, manifest: dict) -> None:
    """Raises UserError unless the folder has exactly the files that its manifest lists, all unchanged.

    Args:
      folder: the folder.
      manifest: its manifest, with "files" (see `file_checksums`) and "manifest_digest".
    """
    there = file_checksums(folder)
    for name in sorted(there.keys() | manifest["files"].keys()):
        was, now = manifest["files"].get(name), there.get(name)
        if was != now:
            what = "is missing" if now is None else "was added" if was is None else "was changed"
            raise UserError(f"{folder}: {name} {what} after it was exported: copy or export it again")
    if manifest.get("manifest_digest") != manifest_digest(manifest):
        raise UserError(f"{folder}: {MANIFEST} was changed after it was exported: copy or export it again")


def manifest_digest(manifest: dict) -> str:
    """Returns a digest of a manifest, without its entry "manifest_digest"."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_digest"}
    return digest([json.dumps(rest, sort_keys=True)])


def hash_fraction(text: str) -> float:
    """Returns a number in [0, 1) that depends on the text alone, for splits that never change."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64
