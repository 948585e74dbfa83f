"""The docid trie as plain arrays: which tokens may follow which prefix.

Only the edges that leave a node with two or more docids below it are stored, breadth-first, so the children
of a node are consecutive and a beam's state is (first child, number of children). An edge below which one
docid is left points to that docid's row of the table instead, and has no children; the rest of that docid is
read from a bit stream of suffixes, which holds for every row the positions at which a docid can be the only
one left.

At each position docids use few of the model's tokens. Edges and suffixes hold a token's local id: its index
among the tokens that occur at that position. Letters in shapes: N rows of the table, L positions, E edges,
I local ids.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.decoding.local_ids import pack, to_local_ids
from retrieval_jax.decoding.order import order

# The search counts rows, edges and words in int32, and adds up to 65,536 children to an edge.
_MOST = (1 << 31) - (1 << 16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trie:
    """Arrays that the search takes as arguments; padded, so that a similar table does not recompile it.

    Attributes:
      token_LxI: int32, the token of each local id at each position, ascending; 0 stands for an ended docid.
      local_id_E: the local id of the token on each edge; an unsigned integer, see `edge_dtypes`.
      num_children_E: how many children the node has to which the edge leads; 0 where one docid is left. An
        unsigned integer, see `edge_dtypes`.
      first_child_E: int32, the edge to the first of these children, or the docid's row in the table.
      suffixes: uint32, each row's local ids from position `suffix_start` on, `local_id_bits` bits each.
      root_num_children: int32 scalar, children of the root (edges 0, 1, …); 0: the only docid is in row 0.
      max_branching: for each position, an upper bound of a node's children. Static: shapes depend on it.
      suffix_start: the first position that `suffixes` holds. Static.
      local_id_bits: bits of one local id in `suffixes`. Static.
    """

    token_LxI: np.ndarray | jax.Array
    local_id_E: np.ndarray | jax.Array
    num_children_E: np.ndarray | jax.Array
    first_child_E: np.ndarray | jax.Array
    suffixes: np.ndarray | jax.Array
    root_num_children: np.ndarray | jax.Array
    max_branching: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    suffix_start: int = dataclasses.field(metadata={"static": True})
    local_id_bits: int = dataclasses.field(metadata={"static": True})

    @property
    def arrays(self) -> dict[str, np.ndarray | jax.Array]:
        """The attributes that are not static, by name, for programs that take them so."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if not f.metadata.get("static")}

    @property
    def length(self) -> int:
        """L, how many tokens the longest docid has."""
        return len(self.max_branching)

    @property
    def suffix_bits(self) -> int:
        """How many bits one row takes in `suffixes`; 32 rows take as many words."""
        return (self.length - self.suffix_start) * self.local_id_bits

    def suffix_local_id(self, row: jax.Array, position: jax.Array | int) -> jax.Array:
        """Reads the local ids that rows of the table have at a position.

        Args:
          row: int32, of any shape.
          position: not below `suffix_start`; may be traced.

        Returns:
          int32, of the shape of `row`.
        """
        if not self.suffix_bits:
            return jnp.zeros_like(row)
        word, bit = self.suffix_place(row, position)
        shift = bit.astype(jnp.uint32)
        suffixes = jnp.asarray(self.suffixes)
        low = suffixes.at[word].get(mode="clip") >> shift
        high = suffixes.at[word + 1].get(mode="clip") << 1 << (31 - shift)  # a shift by 32 is undefined
        return ((low | high) & ((1 << self.local_id_bits) - 1)).astype(jnp.int32)

    def suffix_place(self, row: jax.Array, position: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Gives (the word of `suffixes`, the bit of the word) where the local id of a row begins."""
        column = jnp.maximum(position - self.suffix_start, 0)
        # Counted from the start of the row's 32 rows, as there are more bits than an int32 counts.
        bit = row % 32 * self.suffix_bits + column * self.local_id_bits
        return row // 32 * self.suffix_bits + bit // 32, bit % 32


def build_trie(tokens_NxL: np.ndarray, reuse_shapes_of: Trie | None = None) -> tuple[Trie, np.ndarray]:
    """Builds the trie of a table's docids.

    Four docids of up to four tokens, each ended by token 1 and padded with 0:

    >>> tokens_NxL = np.array([[5, 9, 1, 0], [5, 2, 1, 0], [7, 2, 1, 0], [5, 9, 4, 1]])
    >>> trie, row_N = build_trie(tokens_NxL)

    Position 0 has the tokens 5 and 7, so their local ids are 0 and 1; position 1 has 2 and 9; and so on.
    Where a docid has ended, its token is 0:

    >>> trie.token_LxI[:, :2].tolist()
    [[5, 7], [2, 9], [1, 4], [0, 1]]

    Edges 0 and 1 leave the root, 2 and 3 the node of prefix (5,), 4 and 5 the node of prefix (5, 9):

    >>> trie.local_id_E[:6].tolist()
    [0, 1, 0, 1, 0, 1]
    >>> trie.num_children_E[:6].tolist()
    [2, 0, 0, 2, 0, 0]

    Edge 0 (token 5) leads to a node whose 2 children begin at edge 2. Edge 1 (token 7) leads to row 2, the
    only docid with that prefix, edge 2 (5, 2) to row 1, and edges 4 and 5 to rows 0 and 3:

    >>> trie.first_child_E[:6].tolist()
    [2, 2, 1, 4, 0, 3]

    From position 1 on, a docid can be the only one left. Its other tokens are read from the suffixes: row 3
    goes on with local ids 1, 1 and 1, which are tokens 9, 4 and 1.

    >>> trie.suffix_start
    1
    >>> [trie.suffix_local_id(jnp.int32(3), position).item() for position in (1, 2, 3)]
    [1, 1, 1]

    Args:
      tokens_NxL: non-negative integers, padded with 0. Equal rows are one docid.
      reuse_shapes_of: the trie of an earlier state of the table. If the new one fits into its shapes it is
        padded to them, so that a search compiled for the earlier one accepts the new one.

    Returns:
      (the trie, with NumPy arrays; row_N int32: for each row of the table, the first row with the same
      docid, which is the row that the trie knows).

    Raises:
      ValueError: a docid is empty, has a 0 inside, or is a prefix of another one (end each docid with an
        end-of-sequence token); more than 65,536 tokens occur at one position; or the trie is too large, see
        `check_sizes`.
    """
    earlier = reuse_shapes_of
    N, L = tokens_NxL.shape
    if earlier and earlier.length > L:
        tokens_NxL = np.pad(tokens_NxL, ((0, 0), (0, earlier.length - L)))
        L = earlier.length
    check_sizes(N)
    tokens_of, local_id_NxL = to_local_ids(tokens_NxL)
    docids_D, shared_D = order(local_id_NxL)
    row_N, is_first_N = None, shared_D < L
    if not is_first_N.all():
        sorted_N, docids_D, shared_D = docids_D, docids_D[is_first_N], shared_D[is_first_N]
        row_N = np.empty(N, np.int32)
        row_N[sorted_N] = docids_D[np.cumsum(is_first_N) - 1]
        del sorted_N
    del is_first_N

    edges = _Edges.of(local_id_NxL, tokens_of, docids_D, shared_D, earlier)
    del docids_D, shared_D
    root_num_children = np.int32(len(edges.local_ids[0]) if edges.local_ids else 0)

    shapes = _Shapes(
        edges=capacity(sum(map(len, edges.local_ids))),
        rows=round_up(capacity(N), 32),
        local_ids=round_up(max(map(len, tokens_of)), 8),
        max_branching=tuple(map(_round_up_branching, edges.branching)),
        suffix_start=edges.suffix_start,
    )
    if earlier and shapes.fit_into(_Shapes.of(earlier)):
        shapes = _Shapes.of(earlier)
    suffix_bits = (L - shapes.suffix_start) * shapes.local_id_bits
    check_sizes(shapes.rows, shapes.edges, shapes.rows // 32 * suffix_bits)
    token_LxI = np.zeros((L, shapes.local_ids), np.int32)
    for position, tokens in enumerate(tokens_of):
        token_LxI[position, : len(tokens)] = tokens
    local_id_dtype, num_children_dtype = edge_dtypes(shapes.local_ids, shapes.max_branching)
    trie = Trie(
        token_LxI=token_LxI,
        local_id_E=_concatenate(edges.local_ids, local_id_dtype, shapes.edges),
        num_children_E=_concatenate(edges.num_children, num_children_dtype, shapes.edges),
        first_child_E=_concatenate(edges.first_child, np.int32, shapes.edges),
        suffixes=pack(local_id_NxL[:, shapes.suffix_start :], shapes.local_id_bits, shapes.rows),
        root_num_children=root_num_children,
        max_branching=shapes.max_branching,
        suffix_start=shapes.suffix_start,
        local_id_bits=shapes.local_id_bits,
    )
    return trie, np.arange(N, dtype=np.int32) if row_N is None else row_N


def check_sizes(rows: int, edges: int = 0, words: int = 0) -> None:
    """Checks that the search can count what a trie holds.

    Args:
      rows: rows of the docid table.
      edges: the length of the arrays of edges.
      words: the length of `suffixes`.

    Raises:
      ValueError: there are too many.
    """
    for count, what in ((rows, "docids"), (edges, "edges"), (words, "words of suffixes")):
        if count > _MOST:
            raise ValueError(f"{count:,} {what} are more than the {_MOST:,} that a search counts in 32 bits")


def edge_dtypes(local_ids: int, max_branching: tuple[int, ...]) -> tuple[np.dtype, np.dtype]:
    """Chooses the smallest unsigned dtypes for edges.

    Args:
      local_ids: how many local ids there are at most at one position.
      max_branching: as in `Trie`.

    Returns:
      The dtypes of `local_id_E` and of `num_children_E`.
    """
    return np.min_scalar_type(local_ids - 1), np.min_scalar_type(max(max_branching[1:], default=0))


@dataclasses.dataclass
class _Edges:
    """All edges of a trie, each list with one array a position, breadth-first.

    Attributes:
      local_ids, num_children, first_child: as in `Trie`, not yet padded.
      branching: for each position, the most children that one node has; 1 at the least.
      suffix_start: the first position at which a docid is the only one left and has no edge.
    """

    local_ids: list[np.ndarray]
    num_children: list[np.ndarray]
    first_child: list[np.ndarray]
    branching: list[int]
    suffix_start: int

    @classmethod
    def of(
        cls,
        local_id_NxL: np.ndarray,
        tokens_of: list[np.ndarray],
        docids_D: np.ndarray,
        shared_D: np.ndarray,
        earlier: Trie | None,
    ) -> "_Edges":
        """Lays out the edges.

        Args:
          local_id_NxL: the docids as local ids; see `to_local_ids`.
          tokens_of: the tokens of the local ids; see `to_local_ids`.
          docids_D: int32, the rows of the distinct docids, in lexicographic order.
          shared_D: int16, how many leading tokens each shares with the one before it in that order; its first
            is set to -1.
          earlier: the trie whose shapes are to be reused. It has no suffixes before its `suffix_start`, so
            until there docids that are the only ones left have edges, too.
        """
        L = local_id_NxL.shape[1]
        edges_until = earlier.suffix_start if earlier else 0
        shared_before_D = shared_D
        shared_before_D[0] = -1
        shared_after_D = np.r_[shared_before_D[1:], np.int16(-1)]
        shared_D = np.maximum(shared_before_D, shared_after_D)  # with one token more, a docid is alone
        edges = cls([], [], [], [1] * L, L if len(docids_D) > 1 or edges_until else 0)
        is_inner_E = np.zeros(0, bool)  # of the position before: whether the edge leads to a node
        count = 0
        for position in range(L):
            # In sorted order, a docid adds an edge here if it is the first with its prefix of `position` + 1
            # tokens, and shares at least `position` tokens with a neighbour. Otherwise the rest of it is
            # stored as a suffix.
            at_E = np.flatnonzero(
                (shared_before_D <= position) & (np.maximum(shared_D, edges_until - 1) >= position)
            )
            if not len(at_E):
                break
            at_E = at_E.astype(np.int32)
            first_edges = np.flatnonzero(shared_before_D[at_E] < position)  # the first edge of each node
            num_children = np.diff(np.r_[first_edges, len(at_E)])
            edges.branching[position] = int(num_children.max())
            if position:  # the edges of the position before lead to these nodes
                inner = np.zeros(len(is_inner_E), np.min_scalar_type(edges.branching[position]))
                inner[is_inner_E] = num_children
                edges.num_children[-1] = inner
                edges.first_child[-1][is_inner_E] = count + first_edges
            rows_E = docids_D[at_E]
            local_id_E = local_id_NxL[rows_E, position]
            is_prefix_E = (local_id_E == 0) & (shared_D[at_E] >= position)
            if tokens_of[position][0] == 0 and is_prefix_E.any():
                row = rows_E[np.argmax(is_prefix_E)]
                docid = [int(tokens[i]) for tokens, i in zip(tokens_of, local_id_NxL[row], strict=True)]
                raise ValueError(f"docid {docid} (row {row}) is a prefix of another")
            is_inner_E = (shared_after_D[at_E] > position) | (position + 1 < edges_until)
            if not is_inner_E.all():
                edges.suffix_start = min(edges.suffix_start, position + 1)
            edges.local_ids.append(local_id_E)
            edges.num_children.append(np.zeros(len(at_E), np.uint8))  # until the next position
            edges.first_child.append(rows_E)
            count += len(at_E)
        return edges


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """The sizes of a trie's arrays, on which the compiled search depends."""

    edges: int
    rows: int
    local_ids: int
    max_branching: tuple[int, ...]
    suffix_start: int

    @property
    def local_id_bits(self) -> int:
        return (self.local_ids - 1).bit_length()

    @classmethod
    def of(cls, trie: Trie) -> "_Shapes":
        rows = trie.suffixes.size // trie.suffix_bits * 32 if trie.suffix_bits else 0
        local_ids = trie.token_LxI.shape[1]
        return cls(trie.local_id_E.size, rows, local_ids, trie.max_branching, trie.suffix_start)

    def fit_into(self, larger: "_Shapes") -> bool:
        """Whether a trie of these shapes can be padded to the larger ones."""
        return (
            len(self.max_branching) == len(larger.max_branching)
            and self.edges <= larger.edges
            and (self.rows <= larger.rows or larger.suffix_start == len(larger.max_branching))
            and self.local_ids <= larger.local_ids
            and all(a <= b for a, b in zip(self.max_branching, larger.max_branching, strict=True))
            and self.suffix_start >= larger.suffix_start
        )


def capacity(n: int) -> int:
    """Rounds a size up by 0.4% to 1.2%, in steps, so that a slightly larger table fits, too."""
    return round_up(n + n // 256 + 1, max(64, 1 << max(n.bit_length() - 8, 0)))


def _round_up_branching(children: int) -> int:
    """Rounds a number of children up by at most an eighth (from 8 on)."""
    return round_up(children, 1 << max((children - 1).bit_length() - 4, 0))


def _concatenate(parts: list[np.ndarray], dtype: type, size: int) -> np.ndarray:
    """Concatenates arrays, and pads them with 0 to `size`. Empties the list: no array is held twice."""
    padded, done = np.zeros(size, dtype), 0
    while parts:
        part = parts.pop(0)
        padded[done : done + len(part)] = part
        done += len(part)
    return padded
