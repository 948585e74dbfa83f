"""Makes and measures the points of the study of scale; what is finished is kept."""

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gin
import jax
import numpy as np
from _scaling_plan import BATCH, DENSE, MAIN, METHODS, REFERENCE, Choice, Point, Sizes

from retrieval_jax.checkpoints.model_folder import LoadedModel, load_model
from retrieval_jax.core import storage
from retrieval_jax.core.errors import Preempted
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.docids.token_sets import SetShape
from retrieval_jax.evaluation.metrics import chosen_metrics, evaluate_run
from retrieval_jax.evaluation.scaling_laws import contrastive_entropy
from retrieval_jax.examples.mixtures import PAPER_MIXTURES
from retrieval_jax.main import run
from retrieval_jax.search.searcher import Searcher
from retrieval_jax.training.families import family_of
from retrieval_jax.training.flops import model_flops
from retrieval_jax.training.shapes import batch_shapes
from retrieval_jax.verbs.table import configure_verbs
from retrieval_jax.verbs.train import TrainConfig

METRICS = {"mrr_at_10": "RR@10", "recall_at_10": "R@10"}
DOC2QUERY = "doc2query"
OFTEN = 10**9  # steps between two evaluations in training: none


def _once(method: Callable) -> Callable:
    """Lets a study do a thing once, also if that fails: what several points need is not tried for each."""

    @functools.wraps(method)
    def call(study: "Study", *args: object) -> object:
        key = method.__name__, *args
        if key not in study.done:
            try:
                study.done[key] = method(study, *args)
            except Exception as error:
                study.done[key] = error
        if isinstance(study.done[key], Exception):
            raise study.done[key]
        return study.done[key]

    return call


class Study:
    """All corpora of one collection.

    Args:
      given: the collection, as `import` takes it.
      folder: where everything goes.
      choice, sizes: what is trained, and how much is measured.
      bindings: of the command line.
    """

    def __init__(self, given: str, folder: Path, choice: Choice, sizes: Sizes, bindings: list[str]):
        self.folder, self.sizes, self.bindings, self.done = folder, sizes, bindings, {}
        whole = Workspace(folder / "whole")
        run("import", [], [f"COLLECTION={given!r}", f"WORK_DIR={str(whole.folder)!r}", *bindings])
        self.whole = Collection(whole.collection)
        known = {min(size, self.whole.passage_count) for size in choice.sizes}
        self.choice = dataclasses.replace(choice, sizes=tuple(sorted(known)))
        self.source = cut(self.whole, folder / "source", sizes)

    @property
    def name(self) -> str:
        """The collection's name."""
        return self.whole.name

    def work(self, size: int) -> Workspace:
        """Gives the work folder of a corpus."""
        return Workspace(self.folder / str(size))

    def run(self, size: int, verb: str, *settings: str, files: tuple[str, ...] = ()) -> dict:
        """Runs a verb as the command line does, in this process."""
        return run(verb, [*files], [*self.here(size), *settings])

    def here(self, size: int) -> list[str]:
        """Gives the bindings of all verbs on a corpus."""
        return [
            f"COLLECTION={str(self.source)!r}",
            f"WORK_DIR={str(self.work(size).folder)!r}",
            f"VOCABULARY={str(self.whole.vocabulary_path)!r}",
            f"SUBSET={size}",
            *self.bindings,
        ]

    @_once
    def generator(self) -> str:
        """Trains the query generator, on the largest corpus's train queries; gives its folder."""
        size = max(self.choice.sizes)
        self.run(size, "import")
        model = str(self.work(size).model(self.generator_name))
        settings = self.generator_settings
        self.run(size, "train", f"MODEL_DIR={model!r}", *settings, files=("runs/doc2query.gin",))
        return model

    @property
    def generator_settings(self) -> list[str]:
        """The bindings of the query generator's training."""
        return [f"STEPS={self.sizes.generator_steps}", *_unevaluated()]

    @functools.cached_property
    def generator_name(self) -> str:
        """The name of the query generator's model, of all that it depends on."""
        configured = self.configured(("runs/doc2query.gin",), self.generator_settings)
        return f"{DOC2QUERY}_{storage.digest([repr(self.corpus(max(self.choice.sizes))), configured])}"

    @_once
    def prepare(self, size: int, synthetic: bool) -> None:
        """Imports a corpus, and makes its synthetic queries."""
        self.run(size, "import")
        if synthetic:
            count = f"generate_queries.count={self.sizes.generated}"
            self.run(size, "generate-queries", f"MODEL_DIR={self.generator()!r}", count)

    def settings(self, point: Point) -> list[str]:
        """Gives the bindings of a point's training."""
        method, tasks = METHODS[point.method], PAPER_MIXTURES[point.mixture]
        given = [*_network(point.width), *_unevaluated(), *method.settings, f"SEED={point.seed}"]
        given += [f"DataConfig.mixture={point.mixture!r}", f"train.batch_size={BATCH}"]
        given += [f"DataConfig.token_dropout={dict.fromkeys(tasks, 0.1)}"]
        return given + ([f"SYNTHETIC={DOC2QUERY!r}"] if point.reads_synthetic else [])

    def make_docids(self, point: Point) -> None:
        """Makes the docids that a point's model writes, and the dual encoder whose vectors they cluster."""
        method = METHODS[point.method]
        if not method.docids or method.verb != "train":
            return
        vectors = []
        if method.vectors:
            dense = Point(point.size, DENSE, MAIN)
            self.train(dense)
            vectors = [f"EMBEDDINGS={str(self.work(point.size).model(self.name_of(dense)))!r}"]
        self.run(point.size, "docids", f"DOCIDS={method.docids!r}", *vectors)

    def flops_per_step(self, point: Point, stage: str | None = None) -> int:
        """Counts the floating-point operations of a training step of a point.

        Those of a stage are known after its training, which the shapes of docids and sets come before.
        """
        method, work = METHODS[point.method], self.work(point.size)
        given = [*self.here(point.size), "STEPS=1", *self.settings(point)]
        if stage == "rank":
            given.append("SCORES='of_the_teacher'")
        table = sets = None
        if method.docids and stage not in ("dense", "query"):
            table = DocidTable.open(work.docids(method.docids))
        if method.verb == "pag" and stage != "dense":
            facts = storage.read_manifest(work.sets(self.name_of(point)), "sets")
            sets = SetShape(facts["m"], facts["impacts"])
        length = table.length if table else None
        vocabulary = Vocabulary(Collection(work.collection).vocabulary_path)
        configure_verbs([*method.files], given)  # after names, whose recipes are configured, too
        with gin.config_scope(stage):
            config = TrainConfig()
            model = config.make_model(vocabulary.size, table)
            target_type = family_of(config.retriever).targets_for(config.data)
            shapes = batch_shapes(target_type, config.data, config.batch_size, length, sets)
            return model_flops(model, shapes)

    def steps(self, point: Point) -> int:
        """Gives a point's steps: those of its budget."""
        steps = self.choice.steps_of(point.size)
        if point.budget == "examples":
            return steps
        reference = dataclasses.replace(point, method=REFERENCE, budget="examples")
        self.make_docids(reference)
        return max(round(steps * self.flops_per_step(reference) / self.flops_per_step(point)), 1)

    @_once
    def train(self, point: Point) -> dict:
        """Trains a point's model; gives its steps and floating-point operations."""
        method = METHODS[point.method]
        self.prepare(point.size, point.reads_synthetic)
        self.make_docids(point)
        steps = self.steps(point)
        if method.stages:
            stages = {k: max(round(share * steps), 1) if share else 0 for k, share in method.stages.items()}
            values = {"steps": stages, "name": self.name_of(point), "rounds": 1}
            given = [f"{method.verb}.{name}={value!r}" for name, value in values.items()]
            self.run(point.size, method.verb, *given, *self.settings(point), files=method.files)
            flops = sum(n * self.flops_per_step(point, stage) for stage, n in stages.items() if n)
            return {"steps": steps, "flops": flops}
        model = f"MODEL_DIR={str(self.work(point.size).model(self.name_of(point)))!r}"
        self.run(point.size, "train", f"STEPS={steps}", model, *self.settings(point), files=method.files)
        return {"steps": steps, "flops": steps * self.flops_per_step(point)}

    def index(self, point: Point) -> tuple[str, LoadedModel | None]:
        """Indexes a point's model; gives the searcher's name and the model."""
        method, work, name = METHODS[point.method], self.work(point.size), self.name_of(point)
        settings = [f"make_index.kind={method.kind!r}", f"make_index.name={name!r}"]
        if method.mixtures is None:
            self.prepare(point.size, point.reads_synthetic)
            expansion = [f"make_index.expansion={DOC2QUERY!r}"] if method.expansion else []
            self.run(point.size, "index", *settings, *expansion)
            return name, None
        if method.stages:
            return f"{name}_1", load_model(work.model(f"{name}_1"))
        self.run(point.size, "index", f"MODEL_DIR={str(work.model(name))!r}", *settings)
        return name, load_model(work.model(name))

    def corpus(self, size: int) -> dict:
        """Gives all that a corpus depends on."""
        chosen = {"asked": self.sizes.queries, "dev": self.sizes.dev}
        return {**self.whole.recipe(*self.whole.query_counts), "size": size, **chosen}

    def configured(self, files: Sequence[str], settings: list[str]) -> str:
        """Gives a digest of what gin files and settings say, included files and the command line's, too."""
        configure_verbs([*files], [*self.bindings, *settings])
        return storage.digest([gin.config_str()])

    @functools.cache  # noqa: B019 (one study a process)
    def recipe(self, point: Point) -> dict:
        """Gives all that a point's figures depend on; its digest is in the names of what is made of it."""
        method = METHODS[point.method]
        settings = self.settings(point) if method.mixtures else []
        reference = dataclasses.replace(point, method=REFERENCE, budget="examples")
        return {
            "point": dataclasses.asdict(point),
            "method": dataclasses.asdict(method),
            "corpus": self.corpus(point.size),
            "sizes": dataclasses.asdict(self.sizes),
            "steps": self.choice.steps_of(point.size),
            "settings": self.configured(method.files, settings),
            "generator": self.generator_name if point.reads_synthetic else None,
            "vectors": self.name_of(Point(point.size, DENSE, MAIN)) if method.vectors else None,
            "as_many_flops_as": self.name_of(reference) if point.budget == "flops" else None,
        }

    def name_of(self, point: Point) -> str:
        """Gives the name of a point's model, searcher and figures."""
        return f"{point.name}_{storage.digest([repr(self.recipe(point))])}"

    def file(self, point: Point) -> Path:
        """Gives the file of a point's figures."""
        return self.folder / "points" / f"{point.size}_{self.name_of(point)}.json"

    def measure(self, point: Point) -> dict:
        """Gives a point's figures, made now or earlier."""
        path = self.file(point)
        if path.exists():
            return storage.read_json(path, "delete it")
        began, figures = time.perf_counter(), {"steps": 0, "flops": 0}
        try:
            if METHODS[point.method].mixtures:
                figures = self.train(point)
            searcher, model = self.index(point)
            figures |= count_parameters(model) | self.search(point, searcher, model)
        except Preempted:
            raise
        except Exception:
            self.forget(point)  # as long as a model is there, its docids are not replaced
            raise
        figures |= {"recipe": self.recipe(point), "seconds": time.perf_counter() - began}
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(path, figures)
        if point != Point(point.size, DENSE, MAIN):  # whose vectors docids are made of
            self.forget(point)
        jax.clear_caches()
        return figures

    def forget(self, point: Point) -> None:
        """Deletes a measured point's model and searcher: those of a large corpus take much space."""
        training = ("train", point)
        if not isinstance(self.done.get(training), Exception):  # whoever needs the model trains it again
            self.done.pop(training, None)
        for folder in (self.work(point.size).folder / part for part in ("models", "searchers")):
            for made in folder.glob(f"{self.name_of(point)}*"):
                shutil.rmtree(made)

    def search(self, point: Point, name: str, model: LoadedModel | None) -> dict:
        """Answers the test queries, and scores their relevant passages and random ones."""
        work = self.work(point.size)
        collection, searcher = Collection(work.collection), Searcher.open(work.searcher(name))
        queries = collection.queries("test")
        found = dict(
            zip([q.id for q in queries], searcher.search([q.text for q in queries], 10), strict=True)
        )
        qrels = {query.id: query.relevant for query in queries}
        values = evaluate_run(qrels, found, metrics=chosen_metrics([*METRICS.values()])).per_query
        figures = {key: values[metric].tolist() for key, metric in METRICS.items()}
        positive_Q, negatives_QxDxR = self.scores(searcher, collection, queries[: self.sizes.scored])
        scale = getattr(model.model, "scale", 1.0) if model else 1.0  # of a dual encoder's cosines
        # Sums of raw logits, of methods that learn to rank, have no scale.
        has_entropy = model is not None and getattr(model.model, "sums_log_probs", True)
        # Of fewer passages than it wants, the entropy of a model that knows nothing would be another.
        has_entropy &= collection.passage_count >= self.sizes.negatives
        entropy = contrastive_entropy(scale * positive_Q, scale * negatives_QxDxR)
        random = negatives_QxDxR.reshape(len(positive_Q), -1)
        return figures | {
            "contrastive_entropy": listed(entropy) if has_entropy else None,
            "coverage": coverage(collection),
            "relevant_scores": listed(positive_Q),
            "random_scores": listed(np.round(random, 4)),
        }

    def scores(
        self, searcher: Searcher, collection: Collection, queries: list[Query]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores each query's first relevant passage (Q), and random ones (Q×D×R; NaN: they answer it)."""
        random = np.random.default_rng(0)
        count = min(self.sizes.negatives, collection.passage_count)
        drawn_DxR = [
            random.choice(collection.passage_count, count, replace=False) for _ in range(self.sizes.draws)
        ]
        rows, place = np.unique(np.stack(drawn_DxR), return_inverse=True)
        wanted = collection.ids.take(rows).to_pylist()
        of_query = [[next(iter(query.positives)), *wanted] for query in queries]
        scores_QxC = np.array(searcher.score([q.text for q in queries], of_query), np.float64)
        for row, query in enumerate(queries):
            scores_QxC[row, 1:][[name in query.positives for name in wanted]] = np.nan
        return scores_QxC[:, 0], scores_QxC[:, 1:][:, place.reshape(self.sizes.draws, count)]


def listed(values: np.ndarray) -> list:
    """Gives numbers as JSON, which has null for what is not finite."""
    return np.where(np.isfinite(values), values, None).tolist()


def coverage(collection: Collection) -> float:
    """Gives the share of the passages that have a train query."""
    return len({p for q in collection.queries("train") for p in q.positives}) / collection.passage_count


def count_parameters(model: LoadedModel | None) -> dict:
    """Counts a model's parameters: all, and those that are neither embeddings nor an output softmax."""
    if model is None:
        return {"parameters": 0, "inner_parameters": 0}
    inner = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
        if not any(word in jax.tree_util.keystr(path) for word in ("embed", "logits_dense"))
    )
    return {"parameters": model.parameter_count, "inner_parameters": inner}


def cut(whole: Collection, folder: Path, sizes: Sizes) -> Path:
    """Writes the collection (TSV layout) with few test and dev queries, so that a small corpus holds theirs.

    They are chosen by a hash of their ids; the other dev queries serve for training, the other test queries
    for nothing.
    """

    def make(folder: Path) -> dict:
        test, dev = (
            sorted(
                (q for q in whole.queries(split) if q.positives), key=lambda q: storage.hash_fraction(q.id)
            )
            for split in ("test", "dev")
        )
        splits = {"test": test[: sizes.queries], "dev": dev[: sizes.dev]}
        splits["train"] = [*whole.queries("train"), *dev[sizes.dev :]]
        _write(folder / "docs.tsv", ([p.id, p.title, p.text] for p in whole.passages()))
        for split, some in splits.items():
            _write(folder / f"queries.{split}.tsv", ([q.id, q.text] for q in some))
            pairs = ([q.id, p, str(grade)] for q in some for p, grade in q.positives.items())
            _write(folder / f"qrels.{split}.tsv", pairs)
        return {"splits": {split: len(some) for split, some in splits.items()}}

    recipe = {**whole.recipe(*whole.query_counts), "asked": sizes.queries, "dev": sizes.dev}
    storage.build_once(folder, recipe, make)
    return folder


def _write(path: Path, rows) -> None:
    with path.open("w") as file:
        for row in rows:
            print(*(" ".join(cell.split()) for cell in row), sep="\t", file=file)


def _network(width: int) -> list[str]:
    sizes = {"emb_dim": width, "mlp_dim": width, "num_heads": max(width // 64, 1), "num_encoder_layers": 0}
    return [f"T5Config.{name}={value}" for name, value in sizes.items()]


def _unevaluated() -> list[str]:
    return [f"train.eval_every={OFTEN}", f"train.save_every={OFTEN}", "train.keep_best=None"]
