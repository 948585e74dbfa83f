"""Which objective learns best from several positives a query, of people, of a teacher, and false ones?

    python benchmarks/multi_positive.py FOLDER… --work FOLDER [--steps N] [--layers N] [--quick]

The study of Wang et al. 2026 from small weights. A dual encoder learns on each collection (TSV or BEIR
folders) with InfoNCE on one positive, and with JointLH, SumMargLH, LSEPair and Rand1LH on --positives
(four), for equally many steps, by each kind of --labels:

    own                 the collection's labels, as people made them
    llm                 homogeneous labels of a teacher: of the own positives and of what BM25 found for the
                        query those that it scores at least .8 of the best, at most four
    mixture             each query has, by chance, either its own labels or the teacher's
    curriculum          the teacher's for three quarters of the steps, then the own
    false_20, false_40  own labels and false ones, so many that these are 20% or 40% of all, drawn from what
                        BM25 finds

The teacher is BM25 fused with a dual encoder that learned the own labels for --teacher_steps; weights are
chosen on dev queries. An LLM that judges would know no labels; this teacher learned those of the very train
queries that it labels, so that its labels are nearer to the own ones, and it errs as such searchers do. What
BM25 finds else are hard negatives, three a query, with the other queries' passages. Each method also learns
with the teacher's scores of its candidates (--distillation: dense_kl, as in
runs/dual_encoder_distilled.gin).

The encoder has --layers, and weights that learned the collection's own text first: spans of passages find
the passages that they were cut from (the inverse cloze task, Lee et al. 2019) for --pretraining steps; 0
begins from random weights, other ones for each seed. --seeds are of the order of batches, of labels that are
drawn (false ones, the mixture's) and of Rand1LH's choices.
Nothing is chosen on test queries, or at all: optimiser and temperature are those of runs/dual_encoder.gin.
Where a folder has queries.lemmas (wordnet), lemmas with several positives are the queries, a tenth of them
for testing; --passages takes a part of these passages.

On real batches, at the first step and after the last one, the gradient of each objective on the positives
is measured by autodiff and compared with section 3's formulas: who of the positives has it, and how many
are pushed down.

Finished runs are kept in --work. Prints a table a collection, of means over seeds and test queries with 95%
intervals (`mean_interval`), and marks by ▲▼ what differs from InfoNCE on the same labels without
distillation: by the paired randomisation test over queries, of the means over seeds, p <= .05 after Holm's
correction over all methods, labels, metrics and collections; and, as that test takes these very seeds for
granted, by the interval of the difference over queries and seeds (`over_seeds` in the JSON). Draws --plot and
--gradients, and prints one line of JSON. Without a folder, --quick makes up a collection. The defaults, ten
methods by four kinds of labels and three seeds, were not run yet: benchmarks/RESULTS.md says what was.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import _quiet  # noqa: F401
import ir_measures
import jax
import jax.numpy as jnp
import numpy as np
from _allocation import OBJECTIVES, measure
from _positives import LABELS, OF_TEACHER, Data, batches, import_collection, spans
from _positives_told import METRICS, Method, compare, draw, draw_gradients, methods, tell
from flax.traverse_util import flatten_dict, unflatten_dict

from retrieval_jax.core import storage
from retrieval_jax.core.progress import bar, log
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.contrastive import info_nce
from retrieval_jax.models.distillation import dense_kl
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.search.exact import ExactSearch
from retrieval_jax.training.optimizers import adamw, learning_rate
from retrieval_jax.training.step import TrainState, abstract_state, initial_state, make_train_step

GRADIENT_BATCHES = 32
VERSION = 2  # of what a run measures, and how
BLOCK = 512  # passages that are encoded at once
TEMPERATURE = 0.1  # of the teacher's scores, which lie in 0 to 1; as in runs/ripor.gin


class Trainer:
    """One method's training: compiled once for each seed, of which Rand1LH's draws are."""

    def __init__(self, objective, layers: int, steps: int, distilled: bool = False):
        config = T5Config(
            8192, 256, 4, 64, 256, layers, 0, 0.0, embedding_init_std=0.05, branch_init_scale=1e-3
        )
        multipliers = {"embedding": 100.0, "projection_layer": 60.0}
        optimizer = adamw(learning_rate(1e-4, steps, 20, "linear"), b2=0.98, multipliers=multipliers)
        distillation = (lambda *scores: dense_kl(*scores, temperature=TEMPERATURE)) if distilled else None
        values = {"scale": 20.0, "objective": objective, "bidirectional": False, "distillation": distillation}
        self.model = DualEncoder(config, optimizer, 256, **values)
        self.mesh, self.steps = partitioning.make_mesh(), steps
        self.step_of_seed: dict[int, Callable] = {}
        self.encode = jax.jit(self.model.encode_passages)

    def begin(self, first: dict, seed: int, start: dict | None) -> TrainState:
        """Gives the state before the first step, of `start` or of random parameters."""
        shapes = {name: x.shape for name, x in first.items()}
        abstract = abstract_state(self.model, self.mesh, shapes)
        state = initial_state(self.model, abstract, shapes, seed)
        if start is not None:  # a step may take the memory of the state that it is given
            state = state.replace(params=jax.tree.map(jnp.array, start))
        if seed not in self.step_of_seed:
            self.step_of_seed[seed] = make_train_step(self.model, self.mesh, abstract, seed)
        return state

    def train(self, batches: Iterator[dict], seed: int, start: dict | None = None) -> dict:
        """Gives the parameters after the last step."""
        batch = next(batches)
        state = self.begin(batch, seed, start)
        for _ in range(self.steps):
            state, metrics = self.step_of_seed[seed](state, batch)
            batch = next(batches)
        if not np.isfinite(float(metrics["loss"])):
            raise SystemExit("the loss is not finite")
        return state.params

    def measure(self, params: dict, data: Data) -> dict[str, list[float]]:
        """Metric -> its values by test query."""
        vectors = np.concatenate(
            [
                np.asarray(self.encode(params, np.pad(some, ((0, BLOCK - len(some)), (0, 0)))))[: len(some)]
                for some in np.split(data.passages_NxP, range(BLOCK, len(data.passages_NxP), BLOCK))
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


def pretrained(data: Data, folder: Path, args: argparse.Namespace) -> dict | None:
    """Gives the weights that learned the collection's own text; None: random ones."""
    if not args.pretraining:
        return None
    sizes = f"{args.pretraining}_{args.layers}_{args.batch}"
    path = folder / f"pretrained_{sizes}_{data.fingerprint}.npz"
    if not path.exists():
        log(f"the weights that all begin with: {args.pretraining} steps of spans and their passages")
        trainer = Trainer(info_nce, args.layers, args.pretraining)
        params = trainer.train(spans(data, 4 * args.batch, 0), 0)
        part = path.with_suffix(".part.npz")
        np.savez(part, **flatten_dict(jax.device_get(params), sep="/"))
        part.rename(path)
    with np.load(path) as arrays:
        return unflatten_dict({tuple(name.split("/")): arrays[name] for name in arrays})


def study(name: str, data: Data, folder: Path, args: argparse.Namespace) -> dict[tuple, dict]:
    """(method, labels) -> {metric: seeds × test queries, "start" and "end": see _allocation.measure}."""
    found: dict[tuple, dict] = defaultdict(lambda: defaultdict(list))
    start, todo = pretrained(data, folder, args), methods(args)
    with bar(name, len(todo) * len(args.labels) * args.seeds) as advance:
        for method in todo:
            objective = OBJECTIVES[method.objective]
            trainer = Trainer(objective, args.layers, args.steps, method.distilled)
            for labels in args.labels:
                for seed in range(args.seeds):
                    sizes = f"{args.steps}_{args.layers}_{args.pretraining}_{args.batch}_{data.fingerprint}"
                    path = folder / f"{str(method).replace(' ', '_')}_{labels}_{seed}_{sizes}_{VERSION}.json"
                    if not path.exists():
                        run_once(path, trainer, method, data, (labels, seed, args), start)
                    for metric, values in storage.read_json(path, "delete it").items():
                        found[method, labels][metric].append(values)
                    advance()
            jax.clear_caches()
    return {
        key: {m: v[0] if m in ("start", "end") else np.array(v) for m, v in by.items()}
        for key, by in found.items()
    }


def run_once(path: Path, trainer: Trainer, method: Method, data: Data, chosen: tuple, start) -> None:
    """Trains and measures one run, and writes what is known of it."""
    labels, seed, args = chosen

    def stream() -> Iterator[dict]:
        values = {"batch": args.batch, "seed": seed, "steps": args.steps}
        return batches(data, method.positives, labels, **values)

    params = trainer.train(stream(), seed, start)
    told = trainer.measure(params, data)
    if method.positives > 1 and seed == 0 and not method.distilled:
        some = [batch for batch, _ in zip(stream(), range(GRADIENT_BATCHES), strict=False)]
        names = [method.objective]
        for when, weights in (("start", trainer.begin(some[0], seed, start).params), ("end", params)):
            told[when] = measure(trainer.model, weights, some, names)[method.objective]
    storage.write_json(path, told)


def made_up(folder: Path) -> Path:
    """Writes a small collection: passages of a few topics, and queries that ask for two or three of one."""
    random, folder = np.random.default_rng(0), folder / "made_up"
    folder.mkdir(parents=True, exist_ok=True)
    words = np.array([f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"])
    topics = random.permutation(words)[:320].reshape(40, 8)
    docs = [random.choice(topic, 12) for topic in topics for _ in range(5)]
    (folder / "docs.tsv").write_text("".join(f"d{i}\t{d[0]}\t{' '.join(d)}\n" for i, d in enumerate(docs)))
    for split, count in {"train": 200, "dev": 20, "test": 40}.items():
        queries, qrels = [], []
        for number in range(count):
            topic = number % 40
            queries.append(f"{split}{number}\t{' '.join(random.choice(topics[topic], 3))}\n")
            answers = random.permutation(5)[: random.integers(2, 4)] + 5 * topic
            qrels += [f"{split}{number}\td{answer}\t1\n" for answer in answers]
        (folder / f"queries.{split}.tsv").write_text("".join(queries))
        (folder / f"qrels.{split}.tsv").write_text("".join(qrels))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collections", type=Path, nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--pretraining", type=int, default=300, help="steps on the collection's own text")
    parser.add_argument("--teacher_steps", type=int, default=300, help="0: no teacher")
    parser.add_argument("--objectives", nargs="+", default=[*OBJECTIVES][1:], choices=[*OBJECTIVES][1:])
    parser.add_argument("--positives", nargs="+", type=int, default=[4], help="the most of a query")
    parser.add_argument("--labels", nargs="+", default=LABELS[:4], choices=LABELS)
    parser.add_argument("--distillation", nargs="+", type=int, default=[0, 1], choices=(0, 1))
    parser.add_argument("--passages", type=int, help="of wordnet's lemmas; None: all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--gradients", type=Path, help="the plot of the gradients")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    args = parser.parse_args()
    if args.quick:
        args.steps = args.pretraining = args.teacher_steps = 5
        args.seeds, args.labels, args.objectives = 1, ("llm", "own"), ["JointLH", "LSEPair"]
        args.distillation, args.batch = [0], 16
        args.collections = args.collections or [made_up(args.work)]
    if not args.collections:
        parser.error("no collection: name a folder")
    if not args.teacher_steps and ({*args.labels} & {*OF_TEACHER} or 1 in args.distillation):
        parser.error("--teacher_steps 0: labels and scores of a teacher need one")
    studies, quality = {}, {}
    for source in args.collections:
        work = Workspace(args.work / f"{source.name}_{args.passages or 'all'}")
        import_collection(source, work, args.passages, args.teacher_steps)
        data = Data.read(work)
        several = np.mean([len(labels) > 1 for labels in data.labels])
        log(
            f"{source.name}: {len(data.ids):,} passages, {len(data.labels):,} train queries, {several:.0%} "
            f"of them with several positives, {len(data.qrels):,} test queries"
        )
        runs = work.folder / "study"
        runs.mkdir(exist_ok=True)
        studies[source.name] = study(source.name, data, runs, args)
        if data.teacher:
            quality[source.name] = {"labels": {labels: data.quality(labels) for labels in args.labels}}
            log(f"labels beside the collection's own: {quality[source.name]['labels']}")
    differences = compare(studies, args)
    told = {
        name: tell(name, found, differences, args) | quality.get(name, {}) for name, found in studies.items()
    }
    if args.plot:
        draw(told, args)
    if args.gradients:
        draw_gradients(told, args)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
