"""Sets of tokens: for each passage the tokens of the text vocabulary that stand for it best.

    sets/NAME/tokens.npy     uint16 (uint32 above 65,536 pieces), passages × M, row = the passage's row;
                             tokens of highest weight first, then 0
    sets/NAME/impacts.npy    uint8, passages × M, only where tokens have impacts
    sets/NAME/ids.arrow      passage ids by row (Arrow IPC file)
    sets/NAME/manifest.json  recipe (collection, vocabulary, how they were made), M, impact_scale

They are PAG's set-based docids (Zeng et al. 2024, section 3.1). With the weights w_t(q) of a lexical head,
the score of a passage is Σ_m w_{token[p,m]}(q) · impact[p,m] · impact_scale; without impacts, it is
Σ_m w_{token[p,m]}(q).
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.docids.table import blocks

VERSION = 1
"""Version of the format on disk. Sets of another version are not opened."""
LEARNED = "DataConfig.sets"  # of a model's settings.json: fingerprint of the sets it was trained with
TOKENS, IMPACTS, IDS = "tokens.npy", "impacts.npy", "ids.arrow"
_HINT = "make them again: delete the folder, then `retrieval-jax sets`"


class SetShape(NamedTuple):
    """What sets of tokens take of each passage.

    Attributes:
      size: the most tokens of a passage, M.
      impacts: whether tokens have impacts.
    """

    size: int
    impacts: bool


@dataclasses.dataclass(frozen=True)
class TokenSets:
    """The sets of tokens of a collection's passages.

    Attributes:
      tokens_PxM: uint16 or uint32, pieces of the text vocabulary; 0 is none.
      impacts_PxM: uint8, how much each token counts, divided by `impact_scale`; None: each counts 1.
      impact_scale: float.
      passage_ids: the ids of the passages, by row.
      collection: fingerprint of the collection.
      vocabulary: checksum of the text vocabulary.
    """

    tokens_PxM: np.ndarray
    impacts_PxM: np.ndarray | None
    impact_scale: float
    passage_ids: pa.LargeStringArray
    collection: str
    vocabulary: str

    @property
    def size(self) -> int:
        """The most tokens of a passage, M."""
        return self.tokens_PxM.shape[1]

    @property
    def shape(self) -> SetShape:
        """The shape of the sets."""
        return SetShape(self.size, self.impacts_PxM is not None)

    @property
    def bytes_per_passage(self) -> int:
        """The bytes that a passage takes in memory."""
        arrays = [self.tokens_PxM] if self.impacts_PxM is None else [self.tokens_PxM, self.impacts_PxM]
        return sum(x.dtype.itemsize * x.shape[1] for x in arrays)

    def fingerprint(self) -> str:
        """Returns a digest of tokens, impacts and passage ids, whatever the dtype of the tokens."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        def parts() -> Iterator[str | bytes]:
            yield from (self.vocabulary, str(self.size), repr(self.impact_scale))
            for rows in blocks(len(self.tokens_PxM)):
                yield self.tokens_PxM[rows].astype("<i4").tobytes()
                if self.impacts_PxM is not None:
                    yield self.impacts_PxM[rows].tobytes()
            yield arrow_ids.digest(self.passage_ids)

        return storage.digest(parts())

    def contributions(self, weights_V: np.ndarray, rows_C: np.ndarray) -> np.ndarray:
        """Computes what each token of passages adds to their scores.

        Args:
          weights_V: float32, a query's weights of the text vocabulary's tokens.
          rows_C: int, the rows of the passages.

        Returns:
          Float32 C×M; 0 where there is no token.
        """
        tokens_CxM = self.tokens_PxM[rows_C]
        added_CxM = np.where(tokens_CxM > 0, weights_V[tokens_CxM], 0)
        if self.impacts_PxM is None:
            return added_CxM
        return added_CxM * self.impacts_PxM[rows_C] * np.float32(self.impact_scale)

    def write(self, folder: Path) -> dict:
        """Writes the sets into a folder.

        Returns:
          What the folder's manifest shall say.
        """
        for name, array in ((TOKENS, self.tokens_PxM), (IMPACTS, self.impacts_PxM)):
            if array is not None and not (folder / name).exists():  # arrays of files are there already
                np.save(folder / name, array)
        arrow_ids.write(folder / IDS, self.passage_ids)
        return {
            "version": VERSION,
            "passages": len(self.tokens_PxM),
            "m": self.size,
            "impacts": self.impacts_PxM is not None,
            "impact_scale": self.impact_scale,
            "bytes_per_passage": self.bytes_per_passage,
            "collection": self.collection,
            "vocabulary": self.vocabulary,
            "fingerprint": self.fingerprint(),
        }

    @classmethod
    def open(cls, folder: str | Path) -> "TokenSets":
        """Opens finished sets; their arrays are mapped into memory, and read once, to check them.

        Args:
          folder: the folder, also of a bucket.

        Raises:
          UserError: the sets are of another version, or their files do not fit their manifest.
        """
        folder = paths.as_path(folder)
        return cls.read(folder, storage.read_manifest(folder, "sets"))

    @classmethod
    def read(cls, folder: Path, manifest: dict) -> "TokenSets":
        """Opens the files of sets in any folder.

        Args:
          folder: the folder.
          manifest: what `write` returned.

        Raises:
          UserError: see `open`.
        """
        if manifest.get("version") != VERSION:
            raise UserError(f"{folder}: sets made by another version of this program: {_HINT}")
        *names, _ = files(manifest)
        try:
            tokens, *impacts = (np.load(paths.ensure_local(folder / name), mmap_mode="r") for name in names)
            ids = arrow_ids.read(folder / IDS)
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{folder}: sets that cannot be read ({error}): {_HINT}") from None
        shape = (manifest["passages"], manifest["m"])
        if len(ids) != shape[0] or any(array.shape != shape for array in (tokens, *impacts)):
            raise UserError(f"{folder}: its files were changed after they were made: {_HINT}")
        facts = manifest["impact_scale"], ids, manifest["collection"], manifest["vocabulary"]
        sets = cls(tokens, *(impacts or [None]), *facts)
        if sets.fingerprint() != manifest["fingerprint"]:
            raise UserError(f"{folder}: its files were changed after they were made: {_HINT}")
        return sets


def finished(work: Workspace) -> list[str]:
    """Returns the names of the finished sets in a work folder, in their order."""
    return [path.name for path in storage.finished_folders(work.folder / "sets")]


def chosen(work: Workspace, name: str | None) -> Path:
    """Returns the folder of the sets to search by: those of a name, or the only ones of the work folder.

    Raises:
      UserError: they are not named, and there are none or several.
    """
    if name:
        return work.sets(name)
    there = finished(work)
    if len(there) == 1:
        return work.sets(there[0])
    named = f"name one of {', '.join(there)}" if there else "make some by `retrieval-jax sets`"
    raise UserError(f"make_index.sets: the passages' sets of tokens are not named: {named}: --SETS=NAME")


def open_for(folder: Path, collection: str, vocabulary: str) -> TokenSets:
    """Opens sets; see `TokenSets.open`.

    Args:
      folder: the folder.
      collection: fingerprint of the collection that they must be of.
      vocabulary: checksum of the text vocabulary that they must be of.

    Raises:
      UserError: they are of others.
    """
    sets = TokenSets.open(folder)
    if (sets.collection, sets.vocabulary) != (collection, vocabulary):
        raise UserError(f"{folder}: of another collection or vocabulary: `retrieval-jax sets` makes others")
    return sets


def files(manifest: dict) -> list[str]:
    """Returns the names of the files of sets, the passage ids' last."""
    return [TOKENS, *([IMPACTS] if manifest["impacts"] else []), IDS]


def token_dtype(vocab_size: int) -> type:
    """Returns the dtype of tokens of a vocabulary on disk."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32
