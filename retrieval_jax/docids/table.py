"""The second noun: docids. A table on disk with the token sequence that names each passage.

docids/KIND/tokens.npy          int32, passages × length, row = the passage's row, padded with 0
docids/KIND/ids.arrow           passage ids by row (Arrow IPC file)
docids/KIND/manifest.json       kind, size of the output softmax, collection
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrieval_jax import arrow_ids, storage
from retrieval_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DocidTable:
    """Row <-> passage id <-> docid tokens.

    Attributes:
      kind: "atomic" or "naive".
      tokens_NxL: int32; every docid ends before its padding of zeros. Passages may share a docid.
      passage_ids: N ids, in the order of the collection.
      output_size: width of the softmax that writes the tokens (every token is below it).
      collection: fingerprint of the collection.
    """

    kind: str
    tokens_NxL: np.ndarray
    passage_ids: pa.LargeStringArray
    output_size: int
    collection: str

    @property
    def length(self) -> int:
        """Tokens of the longest docid: the decoder's steps."""
        return self.tokens_NxL.shape[1]

    def fingerprint(self) -> str:
        """Of kind, docids and passage ids."""
        return self._fingerprint

    @functools.cached_property  # several users ask, and of millions of docids it takes seconds
    def _fingerprint(self) -> str:
        tokens = np.ascontiguousarray(self.tokens_NxL).reshape(-1).view(np.uint8).data  # no copy
        return storage.digest([self.kind, str(self.length), tokens, arrow_ids.digest(self.passage_ids)])

    def count_distinct(self) -> int:
        """How many different docids there are."""
        # Sorted as bytes, equal docids are neighbours. This type ignores zeros at the end: they are padding.
        tokens = np.ascontiguousarray(self.tokens_NxL).view(f"S{4 * self.length}").ravel()
        ordered = np.sort(tokens)
        return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + min(len(ordered), 1)

    def write(self, folder: Path) -> dict:
        """Writes the table into a folder; gives what its manifest shall say."""
        np.save(folder / "tokens.npy", self.tokens_NxL)
        arrow_ids.write(folder / "ids.arrow", self.passage_ids)
        return {
            "kind": self.kind,
            "passages": len(self.passage_ids),
            "length": self.length,
            "distinct": self.count_distinct(),
            "output_size": self.output_size,
            "collection": self.collection,
            "fingerprint": self.fingerprint(),
        }

    @classmethod
    def open(cls, folder: str | Path) -> "DocidTable":
        """Maps a finished table into memory. Raises UserError where files and manifest do not match."""
        folder = Path(folder)
        manifest = storage.read_manifest(folder, "docids")
        mend = "make it again: delete the folder, then `retrieval-jax docids`"
        try:
            tokens = np.load(folder / "tokens.npy", mmap_mode="r")
            ids = arrow_ids.read(folder / "ids.arrow")
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{folder}: a docid table that cannot be read ({error}): {mend}") from None
        table = cls(manifest["kind"], tokens, ids, manifest["output_size"], manifest["collection"])
        if table.fingerprint() != manifest["fingerprint"]:
            raise UserError(f"{folder}: its files were changed after they were made: {mend}")
        return table
