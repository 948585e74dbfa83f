"""The docid trie as plain arrays: what may follow which prefix.

Only the edges that leave a node of two or more docids are stored, breadth-first, so the children of a node
are consecutive and a beam's state is (first child, number of children). An edge to a node with one docid left
points to that docid's row in the table instead, with no children; the rest of it is read from a bit stream
that holds, for every row, the positions at which a docid may be alone.

At each position docids use few of the model's tokens. Edges and the stream hold numbers of those: symbols.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.decoding.order import order

_BLOCK = 1 << 16  # rows worked on at once: they stay in the processor's cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trie:
    """Arrays that ride as arguments of the search; padded, so that a similar table does not recompile.

    Attributes:
      token_LxS: int32, the token that a symbol stands for at a position, ascending; 0 where docids ended.
      symbol_E: on each edge; an unsigned integer, see `edge_dtypes`.
      degree_E: children of the node it leads to; 0: one docid is left. An unsigned integer too.
      child_E: int32, the first of those children, or the docid's row in the table.
      tails: uint32, the symbols of each row from position `tail_from` on, `symbol_bits` each.
      root_degree: int32 scalar, children of the root (edges 0, 1, …); 0: the only docid is in row 0.
      fanouts: for each position, a bound of a node's children (static: shapes depend on it).
    """

    token_LxS: np.ndarray | jax.Array
    symbol_E: np.ndarray | jax.Array
    degree_E: np.ndarray | jax.Array
    child_E: np.ndarray | jax.Array
    tails: np.ndarray | jax.Array
    root_degree: np.ndarray | jax.Array
    fanouts: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    tail_from: int = dataclasses.field(metadata={"static": True})
    symbol_bits: int = dataclasses.field(metadata={"static": True})

    @property
    def arrays(self) -> dict[str, np.ndarray | jax.Array]:
        """The attributes that are not static, for programs that take them by name."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if not f.metadata.get("static")}

    @property
    def length(self) -> int:
        """Tokens of the longest docid."""
        return len(self.fanouts)

    @property
    def row_bits(self) -> int:
        """Bits of one row in `tails`; 32 rows fill as many words."""
        return (self.length - self.tail_from) * self.symbol_bits

    def tail_symbol(self, row: jax.Array, position: jax.Array | int) -> jax.Array:
        """int32, the symbols of rows (any shape) at a position, which is not below `tail_from`."""
        if not self.row_bits:
            return jnp.zeros_like(row)
        column = jnp.maximum(position - self.tail_from, 0)
        bit = row % 32 * self.row_bits + column * self.symbol_bits  # of its 32 rows: no overflow at any size
        word = row // 32 * self.row_bits + bit // 32
        shift = (bit % 32).astype(jnp.uint32)
        low = self.tails.at[word].get(mode="clip") >> shift
        high = self.tails.at[word + 1].get(mode="clip") << 1 << (31 - shift)  # a shift by 32 is undefined
        return ((low | high) & ((1 << self.symbol_bits) - 1)).astype(jnp.int32)


def build_trie(tokens_NxL: np.ndarray, like: Trie | None = None) -> tuple[Trie, np.ndarray]:
    """Builds the trie of a table's docids (non-negative integers, padded with 0; equal rows are one docid).

    `like` is the trie of an earlier state of the table: where the new one fits into its shapes it gets them,
    so that a search compiled for the one takes the other.

    Gives (trie, row_N): for each row of the table, the first row with the same docid, which is the one that
    the trie knows. Raises ValueError where a docid is empty, or is the beginning of another (end each with an
    end-of-sequence token).
    """
    N, L = tokens_NxL.shape
    if like and like.length > L:
        tokens_NxL = np.pad(tokens_NxL, ((0, 0), (0, like.length - L)))
        L = like.length
    tokens_of, symbol_NxL = _symbols(tokens_NxL)
    sorted_N, shared_N = order(symbol_NxL)
    new_N = shared_N < L
    docids_D = sorted_N[new_N].astype(np.int32)
    row_N = np.arange(N, dtype=np.int32)
    if len(docids_D) < N:
        row_N[sorted_N] = docids_D[np.cumsum(new_N) - 1]

    # How many tokens each docid shares with the one before it and with the one after it, in order.
    before_D = shared_N[new_N]
    before_D[0] = -1
    after_D = np.r_[before_D[1:], np.int16(-1)]
    known_D = np.maximum(before_D, after_D)  # … with any: after so many and one more it is alone
    until = (
        like.tail_from if like else 0
    )  # up to here the earlier trie has no tails: single docids have edges
    symbols, degrees, children, fanouts = [], [], [], [1] * L
    inner_E = np.zeros(0, bool)  # the edges that lead to several docids
    placed, tail_from = 0, L if len(docids_D) > 1 or until else 0
    for position in range(L):
        # A docid brings an edge where it is the first one of its beginning, and has a neighbour until there.
        at_E = np.flatnonzero((before_D <= position) & (np.maximum(known_D, until - 1) >= position))
        if not len(at_E):
            break
        first_N = np.flatnonzero(before_D[at_E] < position)  # the first edge of each node
        degree_N = np.diff(np.r_[first_N, len(at_E)])
        fanouts[position] = int(degree_N.max())
        if position:  # the edges of the position before lead to these nodes
            degrees[-1][inner_E] = degree_N
            children[-1][inner_E] = placed + first_N
        symbol_E = symbol_NxL[docids_D[at_E], position]
        ended_E = (symbol_E == 0) & (known_D[at_E] >= position)
        if tokens_of[position][0] == 0 and ended_E.any():
            row = docids_D[at_E[np.argmax(ended_E)]]
            raise ValueError(f"docid {tokens_NxL[row].tolist()} (row {row}) is the beginning of another")
        inner_E = (after_D[at_E] > position) | (position + 1 < until)
        if not inner_E.all():
            tail_from = min(tail_from, position + 1)
        symbols.append(symbol_E)
        degrees.append(np.zeros(len(at_E), np.uint32))
        children.append(docids_D[at_E])
        placed += len(at_E)

    shapes = _Shapes(
        edges=_room(placed),
        rows=round_up(_room(N), 32),
        symbols=round_up(max(map(len, tokens_of)), 8),
        fanouts=tuple(map(_bound, fanouts)),
        tail_from=tail_from,
    )
    if like and shapes.fit(_Shapes.of(like)):
        shapes = _Shapes.of(like)
    token_LxS = np.zeros((L, shapes.symbols), np.int32)
    for position, tokens in enumerate(tokens_of):
        token_LxS[position, : len(tokens)] = tokens
    symbol_dtype, degree_dtype = edge_dtypes(shapes.symbols, shapes.fanouts)
    trie = Trie(
        token_LxS,
        _joined(symbols, symbol_dtype, shapes.edges),
        _joined(degrees, degree_dtype, shapes.edges),
        _joined(children, np.int32, shapes.edges),
        _tails(symbol_NxL[:, shapes.tail_from :], shapes.symbol_bits, shapes.rows),
        np.int32(len(symbols[0]) if symbols else 0),
        shapes.fanouts,
        shapes.tail_from,
        shapes.symbol_bits,
    )
    return trie, row_N


def edge_dtypes(symbols: int, fanouts: tuple[int, ...]) -> tuple[np.dtype, np.dtype]:
    """The smallest dtypes of `symbol_E` and `degree_E`: of so many symbols, and bounds of children."""
    return np.min_scalar_type(symbols - 1), np.min_scalar_type(max(fanouts[1:], default=0))


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """What the compiled search depends on."""

    edges: int
    rows: int
    symbols: int
    fanouts: tuple[int, ...]
    tail_from: int

    @property
    def symbol_bits(self) -> int:
        return (self.symbols - 1).bit_length()

    @classmethod
    def of(cls, trie: Trie) -> "_Shapes":
        rows = trie.tails.size // trie.row_bits * 32 if trie.row_bits else 0
        return cls(trie.symbol_E.size, rows, trie.token_LxS.shape[1], trie.fanouts, trie.tail_from)

    def fit(self, others: "_Shapes") -> bool:
        """Whether a trie of these shapes can be padded to the others."""
        return (
            len(self.fanouts) == len(others.fanouts)
            and self.edges <= others.edges
            and (self.rows <= others.rows or others.tail_from == len(others.fanouts))
            and self.symbols <= others.symbols
            and all(a <= b for a, b in zip(self.fanouts, others.fanouts, strict=True))
            and self.tail_from >= others.tail_from
        )


def _room(n: int) -> int:
    """A size with room for 0.4% to 1.2% more, in steps, so that a slightly larger table has it too."""
    return round_up(n + n // 256 + 1, max(64, 1 << max(n.bit_length() - 8, 0)))


def _bound(fanout: int) -> int:
    """A fan-out rounded up by at most an eighth (from 8 on)."""
    return round_up(fanout, 1 << max((fanout - 1).bit_length() - 4, 0))


def _joined(parts: list[np.ndarray], dtype: type, size: int) -> np.ndarray:
    joined = np.zeros(size, dtype)
    if parts:
        np.concatenate(parts, out=joined[: sum(map(len, parts))])
    return joined


def _symbols(tokens_NxL: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """(the tokens that each position has, ascending; the docids as numbers of those, uint8 or uint16)."""
    N, L = tokens_NxL.shape
    seen_LxV = np.zeros((L, int(tokens_NxL.max()) + 1), bool)
    for first in range(0, N, _BLOCK):
        block = np.asarray(tokens_NxL[first : first + _BLOCK])
        real = block != 0
        if not real[:, 0].all() or (real[:, 1:] & ~real[:, :-1]).any():
            raise ValueError("a docid is empty or has a 0 (padding) inside")
        for position in range(L):
            seen_LxV[position, block[:, position]] = True
    tokens_of = [np.flatnonzero(seen_V) for seen_V in seen_LxV]
    most = max(map(len, tokens_of))
    if most > 1 << 16:
        raise ValueError(f"docids have {most} tokens at one position: at most 65,536 can be searched")
    dtype = np.uint8 if most <= 1 << 8 else np.uint16
    symbol_of_LxV = (np.cumsum(seen_LxV, axis=1) - 1).astype(dtype)
    symbol_NxL = np.empty((N, L), dtype)
    for first in range(0, N, _BLOCK):
        block = np.asarray(tokens_NxL[first : first + _BLOCK])
        for position in range(L):
            symbol_NxL[first : first + _BLOCK, position] = symbol_of_LxV[position, block[:, position]]
    return tokens_of, symbol_NxL


def _tails(symbol_NxT: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """uint32: the rows' symbols one after another, `bits` each; room for `rows` rows (a multiple of 32)."""
    N, T = symbol_NxT.shape
    row_bits = T * bits
    words = np.zeros(rows // 32 * row_bits, np.uint32)
    # After `period` rows the symbols' places in the words repeat.
    period = 32 // math.gcd(row_bits, 32) if T else 1
    for first in range(0, N if T else 0, _BLOCK):
        block = symbol_NxT[first : first + _BLOCK].astype(np.uint32)
        block = np.pad(block, ((0, -len(block) % 32), (0, 0))).reshape(-1, period, T)
        start = first // 32 * row_bits
        out = words[start : start + block.size * bits // 32].reshape(len(block), -1)
        for row in range(period):
            for column in range(T):
                word, shift = divmod(row * row_bits + column * bits, 32)
                out[:, word] |= block[:, row, column] << np.uint32(shift)
                if shift + bits > 32:
                    out[:, word + 1] |= block[:, row, column] >> np.uint32(32 - shift)
    return words
