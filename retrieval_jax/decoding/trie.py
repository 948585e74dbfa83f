"""The docid trie as plain arrays: what may follow which prefix.

Only edges that leave a node holding two or more docids are stored, breadth-first, so the children of a node
are consecutive and a beam's state is (first child, number of children). An edge to a node with one docid left
points to that docid's row instead, with no children; the rest of it is read from the sorted token matrix.
"""

import dataclasses

import jax
import numpy as np

from retrieval_jax.data.vocabulary import round_up


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trie:
    """Arrays that ride as arguments of the search; padded, so that a similar table does not recompile.

    Attributes:
      edge_token_E: int32, the token on an edge.
      edge_degree_E: int32, children of the node it leads to; 0: one docid is left.
      edge_child_E: int32, the first of those children, or the docid's row in `tokens_NxL`.
      tokens_NxL: int32, the distinct docids, sorted, padded with 0.
      root_degree: int32 scalar, children of the root (edges 0, 1, …); 0: the only docid is row 0.
      fanouts: for each depth, an upper bound of its nodes' children (static: shapes depend on it).
    """

    edge_token_E: np.ndarray | jax.Array
    edge_degree_E: np.ndarray | jax.Array
    edge_child_E: np.ndarray | jax.Array
    tokens_NxL: np.ndarray | jax.Array
    root_degree: np.ndarray | jax.Array
    fanouts: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def build_trie(tokens_NxL: np.ndarray) -> tuple[Trie, np.ndarray]:
    """Builds the trie of docids (int32, padded with 0; equal rows are one docid).

    Gives (trie, docid_N): for each row of the input, its docid's row in the trie. Raises ValueError where a
    docid is empty, or is the beginning of another (end each with an end-of-sequence token).
    """
    docids_DxL, docid_N = np.unique(tokens_NxL, axis=0, return_inverse=True)
    D, L = docids_DxL.shape
    lengths_D = np.count_nonzero(docids_DxL, axis=1).astype(np.int32)
    if (docids_DxL[np.arange(L) < lengths_D[:, None]] == 0).any() or (lengths_D == 0).any():
        raise ValueError("a docid is empty or has a 0 (padding) inside")

    # Groups of rows with a common prefix of length `depth` and two or more members.
    rows, group = np.arange(D) if D > 1 else np.arange(0), np.zeros(D if D > 1 else 0, np.int64)
    token, degree, child, fanouts = [], [], [], []
    placed = 0  # edges of the depths before
    for depth in range(L):
        if not len(rows):
            fanouts.append(1)
            continue
        column = docids_DxL[rows, depth]
        if (column == 0).any():
            row = rows[np.flatnonzero(column == 0)[0]]
            raise ValueError(f"docid {docids_DxL[row].tolist()} is the beginning of another")
        starts = np.flatnonzero(np.r_[True, (group[1:] != group[:-1]) | (column[1:] != column[:-1])])
        sizes = np.diff(np.r_[starts, len(rows)])
        children_of_group = np.bincount(group[starts])
        fanouts.append(int(children_of_group.max()))
        if depth:  # now the parents' children are known
            degree[-1][degree[-1] > 0] = children_of_group
            first = np.r_[0, np.cumsum(children_of_group)[:-1]] + placed
            child[-1][degree[-1] > 0] = first
        token.append(column[starts])
        degree.append((sizes > 1).astype(np.int64))  # how many, once the next depth is counted
        child.append(rows[starts].copy())
        placed += len(starts)
        inner = np.repeat(sizes > 1, sizes)
        new_group = np.cumsum(sizes > 1) - 1
        rows, group = rows[inner], np.repeat(new_group, sizes)[inner]
    if not token:
        token = degree = child = [np.zeros(0, np.int64)]

    def padded(parts: list[np.ndarray]) -> np.ndarray:
        flat = np.concatenate(parts).astype(np.int32)
        return np.pad(flat, (0, round_up(len(flat) + 1, _grain(len(flat))) - len(flat)))

    rows_padded = round_up(D, _grain(D))
    trie = Trie(
        edge_token_E=padded(token),
        edge_degree_E=padded(degree),
        edge_child_E=padded(child),
        tokens_NxL=np.pad(docids_DxL.astype(np.int32), ((0, rows_padded - D), (0, 0))),
        root_degree=np.int32(len(token[0])),
        fanouts=tuple(1 << (f - 1).bit_length() for f in fanouts),  # the next power of two
    )
    return trie, docid_N.reshape(-1).astype(np.int32)


def _grain(n: int) -> int:
    """Arrays grow in steps of an eighth to a quarter of their size."""
    return max(128, 1 << max(n.bit_length() - 3, 0))
