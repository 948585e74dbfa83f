"""Checksums of a checkpoint: the size and CRC-32C of each of its files, written after the files.

In a bucket, which checks what it stores by itself, only sizes are recorded, and nothing is read back.

Orbax's own format notices most torn files and hardly any flipped bit. The checksums notice both, before any
array is read.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c

from retrieval_jax.core import paths, storage

NAME = "checksums.json"
_CHUNK = 1 << 24  # bytes read at once


def write(folder: Path) -> None:
    """Writes folder/checksums.json: {path below the folder: [size in bytes, CRC-32C]}."""
    files = [str(p.relative_to(folder)) for p in paths.files(folder) if p.name != NAME]
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda name: _sum(folder / name), files)
        storage.write_json(folder / NAME, dict(zip(files, sums, strict=True)))


def find_damage(folder: Path, parts: Sequence[str] | None = None) -> str | None:
    """Compares the files of a folder with its checksums.

    Args:
      folder: the folder.
      parts: the files and folders in it to compare, which are first copied to this machine if they are in a
        bucket; None for all, where they are.

    Returns:
      The first difference, in words; None where there is none, or where the folder has no checksums.
    """
    try:
        text = (folder / NAME).read_text()
    except FileNotFoundError:
        return None  # the process ended between the save and the checksums
    except (OSError, ValueError):
        return f"{NAME} cannot be read"
    try:
        expected = {name: [int(size), crc and int(crc)] for name, (size, crc) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        return f"{NAME} cannot be read"

    try:
        local = {} if parts is None else {part: paths.ensure_local(folder / part) for part in parts}
    except FileNotFoundError as error:
        return f"{error.filename}: {paths.error_text(error)}"
    places = {name: folder / name for name in expected}
    if parts is not None:
        of_part = {name: next((p for p in parts if f"{name}/".startswith(f"{p}/")), None) for name in places}
        places = {name: local[p] / name[len(p) + 1 :] for name, p in of_part.items() if p is not None}

    def check(name: str) -> str | None:
        try:
            size = paths.size(places[name])
            if size != expected[name][0]:
                return f"{name} has {size} bytes, not {expected[name][0]}"
            crc = expected[name][1] and _sum(places[name])[1]
            return None if crc in (None, expected[name][1]) else f"{name} is not what was written"
        except paths.io_errors() as error:
            return f"{name}: {paths.error_text(error)}"

    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(check, places)), None)


def _sum(path: Path) -> list[int | None]:
    """Returns [size in bytes, CRC-32C]; in a bucket the CRC is None."""
    if paths.is_remote(path):
        return [paths.size(path), None]
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            crc = google_crc32c.extend(crc, chunk)
    return [size, crc]
