"""How good docids are before any training: the shape of their trie, and prefixes that neighbours share."""

import io
import os

import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar
from retrieval_jax.core.storage import atomic_write
from retrieval_jax.docids.table import DocidTable, blocks


def report(
    table: DocidTable,
    vectors_NxE: np.ndarray | None = None,
    seed: int = 0,
    queries: int = 1000,
    neighbours: int = 10,
) -> dict:
    """Measures the quality of a docid table: the shape of its trie, and how docids agree with vectors.

    A node is a prefix of docids, its depth the number of tokens of that prefix. Each distinct docid counts
    once, except in "collisions", "perplexity" and "neighbours", which count passages (of several docids of a
    passage, "neighbours" compares the first, and the others count each). The report has:

      kind, passages, distinct: the docid kind, the number of passages, the number of different docids.
      collisions: the number of passages that share their docid, and the largest group that shares one.
      length: min, mean and max number of tokens of a docid.
      tokens_to_uniqueness: mean and max length (at least one) of the shortest prefix that no other docid has.
      fanout: for each depth with such nodes, the number of nodes with two or more docids, and the mean and
        max number of their children (different next tokens).
      leaves: a leaf is a node under which docids become unique by one more token; its size is the number of
        those docids. So every docid is in one leaf, whatever tokens follow. The number of leaves, the mean,
        median and max of their sizes, and how many leaves have sizes 1, 2–3, 4–7, 8–15, …
      entropy: for each position, the number of docids with a token there, the number of different tokens, and
        their entropy relative to its maximum, log(different tokens): 1 if all are used equally often (also if
        there is only one).
      perplexity: the codebook's at each position, the exponential of the entropy of the docids' tokens: how
        many tokens would be as diverse if all were used equally often.
      neighbours, if vectors are given: for random passages ("queries") and the nearest passages of each by
        cosine ("neighbours"), the share of pairs whose docids share a prefix of 1, 2, 3, … tokens, and the
        mean length of the shared prefix; beside it what is expected if the same docids are dealt to the
        passages at random; and the ratio of the two means (None if the latter is 0).

    Args:
      table: docids of which none is a prefix of another (`DocidTable.write` checks that).
      vectors_NxE: the passages' vectors, of any float type, maybe mapped from a file; None for no neighbours.
      seed: seed of the choice of queries.
      queries: number of passages whose neighbours are compared.
      neighbours: number of neighbours of each.

    Returns:
      The report, of plain JSON types.

    Raises:
      UserError: there are not as many vectors as passages.
    """
    tokens_NxL = table.tokens_NxL
    N, L = tokens_NxL.shape
    passages = len(table.passage_ids)
    if vectors_NxE is not None and len(vectors_NxE) != passages:
        raise UserError(
            f"docids/{table.kind}: {len(vectors_NxE)} vectors for {passages} passages: "
            "encode the same collection"
        )
    rows_N, shared_N = table.ordered
    length_N = np.concatenate([np.count_nonzero(tokens_NxL[rows], axis=1) for rows in blocks(N)])[rows_N]
    new = np.flatnonzero(shared_N < L)
    group_D = np.diff(new, append=N)
    length_D = length_N[new]
    unique_D = 1 + np.maximum(shared_N[new], np.append(shared_N[new[1:]], 0))
    fanout, leaves = _tree(shared_N[new], unique_D)
    result = {
        "kind": table.kind,
        "passages": passages,
        "distinct": len(new),
        "collisions": {"passages": int(group_D[group_D > 1].sum()), "largest": int(group_D.max())},
        "length": {"min": int(length_D.min()), "mean": float(length_D.mean()), "max": int(length_D.max())},
        "tokens_to_uniqueness": {"mean": float(unique_D.mean()), "max": int(unique_D.max())},
        "fanout": fanout,
        "leaves": leaves,
        "entropy": _entropy(tokens_NxL, np.sort(rows_N[new])),
        "perplexity": [float(np.exp(_entropy_of(np.bincount(tokens_NxL[:, i])[1:]))) for i in range(L)],
    }
    if vectors_NxE is not None and passages > 1:
        rng = np.random.default_rng(seed)
        query_Q = np.sort(rng.choice(passages, min(queries, passages), replace=False))
        near_QxK = nearest(vectors_NxE, query_Q, min(neighbours, passages - 1))
        by_chance = _shares_by_chance(np.minimum(shared_N, length_N), L)
        result["neighbours"] = _neighbours(tokens_NxL, query_Q, near_QxK, by_chance)
    return result


def _neighbours(
    tokens_NxL: np.ndarray, query_Q: np.ndarray, near_QxK: np.ndarray, by_chance: list[float]
) -> dict:
    """Returns `neighbours` of the rows `query_Q`, whose nearest rows are `near_QxK`."""
    shared_QxK = _common(tokens_NxL[query_Q][:, None], tokens_NxL[near_QxK])
    mean, chance = float(shared_QxK.mean()), sum(by_chance)
    return {
        "queries": len(query_Q),
        "neighbours": near_QxK.shape[1],
        "shares": [float((shared_QxK >= depth).mean()) for depth in range(1, tokens_NxL.shape[1] + 1)],
        "shares_by_chance": by_chance,
        "mean": mean,
        "mean_by_chance": chance,
        "ratio": mean / chance if chance else None,
    }


def nearest(vectors_NxE: np.ndarray, query_Q: np.ndarray, k: int, block: int = 1 << 14) -> np.ndarray:
    """Finds the nearest neighbours of vectors by cosine: exact, in float32.

    The vectors are read once. A vector of zeros has cosine 0 with all others.

    Args:
      vectors_NxE: any float type, maybe mapped from a file.
      query_Q: the rows whose neighbours are wanted.
      k: number of neighbours.
      block: number of rows that are read at once.

    Returns:
      int32, Q×k: rows, the nearest first; a row is not its own neighbour.
    """
    query_QxE = _unit(vectors_NxE[query_Q])
    best = jnp.full((len(query_Q), k), -jnp.inf), jnp.zeros((len(query_Q), k), jnp.int32)
    with bar("neighbours", len(vectors_NxE)) as advance:
        for rows in blocks(len(vectors_NxE), block):
            vectors_BxE = np.asarray(vectors_NxE[rows], np.float32)
            best = _nearer(best, query_QxE, query_Q, vectors_BxE, rows.start)
            advance(len(vectors_BxE))
    return np.asarray(best[1])


@jax.jit
def _nearer(best, query_QxE, query_Q, vectors_BxE, first) -> tuple[jax.Array, jax.Array]:
    """Merges the nearest rows so far with a block whose first row is `first`: (cosines Q×k, rows Q×k)."""
    scores_QxB = jnp.einsum("qe,be->qb", query_QxE, _unit(vectors_BxE), precision="highest")
    rows_B = first + jnp.arange(len(vectors_BxE), dtype=jnp.int32)
    scores_QxB = jnp.where(rows_B == query_Q[:, None], -jnp.inf, scores_QxB)
    rows_QxB = jnp.broadcast_to(rows_B, scores_QxB.shape)
    scores, rows = (jnp.concatenate(pair, 1) for pair in zip(best, (scores_QxB, rows_QxB), strict=True))
    scores_QxK, at_QxK = jax.lax.top_k(scores, best[0].shape[1])
    return scores_QxK, jnp.take_along_axis(rows, at_QxK, 1)


def _unit(vectors_BxE) -> jax.Array:
    vectors_BxE = jnp.asarray(vectors_BxE, jnp.float32)
    return vectors_BxE / jnp.maximum(jnp.linalg.norm(vectors_BxE, axis=1, keepdims=True), 1e-30)


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the length of the prefix that docids share (docids on the last axis, padded with 0)."""
    return ((a == b) & (a != 0)).cumprod(-1).sum(-1)


def _shares_by_chance(shared_N: np.ndarray, length: int) -> list[float]:
    """Returns the share of all pairs of passages whose docids share a prefix of 1, 2, … tokens.

    That is the expected share for any pairs if the docids are dealt to the passages at random.
    """
    N = len(shared_N)
    shares = []
    for depth in range(1, length + 1):
        first = np.flatnonzero(shared_N < depth)
        sizes = np.diff(first, append=N)
        shares.append(int(sizes @ (sizes - 1)) / (N * (N - 1)))
    return shares


def _tree(shared_D: np.ndarray, unique_D: np.ndarray) -> tuple[list[dict], dict]:
    """Returns `fanout` and `leaves` of sorted, distinct docids; `shared_D` is with the docid before."""
    fanout, leaf_sizes = [], []
    for depth in range(int(unique_D.max())):
        # A node of this depth is a run of docids; the first docid, which has none before it, starts one too.
        starts = shared_D < depth
        starts[0] = True
        first = np.flatnonzero(starts)
        inner = np.diff(first, append=len(shared_D)) > 1
        if inner.any():
            branches = np.add.reduceat(starts | (shared_D == depth), first, dtype=np.int64)[inner]
            fanout.append(
                {
                    "depth": depth,
                    "nodes": len(branches),
                    "mean": float(branches.mean()),
                    "max": int(branches.max()),
                }
            )
        sizes = np.add.reduceat(unique_D == depth + 1, first, dtype=np.int64)
        leaf_sizes.append(sizes[sizes > 0])
    sizes = np.concatenate(leaf_sizes)
    counts = np.bincount(np.frexp(sizes)[1] - 1)  # the exponent of 2, rounded down
    return fanout, {
        "leaves": len(sizes),
        "mean": float(sizes.mean()),
        "median": float(np.median(sizes)),
        "max": int(sizes.max()),
        "sizes": [
            {"from": 1 << i, "to": (2 << i) - 1, "leaves": int(count)} for i, count in enumerate(counts)
        ],
    }


def _entropy(tokens_NxL: np.ndarray, rows_D: np.ndarray) -> list[dict]:
    """Returns `entropy` of the docids in these rows."""
    found = []
    for position in range(tokens_NxL.shape[1]):
        counts = np.bincount(tokens_NxL[rows_D, position])[1:]
        counts = counts[counts > 0]
        relative = _entropy_of(counts) / np.log(len(counts)) if len(counts) > 1 else 1.0
        found.append(
            {
                "position": position + 1,
                "docids": int(counts.sum()),
                "used": len(counts),
                "relative": min(float(relative), 1.0),  # rounding
            }
        )
    return found


def _entropy_of(counts: np.ndarray) -> float:
    """Returns the entropy of a distribution, in nats, from counts."""
    share = counts[counts > 0] / counts.sum()
    return -float(share @ np.log(share))


_ONE, _OTHER = "#0072b2", "#e69f00"  # Okabe and Ito's colours, which colour-blind readers can tell apart


def plot(report: dict, path: str | os.PathLike) -> None:
    """Draws fan-out, leaf sizes and (if vectors were given) the prefixes that neighbours share, as one PNG.

    Args:
      report: what `report` gave.
      path: the file to write.

    Raises:
      UserError: the path cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import, and only pictures need it

    panels = [_draw_fanout, _draw_leaves, *([_draw_neighbours] if "neighbours" in report else [])]
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained", dpi=150)
    figure.suptitle(
        f"{report['kind']}: {report['distinct']:,} docids of {report['passages']:,} passages",
        fontweight="bold",
    )
    for axes, draw in zip(figure.subplots(1, len(panels)), panels, strict=True):
        draw(axes, report)
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    atomic_write(path, png.getvalue())


def _draw_fanout(axes, report: dict) -> None:
    depths = [level["depth"] for level in report["fanout"]]
    for key, colour in (("max", _OTHER), ("mean", _ONE)):
        axes.plot(depths, [level[key] for level in report["fanout"]], "o-", color=colour, label=key)
    axes.set(xlabel="tokens written so far", ylabel="tokens to choose from")
    axes.set_yscale("log", base=2)
    axes.set_ylim(1, 2 * max((level["max"] for level in report["fanout"]), default=1))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(-0.3, max(depths, default=0) + 0.3)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(frameon=False)
    unique = report["tokens_to_uniqueness"]["mean"]
    axes.set_title(f"Fan-out: a docid is unique after {unique:.1f} tokens", loc="left", fontsize="medium")


def _draw_leaves(axes, report: dict) -> None:
    bins = report["leaves"]["sizes"]
    smallest = next(i for i, size_bin in enumerate(bins) if size_bin["leaves"])
    counts = {_range(size_bin): size_bin["leaves"] for size_bin in bins[smallest:]}
    bars = axes.bar(list(counts), list(counts.values()), width=0.85, color=_ONE)
    axes.bar_label(bars, [f"{count:,}" if count else "" for count in counts.values()], fontsize="x-small")
    if len(counts) > 5:
        axes.tick_params(axis="x", labelsize="x-small", rotation=40)
    axes.set(xlabel="docids in the leaf", ylabel="leaves")
    middle, half = (len(counts) - 1) / 2, max(len(counts), 4) / 2  # a single bar stays slim
    axes.set_xlim(middle - half, middle + half)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    mean = report["leaves"]["mean"]
    axes.set_title(f"Leaves: {mean:,.1f} docids each", loc="left", fontsize="medium")


def _draw_neighbours(axes, report: dict) -> None:
    found = report["neighbours"]
    chance = found["shares_by_chance"]
    seen = [share for share in found["shares"] + chance if share]
    for shares, mean, colour, name in (
        (found["shares"], found["mean"], _ONE, "these docids"),
        (chance, found["mean_by_chance"], _OTHER, "dealt at random"),
    ):
        depths = [depth for depth, share in enumerate(shares, 1) if share]  # a log axis has no 0
        label = f"{name}: {mean:.2g} tokens on average"
        axes.plot(depths, [shares[depth - 1] for depth in depths], "o-", color=colour, label=label)
    axes.set(xlabel="tokens of the prefix", ylabel="share of neighbours with the prefix", yscale="log")
    axes.set_ylim(min(seen, default=1) / 30, 1)  # room for the legend
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(frameon=False, loc="lower left")
    times = f"{found['ratio']:,.1f} times chance" if found["ratio"] else "none is shared"
    axes.set_title(f"Prefixes of near neighbours: {times}", loc="left", fontsize="medium")


def _range(size_bin: dict) -> str:
    low, high = size_bin["from"], size_bin["to"]
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
