"""Which objective learns best from several positives a query, and from false ones? A small study.

    python benchmarks/multi_positive.py FOLDER… --work FOLDER [--steps N] [--layers N] [--quick]

Trains a dual encoder on each collection (TSV or BEIR folders) with InfoNCE on one positive, and with JointLH,
SumMargLH, LSEPair and Rand1LH on two and four, for equally many steps, on its labels as they are and with
false positives among them: so many that 20% or 40% of a query's labels are false, drawn from what BM25 finds
for it (a judge who errs, errs on those). What BM25 finds else are its hard negatives, three a query, with the
other queries' passages. Three seeds each, which begin alike for all objectives. Where a folder has
queries.lemmas (wordnet), those with several positives are the queries, a tenth of them for testing.

From random weights: without layers (the default) the encoder is a bag of words, an embedding, a mean and a
projection, which learns within seconds on a processor. Nothing is chosen on test queries, or at all:
optimiser and temperature are those of runs/dual_encoder.gin.

Finished runs are kept in --work. Prints a table a collection, of means over seeds and test queries with 95%
intervals (bootstrap over queries), marks what differs from InfoNCE on the same labels (paired bootstrap),
draws --plot, and prints one line of JSON.
"""

import argparse
import dataclasses
import gzip
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import _quiet  # noqa: F401
import ir_measures
import jax
import numpy as np
from _verbs import run
from ir_measures import RR, R
from rich.console import Console
from rich.table import Table

from retrieval_jax.core import storage
from retrieval_jax.core.progress import bar, log
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.mined import MinedNegatives
from retrieval_jax.data.records import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.mesh import partitioning
from retrieval_jax.models import contrastive
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.exact import ExactSearch
from retrieval_jax.training.optimizers import adamw, learning_rate
from retrieval_jax.training.step import abstract_state, initial_state, make_train_step

OBJECTIVES = {
    "JointLH": contrastive.joint_lh,
    "SumMargLH": contrastive.sum_marg_lh,
    "LSEPair": contrastive.lse_pair,
    "Rand1LH": contrastive.rand1_lh,
}
METHODS = [("InfoNCE", 1), *((name, m) for m in (2, 4) for name in OBJECTIVES)]
NOISE = (0.0, 0.2, 0.4)
NEGATIVES = 3
LENGTHS = 16, 48  # tokens of a query, of a passage
METRICS = {"MRR@10": RR @ 10, "Recall@100": R @ 100}


def import_collection(source: Path, work: Workspace) -> None:
    """Imports a folder, and mines BM25's negatives of its train queries."""
    if list(source.glob("queries.lemmas*")):
        source = lemmas(source, work.folder / "source" / source.name)
    here = f"--gin.COLLECTION={str(source)!r}", f"--gin.WORK_DIR={str(work.folder)!r}"
    run("import", *here, "--gin.import_collection.vocab_size=8192")
    run("index", *here)
    run("mine", *here, "--gin.mine.depth=40", "--gin.mine.negatives_per_query=20")


def lemmas(source: Path, folder: Path) -> Path:
    """The passages, with lemmas that have several positives as queries: a tenth test, 8,000 of the others."""
    if (folder / "docs.tsv.gz").exists():  # the last to be written
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(source / "queries.lemmas.tsv.gz", "rt") as file:
        texts = dict(line.rstrip("\n").split("\t") for line in file)
    qrels = defaultdict(list)
    with gzip.open(source / "qrels.lemmas.tsv.gz", "rt") as file:
        for line in file:
            qrels[line.split("\t")[0]].append(line)
    several = sorted((q for q in qrels if len(qrels[q]) > 1), key=storage.hash_fraction)
    tenth = len(several) // 10
    for split, queries in {"test": several[:tenth], "train": several[tenth : tenth + 8000]}.items():
        (folder / f"queries.{split}.tsv").write_text("".join(f"{q}\t{texts[q]}\n" for q in queries))
        (folder / f"qrels.{split}.tsv").write_text("".join(line for q in queries for line in qrels[q]))
    shutil.copyfile(source / "docs.tsv.gz", folder / "docs.tsv.gz")
    return folder


@dataclasses.dataclass
class Data:
    """A collection in memory, as tokens; `labels` and `mined` are rows of each train query's passages."""

    ids: list[str]
    passages_NxP: np.ndarray
    queries_QxS: np.ndarray
    labels: list[list[int]]
    mined: list[list[int]]
    tests_TxS: np.ndarray
    qrels: dict[str, dict[str, int]]

    @classmethod
    def read(cls, work: Workspace) -> "Data":
        collection = Collection(work.collection)
        vocabulary = Vocabulary(collection.vocabulary_path)
        train, test = collection.queries("train"), collection.queries("test")
        mined = MinedNegatives(work.negatives("bm25")).of_queries(collection)
        passages = [p.full_text for p in collection.passages()]
        return cls(
            collection.ids.to_pylist(),
            vocabulary.batch(passages, LENGTHS[1]),
            vocabulary.batch([q.text for q in train], LENGTHS[0]),
            [collection.find_rows(list(q.positives)).tolist() for q in train],
            [collection.find_rows(list(mined.get(q.id, ()))).tolist() for q in train],
            vocabulary.batch([q.text for q in test], LENGTHS[0]),
            {q.id: q.positives for q in test},
        )

    def with_noise(self, share: float, seed: int) -> tuple[list[list[int]], list[list[int]]]:
        """(labels of which a share is false, the mined that are left)."""
        rng, labels, rest = np.random.default_rng(seed), [], []
        for right, found in zip(self.labels, self.mined, strict=True):
            count = int(len(right) * share / (1 - share) + rng.random())
            wrong = rng.choice(found, min(count, len(found)), replace=False).tolist()
            labels.append(right + wrong)
            rest.append([row for row in found if row not in wrong])
        return labels, rest


def batches(data: Data, positives: int, noise: float, batch: int, seed: int) -> Iterator[dict]:
    labels, mined = data.with_noise(noise, seed)
    rng, group = np.random.default_rng(seed + 1), positives + NEGATIVES
    known = 2 * max(map(len, data.labels)) + 1  # as wide for all labels
    while True:
        order = rng.permutation(len(labels))
        for chosen in order[: len(order) // batch * batch].reshape(-1, batch):
            made = {"passage": np.full((batch, group), -1), "other_positives": np.full((batch, known), -1)}
            made["grade"] = np.full((batch, group), -1)
            for row, query in enumerate(chosen):
                right = rng.permutation(labels[query])[:positives]
                wrong = rng.permutation(mined[query])[:NEGATIVES].astype(int)
                own = np.concatenate([right, wrong])
                made["passage"][row, : len(own)] = own
                made["grade"][row, : len(own)] = np.arange(len(own)) < len(right)
                made["other_positives"][row, : len(labels[query])] = labels[query]
            there = made["passage"][..., None] >= 0
            made["left_encoder_input_tokens"] = data.queries_QxS[chosen]
            made["right_encoder_input_tokens"] = np.where(there, data.passages_NxP[made["passage"]], 0)
            yield {name: x.astype(np.int32) for name, x in made.items()}


class Trainer:
    """One objective on groups of one size: compiled once, for all labels and seeds."""

    def __init__(self, objective, layers: int, steps: int):
        config = T5Config(
            8192, 256, 4, 64, 256, layers, 0, 0.0, embedding_init_std=0.05, branch_init_scale=1e-3
        )
        multipliers = {"embedding": 100.0, "projection_layer": 60.0}
        optimizer = adamw(learning_rate(1e-4, steps, 20, "linear"), b2=0.98, multipliers=multipliers)
        self.model = DualEncoder(config, optimizer, 256, scale=20.0, objective=objective, bidirectional=False)
        self.mesh, self.steps, self.step = partitioning.make_mesh(), steps, None
        self.encode = jax.jit(self.model.encode_passages)

    def train(self, batches: Iterator[dict], seed: int) -> dict:
        """Parameters."""
        first = next(batches)
        shapes = {name: x.shape for name, x in first.items()}
        abstract = abstract_state(self.model, self.mesh, shapes)
        state = initial_state(self.model, abstract, shapes, seed)
        self.step = self.step or make_train_step(self.model, self.mesh, abstract, seed)
        batch = first
        for _ in range(self.steps):
            state, metrics = self.step(state, batch)
            batch = next(batches)
        if not np.isfinite(float(metrics["loss"])):
            raise SystemExit("the loss is not finite")
        return state.params

    def measure(self, params: dict, data: Data) -> dict[str, list[float]]:
        """Metric -> its values by test query."""
        vectors = np.concatenate(
            [
                np.asarray(self.encode(params, np.pad(some, ((0, 4096 - len(some)), (0, 0)))))[: len(some)]
                for some in np.split(data.passages_NxP, range(4096, len(data.passages_NxP), 4096))
            ]
        )
        rows, _ = ExactSearch(vectors)(np.asarray(self.encode(params, data.tests_TxS)), 100)
        ranking = {
            query: {data.ids[row]: float(100 - i) for i, row in enumerate(found)}
            for query, found in zip(data.qrels, np.asarray(rows).tolist(), strict=True)
        }
        values = {
            (m.query_id, m.measure): m.value
            for m in ir_measures.iter_calc(METRICS.values(), data.qrels, ranking)
        }
        return {name: [values[q, measure] for q in data.qrels] for name, measure in METRICS.items()}


def study(name: str, data: Data, folder: Path, args) -> dict[tuple, dict[str, np.ndarray]]:
    """(objective, positives, noise) -> metric -> seeds × test queries."""
    found = defaultdict(lambda: defaultdict(list))
    with bar(name, len(METHODS) * len(NOISE) * args.seeds) as advance:
        for objective, positives in METHODS:
            trainer = Trainer(OBJECTIVES.get(objective, contrastive.info_nce), args.layers, args.steps)
            for noise in NOISE:
                for seed in range(args.seeds):
                    path = folder / f"{objective}_{positives}_{noise}_{seed}_{args.steps}_{args.layers}.json"
                    if not path.exists():
                        some = batches(data, positives, noise, args.batch, seed)
                        storage.write_json(path, trainer.measure(trainer.train(some, seed), data))
                    for metric, values in storage.read_json(path, "delete it").items():
                        found[objective, positives, noise][metric].append(values)
                    advance()
    return {key: {m: np.array(v) for m, v in by.items()} for key, by in found.items()}


def interval(values_SxQ: np.ndarray) -> tuple[float, float]:
    """95% of the mean over seeds and queries, by 2,000 draws of queries."""
    means = values_SxQ.mean(0)
    draws = np.random.default_rng(0).choice(means, (2000, len(means)))
    return tuple(np.quantile(draws.mean(1), (0.025, 0.975)))


def tell(name: str, found: dict) -> dict:
    """Prints the table; gives {"OBJECTIVE MOST NOISE": {metric: [mean, low, high]}}."""
    table, told = Table(*("objective", "positives"), title=name), {}
    for noise in NOISE:
        for metric in METRICS:
            table.add_column(f"{metric}\n{noise:.0%} false", justify="right")
    for objective, positives in METHODS:
        cells = []
        for noise in NOISE:
            key = f"{objective} {positives} {noise}"
            told[key] = {}
            for metric in METRICS:
                values = found[objective, positives, noise][metric]
                low, high = interval(values)
                less, more = interval(values - found["InfoNCE", 1, noise][metric])
                mark = "+" if less > 0 else "-" if more < 0 else ""
                cells.append(f"{values.mean():.3f} ±{(high - low) / 2:.3f}{mark:1}")
                told[key][metric] = [round(float(x), 4) for x in (values.mean(), low, high)]
        table.add_row(objective, str(positives), *cells)
    Console(width=140).print(table)
    return told


def draw(told: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(told), figsize=(4.2 * len(told), 6.4), squeeze=False, sharex=True)
    for column, (name, by) in enumerate(told.items()):
        for row, metric in enumerate(METRICS):
            ax = axes[row][column]
            for i, (objective, positives) in enumerate(m for m in METHODS if m[1] != 2):
                points = np.array([by[f"{objective} {positives} {noise}"][metric] for noise in NOISE]).T
                errors = np.abs(points[1:] - points[0])
                at = np.array(NOISE) * 100 + (i - 2) * 0.6
                ax.errorbar(
                    at, points[0], errors, marker="o", ms=4, capsize=2, label=f"{objective}, {positives}"
                )
            ax.set_title(name if row == 0 else "")
            ax.set_ylabel(metric if column == 0 else "")
            ax.grid(alpha=0.3)
        ax.set_xlabel("% of the labels that are false")
        ax.set_xticks([100 * noise for noise in NOISE])
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        lines, labels, loc="lower center", ncols=len(labels), title="objective, most positives a query"
    )
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collections", type=Path, nargs="+")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true", help="20 steps, one seed")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = 20, 1
    told = {}
    for source in args.collections:
        work = Workspace(args.work / source.name)
        import_collection(source, work)
        data = Data.read(work)
        several = np.mean([len(labels) > 1 for labels in data.labels])
        log(
            f"{source.name}: {len(data.ids):,} passages, {len(data.labels):,} train queries, {several:.0%} "
            f"of them with several positives, {len(data.qrels):,} test queries"
        )
        runs = work.folder / "study"
        runs.mkdir(exist_ok=True)
        told[source.name] = tell(source.name, study(source.name, data, runs, args))
    if args.plot:
        draw(told, args.plot)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
