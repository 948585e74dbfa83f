"""The second noun: docids. A table on disk with the token sequence that names each passage.

docids/KIND/tokens.npy          int32, passages × length, row = the passage's row, padded with 0
docids/KIND/passage_ids.txt     a line a row
docids/KIND/manifest.json       kind, size of the output softmax, collection
"""

import dataclasses
from pathlib import Path

import numpy as np

from retrieval_jax import storage
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
    passage_ids: list[str]
    output_size: int
    collection: str

    @property
    def length(self) -> int:
        """Tokens of the longest docid: the decoder's steps."""
        return self.tokens_NxL.shape[1]

    def fingerprint(self) -> str:
        return storage.digest([self.kind, self.tokens_NxL.tobytes(), *self.passage_ids])

    def write(self, folder: Path) -> dict:
        """Writes the table into a folder; gives what its manifest shall say."""
        np.save(folder / "tokens.npy", self.tokens_NxL)
        (folder / "passage_ids.txt").write_text("".join(f"{i}\n" for i in self.passage_ids))
        return {
            "kind": self.kind,
            "passages": len(self.passage_ids),
            "length": self.length,
            "distinct": len(np.unique(self.tokens_NxL, axis=0)),
            "output_size": self.output_size,
            "collection": self.collection,
            "fingerprint": self.fingerprint(),
        }

    @classmethod
    def open(cls, folder: str | Path) -> "DocidTable":
        """Reads a finished table. Raises UserError where files and manifest do not belong together."""
        folder = Path(folder)
        manifest = storage.read_manifest(folder, "docids")
        mend = "make it again: delete the folder, then `retrieval-jax docids`"
        try:
            tokens = np.load(folder / "tokens.npy")
            ids = (folder / "passage_ids.txt").read_text().splitlines()
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{folder}: a docid table that cannot be read ({error}): {mend}") from None
        table = cls(manifest["kind"], tokens, ids, manifest["output_size"], manifest["collection"])
        if table.fingerprint() != manifest["fingerprint"]:
            raise UserError(f"{folder}: its files were changed after they were made: {mend}")
        return table
