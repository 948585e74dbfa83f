"""Semantic docids: the path to a passage in a tree of clusters (DSI, Tay et al. 2022, section 3.2)."""

import dataclasses
from pathlib import Path

import gin
import numpy as np
from jax.sharding import Mesh

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar
from retrieval_jax.data.vocabulary import EOS, round_up
from retrieval_jax.docids import clustering
from retrieval_jax.mesh.partitioning import all_devices

FILE = "clusters.safetensors"


@gin.configurable("semantic")
@dataclasses.dataclass(frozen=True)
class Settings:
    """How the tree is grown: children of a cluster, and passages that a leaf may hold."""

    clusters_per_node: int = 10
    leaf_size: int = 100

    def __post_init__(self):
        for name, least in (("clusters_per_node", 2), ("leaf_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"semantic.{name}: {getattr(self, name)} is too few: set at least {least}")


@dataclasses.dataclass
class Tree:
    """Clusters of clusters. Node 0 is the root; a node's children are neighbours.

    Attributes:
      centroids_MxE: float32; the root's is zero.
      first_child_M, children_M: int32; a node's digit d leads to first_child + d; a leaf has no children.
      next_index_M: int32; the number that the next passage of a leaf takes.
    """

    centroids_MxE: np.ndarray
    first_child_M: np.ndarray
    children_M: np.ndarray
    next_index_M: np.ndarray

    def paths(self) -> tuple[np.ndarray, np.ndarray]:
        """(digits on the way to each node, nodes × depth, padded with 0; depth of each node)."""
        inner = np.flatnonzero(self.children_M)
        # In this order their children, one after the other, are all nodes but the root.
        inner = inner[np.argsort(self.first_child_M[inner])]
        parent_M = np.r_[0, np.repeat(inner, self.children_M[inner])]
        digit_M = np.arange(len(parent_M)) - self.first_child_M[parent_M]
        depth_M = np.full(len(parent_M), -1, np.int32)
        depth_M[0], columns = 0, []
        while len(here := np.flatnonzero((depth_M[parent_M] == len(columns)) & (depth_M < 0))):
            for column in columns:
                column[here] = column[parent_M[here]]
            columns.append(np.zeros(len(parent_M), np.min_scalar_type(self.children_M.max())))
            columns[-1][here] = digit_M[here]
            depth_M[here] = len(columns)
        return np.stack(columns, 1) if columns else np.zeros((1, 0), np.uint8), depth_M

    def descend(self, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """int32: the leaf that each of the vectors (N×E) at `rows` comes to, by the nearest centroids."""
        leaves = np.zeros(len(rows), np.int32)
        digits = np.arange(self.children_M.max())
        with bar("descending", len(rows)) as advance:
            for first in range(0, len(rows), 1024):
                some = slice(first, first + 1024)
                x_BxE, node_B = np.asarray(vectors[rows[some]], np.float32), leaves[some]
                while (inner := self.children_M[node_B] > 0).any():
                    at, x = node_B[inner], x_BxE[inner, None]
                    there = digits < self.children_M[at][:, None]
                    child_BxK = self.first_child_M[at][:, None] + np.where(there, digits, 0)
                    distances = ((x - self.centroids_MxE[child_BxK]) ** 2).sum(-1)
                    digit = np.where(there, distances, np.inf).argmin(-1)
                    node_B[inner] = self.first_child_M[at] + digit
                advance(len(node_B))
        return leaves

    def take_leaf_indices(self, leaves: np.ndarray) -> np.ndarray:
        """int64: for each passage, in row order, the next number of its leaf, which is then taken."""
        order = np.argsort(leaves, kind="stable")
        counts = np.bincount(leaves, minlength=len(self.next_index_M))
        numbers = np.empty(len(leaves), np.int64)
        numbers[order] = np.arange(len(leaves)) - np.repeat(np.cumsum(counts) - counts, counts)
        numbers += self.next_index_M[leaves]
        self.next_index_M = (self.next_index_M + counts).astype(np.int32)
        return numbers

    def write(self, folder: Path) -> None:
        storage.write_arrays(folder / FILE, self)

    @classmethod
    def open(cls, folder: Path) -> "Tree":
        """Raises UserError where the folder holds no readable tree."""
        return storage.read_arrays(folder / FILE, cls, "make the docids again without EXTENDS")


class _Growing:
    """A tree while it grows. Each node is a span of `order`, which holds the rows, ascending in each node."""

    def __init__(self, vectors: np.ndarray, settings: Settings, seed: int, mesh: Mesh):
        self.vectors, self.settings, self.seed, self.mesh = vectors, settings, seed, mesh
        self.order = np.arange(len(vectors), dtype=np.int32)
        self.spans = [(0, len(vectors))]
        self.children = [(0, 0)]  # first, count
        self.centroids = [np.zeros((1, vectors.shape[1]), np.float32)]

    def rows(self, node: int) -> np.ndarray:
        return self.order[slice(*self.spans[node])]

    def size(self, node: int) -> int:
        first, last = self.spans[node]
        return last - first

    def split(self, node: int, centroids_KxE: np.ndarray, codes: np.ndarray) -> list[int]:
        """Gives a node a child a code; the children. One that falls into one part alone stays a leaf."""
        counts = np.bincount(codes, minlength=len(centroids_KxE))
        there = np.flatnonzero(counts)
        if len(there) < 2:
            return []
        first, last = self.spans[node]
        self.order[first:last] = self.order[first:last][np.argsort(codes, kind="stable")]
        ends = (first + np.cumsum(counts[there])).tolist()
        child = len(self.spans)
        self.children[node] = (child, len(there))
        self.spans += zip([first, *ends[:-1]], ends, strict=True)
        self.children += [(0, 0)] * len(there)
        self.centroids.append(centroids_KxE[there])
        return [c for c in range(child, child + len(there)) if self.size(c) > self.settings.leaf_size]

    def grow(self) -> None:
        """Splits what is too large: from disk what exceeds the memory, whole subtrees of the rest in it."""
        place = np.empty(len(self.order), np.int32)  # of a row in the vectors that are in memory
        todo = [0] if self.size(0) > self.settings.leaf_size else []
        with bar("clustering", len(self.order)) as advance:
            while todo:
                node = todo.pop()
                if 4 * self.size(node) * self.vectors.shape[1] > clustering.KEPT:
                    todo += self.split(node, *self.cluster(node, self.vectors, self.rows(node), advance))
                    continue
                rows = self.rows(node).copy()
                vectors = np.asarray(self.vectors[rows], np.float32)
                place[rows] = np.arange(len(rows))
                self.grow_in_memory(node, vectors, place, advance)
            advance(0, note="")

    def grow_in_memory(self, node: int, vectors: np.ndarray, place: np.ndarray, advance) -> None:
        level, settings = [node], self.settings
        while level:
            large = [node for node in level if self.size(node) > clustering.SMALL[-1]]
            small = [node for node in level if self.size(node) <= clustering.SMALL[-1]]
            level = []
            for node in large:
                level += self.split(node, *self.cluster(node, vectors, place[self.rows(node)], advance))
            sets = [place[self.rows(node)] for node in small]
            spans = [self.spans[node] for node in small]
            done = clustering.fit_many(vectors, sets, spans, settings.clusters_per_node, self.seed, self.mesh)
            for which, centroids, codes in done:
                children = self.split(small[which], centroids, codes)
                advance(self.size(small[which]) - sum(map(self.size, children)))
                level += children

    def cluster(self, node: int, vectors: np.ndarray, rows: np.ndarray, advance) -> tuple:
        seed = int(np.random.SeedSequence([self.seed, *self.spans[node]]).generate_state(1)[0])

        def note(text):
            advance(0, note=f"{len(rows):,} rows, {text}")

        centroids = clustering.fit(vectors, self.settings.clusters_per_node, seed, rows, self.mesh, note)
        return centroids, clustering.assign(vectors, centroids, rows, self.mesh)

    def finish(self) -> tuple[Tree, np.ndarray]:
        """(the tree with no passage taken in yet, int32 leaf of each row)."""
        first, count = np.array(self.children, np.int32).T.copy()
        tree = Tree(np.concatenate(self.centroids), first, count, np.zeros(len(count), np.int32))
        leaves = np.flatnonzero(count == 0)
        spans = np.array(self.spans)[leaves]
        by_place = np.argsort(spans[:, 0], kind="stable")
        leaf_N = np.empty(len(self.order), np.int32)
        leaf_N[self.order] = np.repeat(leaves[by_place], np.diff(spans[by_place]).ravel())
        return tree, leaf_N


def grow(
    vectors: np.ndarray, settings: Settings, seed: int, mesh: Mesh | None = None
) -> tuple[Tree, np.ndarray]:
    """Recursive k-means of the vectors (N×E, maybe memory-mapped): (the tree, int32 leaf of each row).

    A cluster of more than `leaf_size` rows is split into up to `clusters_per_node` clusters, unless all its
    vectors are equal.
    """
    growing = _Growing(vectors, settings, seed, mesh or all_devices())
    growing.grow()
    return growing.finish()


def count_digits(numbers: np.ndarray, base: int) -> np.ndarray:
    """int64: how many digits each number has, in that base and without leading zeros; 0 has one."""
    counts, power = np.ones(len(numbers), np.int64), base
    while (longer := numbers >= power).any():
        counts += longer
        power *= base
    return counts


def tokens(tree: Tree, leaves: np.ndarray, leaf_index_N: np.ndarray, base: int, two_d: bool) -> np.ndarray:
    """Docids, N×L, of passages by leaf and index within it: digits of the path, of the index, end, padding.

    A digit d is the token 2 + d, or with `two_d` (NCI, Wang et al. 2022, section 3.2) 2 + position·k + d.
    """
    paths_MxD, depth_M = tree.paths()
    count_N = count_digits(leaf_index_N, base)
    length = int((depth_M[leaves] + count_N).max(initial=0)) + 1
    docids = np.zeros((len(leaves), length), np.min_scalar_type(1 + base * (length if two_d else 1)))
    for first in range(0, len(leaves), 1 << 18):
        some = slice(first, first + (1 << 18))
        leaf, out = leaves[some], docids[some]
        depth_B, count_B = depth_M[leaf], count_N[some]
        for position in range(length):
            place = position - depth_B  # in the index, whose first digit is the most significant
            digit = leaf_index_N[some] // base ** np.clip(count_B - 1 - place, 0, count_B - 1) % base
            if position < paths_MxD.shape[1]:
                digit = np.where(place < 0, paths_MxD[leaf, position], digit)
            token = 2 + digit + (position * base if two_d else 0)
            out[:, position] = np.where(place < count_B, token, np.where(place == count_B, EOS, 0))
    return docids


def output_size(length: int, base: int, two_d: bool) -> int:
    """Width of the softmax for docids of up to `length` tokens."""
    return round_up(2 + base * (length if two_d else 1), 128)
