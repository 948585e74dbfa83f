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
from retrieval_jax.docids.kinds import (
    DocidKind,
    DocidRequest,
    DocidResult,
    check_dimensions,
    digits_needed,
    register_docid_kind,
)
from retrieval_jax.docids.table import DocidShape
from retrieval_jax.mesh.partitioning import all_devices

FILE = "clusters.safetensors"


@gin.configurable("semantic")
@dataclasses.dataclass(frozen=True)
class Settings:
    """How the tree is grown.

    Attributes:
      clusters_per_node: number of clusters that a node is split into, at most.
      leaf_size: a node of no more passages than this is not split.
    """

    clusters_per_node: int = 10
    leaf_size: int = 100

    def __post_init__(self):
        for name, least in (("clusters_per_node", 2), ("leaf_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"semantic.{name}: {getattr(self, name)} is too few: set at least {least}")


@dataclasses.dataclass
class Tree:
    """A hierarchical clustering of M nodes. Node 0 is the root; the children of a node are consecutive.

    Attributes:
      centroids_MxE: float32; the centroid of the root is zero.
      first_child_M: int32; digit d of a node leads to the node first_child + d.
      children_M: int32, number of children of a node, 0 for a leaf.
      next_index_M: int32, the index within a leaf that its next passage gets.
    """

    centroids_MxE: np.ndarray
    first_child_M: np.ndarray
    children_M: np.ndarray
    next_index_M: np.ndarray

    def paths(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (digits of the path to each node, M×depth, padded with 0; int32 M: depth of each node)."""
        inner = np.flatnonzero(self.children_M)
        # In this order, their children one after another are all nodes but the root.
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
        """Assigns vectors to leaves: from the root, always to the child with the nearest centroid.

        Args:
          vectors: N×E of any float type, maybe mapped from a file.
          rows: int, the rows of `vectors` to assign.

        Returns:
          int32, the leaf of each of `rows`.
        """
        leaves = np.zeros(len(rows), np.int32)
        digits = np.arange(self.children_M.max())
        with bar("descending", len(rows)) as advance:
            for first in range(0, len(rows), 1024):
                block = slice(first, first + 1024)
                x_BxE, node_B = np.asarray(vectors[rows[block]], np.float32), leaves[block]
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
        """Assigns to each passage, in row order, the next free index within its leaf (int64)."""
        order = np.argsort(leaves, kind="stable")
        counts = np.bincount(leaves, minlength=len(self.next_index_M))
        index_N = np.empty(len(leaves), np.int64)
        index_N[order] = np.arange(len(leaves)) - np.repeat(np.cumsum(counts) - counts, counts)
        index_N += self.next_index_M[leaves]
        self.next_index_M = (self.next_index_M + counts).astype(np.int32)
        return index_N

    def write(self, folder: Path) -> None:
        """Writes the tree into a docid table's folder."""
        storage.write_arrays(folder / FILE, self)

    @classmethod
    def open(cls, folder: Path) -> "Tree":
        """Reads the tree of a docid table. Raises UserError where the folder holds no readable tree."""
        return storage.read_arrays(folder / FILE, cls, "make the docids again without EXTENDS")


class _Growing:
    """A tree while it grows. A node is a span of `order`, which has the rows, ascending in each node."""

    def __init__(self, vectors: np.ndarray, settings: Settings, seed: int, mesh: Mesh):
        self.vectors, self.settings, self.seed, self.mesh = vectors, settings, seed, mesh
        self.order = np.arange(len(vectors), dtype=np.int32)
        self.spans = [(0, len(vectors))]
        self.children = [(0, 0)]  # first, count
        self.centroids = [np.zeros((1, vectors.shape[1]), np.float32)]

    def rows(self, node: int) -> np.ndarray:
        """Returns the rows of a node."""
        return self.order[slice(*self.spans[node])]

    def size(self, node: int) -> int:
        """Returns the number of rows of a node."""
        first, last = self.spans[node]
        return last - first

    def split(self, node: int, centroids_KxE: np.ndarray, codes: np.ndarray) -> list[int]:
        """Gives a node one child per cluster, unless all its rows are in one cluster: then it stays a leaf.

        Returns:
          The children that have to be split in turn.
        """
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
        """Splits every node that is too large; whole subtrees at once where their vectors fit in memory."""
        place = np.empty(len(self.order), np.int32)  # of a row in the vectors that are in memory
        todo = [0] if self.size(0) > self.settings.leaf_size else []
        with bar("clustering", len(self.order)) as advance:
            while todo:
                node = todo.pop()
                if 4 * self.size(node) * self.vectors.shape[1] > clustering.IN_MEMORY_BYTES:
                    todo += self.split(node, *self.cluster(node, self.vectors, self.rows(node), advance))
                    continue
                rows = self.rows(node).copy()
                vectors = np.asarray(self.vectors[rows], np.float32)
                place[rows] = np.arange(len(rows))
                self.grow_in_memory(node, vectors, place, advance)
            advance(0, note="")

    def grow_in_memory(self, node: int, vectors: np.ndarray, place: np.ndarray, advance) -> None:
        """Splits a node and all below it, level by level; `vectors` are its rows', in memory, at `place`."""
        level, settings = [node], self.settings
        while level:
            large = [node for node in level if self.size(node) > clustering.SMALL_SET_SIZES[-1]]
            small = [node for node in level if self.size(node) <= clustering.SMALL_SET_SIZES[-1]]
            level = []
            for node in large:
                level += self.split(node, *self.cluster(node, vectors, place[self.rows(node)], advance))
            sets = [place[self.rows(node)] for node in small]
            spans = [self.spans[node] for node in small]
            done = clustering.kmeans_many(
                vectors, sets, spans, settings.clusters_per_node, self.seed, self.mesh
            )
            for which, centroids, codes in done:
                children = self.split(small[which], centroids, codes)
                advance(self.size(small[which]) - sum(map(self.size, children)))
                level += children

    def cluster(self, node: int, vectors: np.ndarray, rows: np.ndarray, advance) -> tuple:
        """Clusters the rows of a large node: (centroids K×E, the cluster of each row)."""
        seed = int(np.random.SeedSequence([self.seed, *self.spans[node]]).generate_state(1)[0])

        def note(text):
            advance(0, note=f"{len(rows):,} rows, {text}")

        centroids = clustering.kmeans(vectors, self.settings.clusters_per_node, seed, rows, self.mesh, note)
        return centroids, clustering.assign(vectors, centroids, rows, self.mesh)

    def finish(self) -> tuple[Tree, np.ndarray]:
        """Returns (the tree, in whose leaves no index is assigned yet; int32, the leaf of each row)."""
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
    """Clusters vectors by recursive k-means.

    A node of more than `leaf_size` rows is split into up to `clusters_per_node` clusters, unless all its
    vectors are equal.

    Args:
      vectors: N×E of any float type, maybe mapped from a file.
      settings: how the tree is grown.
      seed: seed of the clustering.
      mesh: the devices to compute on; None for all devices.

    Returns:
      (the tree; int32 N, the leaf of each row).
    """
    growing = _Growing(vectors, settings, seed, mesh or all_devices())
    growing.grow()
    return growing.finish()


def count_digits(numbers: np.ndarray, base: int) -> np.ndarray:
    """Returns how many digits each number has in a base, without leading zeros (int64); 0 has one."""
    counts, power = np.ones(len(numbers), np.int64), base
    while (longer := numbers >= power).any():
        counts += longer
        power *= base
    return counts


def tokens(tree: Tree, leaves: np.ndarray, leaf_index_N: np.ndarray, base: int, two_d: bool) -> np.ndarray:
    """Writes docids: the digits of the path to the leaf, those of the index within the leaf, then the end.

    Digit d is the token 2 + d, or with `two_d` a token of the position, too: 2 + position·base + d (NCI, Wang
    et al. 2022, section 3.2).

    Args:
      tree: the tree.
      leaves: int N, the leaf of each passage.
      leaf_index_N: int64, the index of each passage within its leaf, which is written in base `base`.
      base: number of digits: the `clusters_per_node` that the tree was grown with.
      two_d: whether each position has tokens of its own (prefix-aware: PAWA).

    Returns:
      N×L of the smallest unsigned type, padded with 0.
    """
    paths_MxD, depth_M = tree.paths()
    count_N = count_digits(leaf_index_N, base)
    length = int((depth_M[leaves] + count_N).max(initial=0)) + 1
    docids = np.zeros((len(leaves), length), np.min_scalar_type(1 + base * (length if two_d else 1)))
    for first in range(0, len(leaves), 1 << 18):
        block = slice(first, first + (1 << 18))
        leaf, out = leaves[block], docids[block]
        depth_B, count_B = depth_M[leaf], count_N[block]
        for position in range(length):
            place = position - depth_B  # in the index, whose first digit is the most significant
            digit = leaf_index_N[block] // base ** np.clip(count_B - 1 - place, 0, count_B - 1) % base
            if position < paths_MxD.shape[1]:
                digit = np.where(place < 0, paths_MxD[leaf, position], digit)
            token = 2 + digit + (position * base if two_d else 0)
            out[:, position] = np.where(place < count_B, token, np.where(place == count_B, EOS, 0))
    return docids


def output_size(length: int, base: int, two_d: bool) -> int:
    """Returns the size of the softmax for docids of up to `length` tokens."""
    return round_up(2 + base * (length if two_d else 1), 128)


@register_docid_kind
class Semantic(DocidKind):
    """The path in a tree of clusters and the index within the leaf, in one set of tokens (DSI)."""

    name = "semantic"
    settings = Settings
    needs_vectors = True
    two_d = False

    def build(self, request: DocidRequest) -> DocidResult:
        """See DocidKind."""
        tree, leaves = grow(request.vectors, request.settings, request.seed, request.mesh)
        return self._result(request, tree, leaves)

    def extend(self, request: DocidRequest) -> DocidResult:
        """See DocidKind. New passages descend the previous tree, and get the next indices of their leaves."""
        tree = Tree.open(request.previous.folder)
        check_dimensions(request, tree.centroids_MxE)
        return self._result(request, tree, tree.descend(request.vectors, request.rows))

    def _result(self, request: DocidRequest, tree: Tree, leaves: np.ndarray) -> DocidResult:
        base = request.settings.clusters_per_node
        tokens_NxL = tokens(tree, leaves, tree.take_leaf_indices(leaves), base, self.two_d)
        facts = {"clusters": len(tree.children_M)}
        return DocidResult(tokens_NxL, output_size(tokens_NxL.shape[1], base, self.two_d), facts, tree.write)

    def shape(self, passages: int, vocab_size: int) -> DocidShape:
        """See DocidKind.

        The path is taken to be twice as deep as in a tree of equally large clusters. (A simulated tree of
        unequal clusters took 12 tokens for 8.8 million passages; this gives 13.)
        """
        settings = self.settings()
        base = settings.clusters_per_node
        depth = digits_needed(-(-passages // settings.leaf_size) - 1, base)
        length = 2 * depth + digits_needed(settings.leaf_size - 1, base) + 1
        return DocidShape(length, output_size(length, base, self.two_d), tokens_per_position=1 + base)


@register_docid_kind
class Semantic2D(Semantic):
    """The same with tokens of its own for each position (NCI, whose decoder is PAWA)."""

    name = "semantic_2d"
    two_d = True
