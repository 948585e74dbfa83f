"""What lies on disk is whole or absent: files and folders are written aside and renamed when finished.

A finished folder holds a `manifest.json`: the recipe it was made by (its inputs and settings) and what it
contains. The same recipe again is not made again; another recipe makes the folder anew.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from retrieval_jax.errors import UserError

T = TypeVar("T")
MANIFEST = "manifest.json"


def write_aside(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file whole or not at all; makes missing folders; compresses where the path ends in `.gz`.

    Raises UserError where it cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}): choose another path") from None


def write_json(path: str | os.PathLike, value: object) -> None:
    write_aside(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | os.PathLike, mend: str) -> dict:
    """The JSON object in a file; UserError (with the mend) where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file: {mend}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): {mend}") from None


def read_manifest(folder: str | os.PathLike, verb: str) -> dict:
    """The manifest of a finished folder. `verb` is the one that makes such folders, for the mend."""
    if not (Path(folder) / MANIFEST).is_file():
        raise UserError(f"{folder}: nothing finished here: make it with `retrieval-jax {verb}`")
    return read_json(Path(folder) / MANIFEST, f"delete the folder, then `retrieval-jax {verb}`")


def holds(folder: str | os.PathLike, recipe: dict) -> bool:
    """Whether the folder is finished and was made by that recipe."""
    path = Path(folder) / MANIFEST
    return path.is_file() and read_manifest(folder, "import")["recipe"] == json.loads(json.dumps(recipe))


def build(folder: str | os.PathLike, recipe: dict, make: Callable[[Path], dict]) -> dict:
    """Gives the manifest of `folder`, which `make` fills unless it already holds the same recipe's work.

    `make` writes into the (empty) folder that it is handed and returns what the manifest shall say. A kill
    leaves at most a hidden folder, which the next call removes. A folder that no `build` made is never
    overwritten: UserError.
    """
    folder = Path(folder)
    recipe = json.loads(json.dumps(recipe))
    if holds(folder, recipe):
        return read_manifest(folder, "import")
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: holds files of something else: name another folder, or delete it")
    for stale in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    aside = folder.with_name(f".{folder.name}.making")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}): check the path") from None
    try:
        manifest = {"recipe": recipe, **json.loads(json.dumps(make(aside)))}
        write_json(aside / MANIFEST, manifest)
        if folder.exists():
            folder.rename(folder.with_name(f".{folder.name}.old"))
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(folder.with_name(f".{folder.name}.old"), ignore_errors=True)
    return manifest


def write_arrays(path: Path, holder: object) -> None:
    """Writes a dataclass whose fields are NumPy arrays to a safetensors file, for `build`'s folders."""
    from safetensors.numpy import save_file

    save_file({field.name: getattr(holder, field.name) for field in dataclasses.fields(holder)}, path)


def read_arrays(path: Path, holder: type[T], mend: str) -> T:
    """The dataclass that `write_arrays` wrote; UserError (with the mend) where the file does not hold it."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return holder(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): {mend}") from None


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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_checksums(folder: Path) -> dict[str, str]:
    """{path below it: SHA-256} of all files but the manifest, to be kept in that."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
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
    if manifest.get("seal") != seal(manifest):
        raise UserError(f"{folder}: {MANIFEST} was changed after it was exported: copy or export it again")


def seal(manifest: dict) -> str:
    """A digest of all else that a manifest says."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return digest([json.dumps(rest, sort_keys=True)])


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: for splits that never move."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64
