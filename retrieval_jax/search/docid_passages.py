"""From the docids that a search found to passages, which may share docids and may have several."""

from collections.abc import Sequence

import numpy as np

from retrieval_jax.data.trec import RankedList
from retrieval_jax.docids.table import DocidTable


class DocidPassages:
    """The passages that docids name.

    Args:
      table: the docids.
      first_N: int, for each row of the table the first row that has the same docid.
    """

    def __init__(self, table: DocidTable, first_N: np.ndarray):
        self.table = table
        # Docids that an earlier row has, too: those earlier rows, ascending, and the docids' own rows.
        duplicates = np.flatnonzero(first_N != np.arange(len(first_N)))
        by_first = np.argsort(first_N[duplicates], kind="stable")
        self._firsts, self._duplicates = first_N[duplicates][by_first], duplicates[by_first]

    @property
    def one_to_one(self) -> bool:
        """Whether each passage has one docid, and each docid one passage."""
        return not len(self._firsts) and not self.table.has_several

    @property
    def first_rows(self) -> np.ndarray:
        """For each row of the table the first row that has the same docid: int64 N."""
        first_N = np.arange(len(self.table.tokens_NxL))
        first_N[self._duplicates] = self._firsts
        return first_N

    def sharing(self, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Finds the rows of the table that have the same docid.

        Args:
          rows: int, rows of the table, each the first one with its docid; negative ones, which come last,
            name no docid.

        Returns:
          For each docid (its row; the other rows that have it, ascending).
        """
        rows = rows[rows >= 0]
        begin, end = (np.searchsorted(self._firsts, rows, side).tolist() for side in ("left", "right"))
        pairs = zip(rows.tolist(), begin, end, strict=True)
        return [(row, self._duplicates[first:last]) for row, first, last in pairs]

    def of_docids(self, rows: np.ndarray) -> list[list[int]]:
        """Finds the passages that each docid names: their rows, ascending.

        Args:
          rows: as `sharing` takes them.
        """
        groups = [[first, *others.tolist()] for first, others in self.sharing(rows)]
        if not self.table.has_several:
            return groups
        return [sorted({*self.table.passages_of(np.array(group)).tolist()}) for group in groups]

    def ranked_list(self, rows: np.ndarray, scores: Sequence[float]) -> RankedList:
        """Lists the passages of the docids that a search found, each with the first and best of its docids.

        Args:
          rows: as `sharing` takes them, those of the best docids first.
          scores: the docids' scores, which their passages get.
        """
        ids, best = self.table.passage_ids, {}
        for passages, score in zip(self.of_docids(rows), scores, strict=False):
            for passage in passages:
                best.setdefault(passage, score)
        return [(ids[passage].as_py(), score) for passage, score in best.items()]
