"""This project's models and tasks under T5X: `t5x.train`, `t5x.eval` and `t5x.infer` by gin files.

    python -m retrieval_jax.interop.t5x --run_mode=train --gin_file=t5x/train.gin --gin.WORK_DIR=… …

is `python -m t5x.main` with what `bridge` does, and with gin_configs/ among the places of gin files. T5X is
in no package index: see README.md in this folder. Importing this module needs it, and imports TensorFlow.

`Model` is one of this project's models as T5X knows models. Parameters keep their names, which are T5X's; a
scanned stack has its layers on axis 0 of its arrays here, where T5X's own network has them on axis 1.
"""
# ruff: noqa: E402 (T5X cannot be imported before `bridge` was called)

import dataclasses
import importlib.util
import json
import runpy
import sys
import types
from collections.abc import Callable, Mapping, Sequence

from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError


def bridge() -> None:
    """Makes T5X importable with today's libraries. It must be called before T5X is imported, once or more.

    - jestimator, which T5X imports, looks for PartitionSpec in the module of JAX that it has moved from;
    - airio is in no package index: T5X asks of it four types, to tell its data sets from seqio's.

    Raises:
      UserError: T5X is not installed.
    """
    if importlib.util.find_spec("t5x") is None:
        raise UserError("t5x: not on PYTHONPATH: retrieval_jax/interop/README.md tells how to get it")
    import jax.experimental.pjit

    jax.experimental.pjit.PartitionSpec = jax.sharding.PartitionSpec
    if "airio" not in sys.modules and importlib.util.find_spec("airio") is None:
        airio, core = types.ModuleType("airio"), types.ModuleType("airio.core")
        airio.__path__, airio.core = [], core
        for name in ("Task", "Mixture", "DatasetProviderBase", "AirIODatasetIterator"):
            setattr(core, name, type(name, (), {}))
        sys.modules |= {"airio": airio, "airio.core": core}


def main() -> int:
    """Runs T5X's command line, which finds this project's gin files. Returns 2 after a UserError."""
    import gin

    from retrieval_jax.core import configuration

    gin.add_config_file_search_path(str(configuration.gin_folder()))
    try:
        bridge()
        runpy.run_module("t5x.main", run_name="__main__", alter_sys=True)
    except UserError as error:
        print(f"retrieval-jax: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":  # here: what follows is for the gin files, which import this module by its name
    sys.exit(main())

bridge()

import clu.metrics
import flax
import flax.linen as nn
import jax
import numpy as np
import seqio
import tensorflow as tf
from flax.linen.partitioning import AxisMetadata
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from t5x import checkpoints, infer, models, optimizers
from t5x import partitioning as t5x_partitioning

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.trec import drop_identical_ids
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.evaluation.metrics import compute_metrics
from retrieval_jax.examples import seqio_tasks
from retrieval_jax.examples.training_data import DataConfig
from retrieval_jax.mesh import partitioning
from retrieval_jax.models.feature_converters import DocidGroupFeatureConverter
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.models.retriever import Batch
from retrieval_jax.search.generative import GenerativeSearcher
from retrieval_jax.training.run import check_inputs, make_model, train_dataset


class FunctionOnMesh(t5x_partitioning.PjittedFnWithContext):
    """T5X's partitioned functions, which enter their mesh by `jax.set_mesh`, too.

    T5X enters it by `with Mesh(…)`, which the functions that are traced inside cannot see by any public name
    of JAX.
    """

    def __call__(self, *args, **kwargs):
        """Calls the function on the mesh."""
        with jax.set_mesh(self._mesh):
            return super().__call__(*args, **kwargs)

    def lower(self, *args, **kwargs):
        """Lowers the function on the mesh."""
        with jax.set_mesh(self._mesh):
            return super().lower(*args, **kwargs)


t5x_partitioning.PjittedFnWithContext = FunctionOnMesh  # which T5X's partitioner looks for there


class Model(models.BaseModel):
    """A GenerativeRetriever, DualEncoder or QueryGenerator as a T5X model.

    A run has one of them: its gin file makes it a singleton, because the tasks ask it for its examples.

    Args:
      retriever: the class.
      work_dir: where the collection's work lies, as `retrieval-jax import` and `docids` leave it.
      data: lengths of the examples, and what training mixes.
      docids: kind of docids to write (generative retrievers).
      optimizer: makes the optax optimiser; None for a model that does not learn.
      beams: most docids to find for a query, by the constrained search; None: the model does not search, and
        T5X's state holds nothing of the docids.
      samples: queries that a query generator writes for a passage.

    Raises UserError where these do not belong together.
    """

    def __init__(
        self,
        retriever: type,
        work_dir: str,
        data: DataConfig,
        docids: str | None = None,
        optimizer: Callable | None = None,
        beams: int | None = None,
        samples: int = 1,
    ):
        if optimizer and beams:
            raise UserError(
                "Model.beams: not in training, whose checkpoints would hold the docids: use t5x.eval"
            )
        self.work = Workspace(paths.as_path(work_dir))
        collection = Collection(self.work.collection)
        table = DocidTable.open(self.work.docids(docids)) if docids else None
        check_inputs(self.work.folder, retriever, collection, table)
        vocabulary = Vocabulary(collection.vocabulary_path)
        self.model = make_model(retriever, optimizer or (lambda: None), vocabulary.size, table)
        self.examples = train_dataset(data, self.work, collection, self.model, table)
        self.beams, self.samples, self.searcher = beams, samples, None
        if table and beams:
            self.searcher = GenerativeSearcher(self.model, {}, table, vocabulary, data.input_length, beams)
        super().__init__(OptaxOptimizer(self.model.optimizer_def) if optimizer else None)

    @property
    def FEATURE_CONVERTER_CLS(self):
        """The feature converter of the model, or of the groups of docids that it is to rank."""
        if self.model.writes_docids and self.examples.target_type.has_groups:
            return DocidGroupFeatureConverter
        return self.model.FEATURE_CONVERTER_CLS

    @property
    def feature_lengths(self) -> dict[str, int]:
        """The lengths of the tasks' features: T5X's TASK_FEATURE_LENGTHS."""
        return {name: feature.length for name, feature in self.examples.targets.features.items()}

    def docid_arrays(self) -> dict[str, jax.Array]:
        """Returns the arrays by which the search knows the docids; {} if the model does not search."""
        return self.searcher.docids.arrays if self.searcher else {}

    def get_initial_variables(
        self, rng: jax.Array, input_shapes: Mapping[str, tuple], input_types: object = None
    ) -> dict:
        """Returns params, the logical names of their axes as `params_axes`, and the docids if it searches.

        T5X gives its infer step no arrays but the parameters, the batch, and what a model keeps besides
        parameters ("Flax mutables"). There the docids go: anywhere else they would be constants of the
        compiled step, hundreds of megabytes for millions of docids. `DocidsBeside` puts them there.
        """
        boxed = self.model.get_initial_variables(rng, input_shapes, input_types)["params"]
        variables = {"params": nn.unbox(boxed), "params_axes": _axes(nn.get_partition_spec(boxed))}
        if arrays := self.docid_arrays():
            axis = "vocab" if self.searcher.strategy.mesh_axes else None
            axes = {name: (axis, None, None)[: np.ndim(x)] for name, x in arrays.items()}
            variables |= {"docids": arrays, "docids_axes": _axes(axes)}
        return variables

    def loss_fn(self, params: dict, batch: Batch, dropout_rng: jax.Array | None) -> tuple:
        """Computes (mean loss, metrics).

        With T5X's `num_microbatches` the gradient is the sum of the parts' means: parts count alike, whatever
        their tokens, and the scale is that many times larger, which AdamW and Adafactor do not mind.
        """
        loss, metrics = self.model.loss_fn(params, batch, dropout_rng)
        return loss, {name: Mean(*total_and_count) for name, total_and_count in metrics.items()}

    def eval_fn(self, params: dict, batch: Batch, flax_mutables: Mapping | None = None) -> tuple:
        """`loss_fn` without dropout."""
        return self.loss_fn(params, batch, None)

    def predict_batch(
        self,
        params: dict,
        batch: Batch,
        rng: jax.Array | None = None,
        flax_mutables: Mapping | None = None,
    ) -> jax.Array:
        """Predicts without scores; see `predict_batch_with_aux`."""
        return self.predict_batch_with_aux(params, batch, rng, flax_mutables)[0]

    def predict_batch_with_aux(
        self,
        params: dict,
        batch: Batch,
        rng: jax.Array | None = None,
        flax_mutables: Mapping | None = None,
    ) -> tuple[jax.Array, dict]:
        """Calls the model's own `predict_batch_with_aux`.

        A generative retriever: (rows of the docid table B×beams; {"scores": as the model's `score` says}),
        the best *first*, where T5X's beam search has it last. It searches without a plan, also with a lexical
        head: token sets and the weight of docids' scores are a searcher's, and T5X's infer step has none. A
        dual encoder: the queries' vectors. A query generator: samples.
        """
        params = flax.core.unfreeze(params)
        if self.model.writes_docids:
            return self._search(params, batch, _current_mesh(), flax_mutables)
        samples = {"count": self.samples, "length": self.feature_lengths["targets"]}
        settings = samples if isinstance(self.model, QueryGenerator) else {}
        return self.model.predict_batch_with_aux(params, batch, rng, **settings)

    def _search(self, params: dict, batch: Batch, mesh, flax_mutables: Mapping | None) -> tuple:
        if not flax_mutables:
            raise UserError(
                "Model.beams: the model does not search: set --gin.BEAMS in t5x.eval and t5x.infer"
            )
        searcher = self.searcher
        docids = dataclasses.replace(searcher.docids, **flax_mutables["docids"])
        width = searcher.strategy.width(self.beams, self.beams, searcher.outputs)
        return searcher.strategy.decode(self.model, params, batch, docids, width, mesh)

    def score_batch(self, params: dict, batch: Batch, return_intermediates: bool = False) -> jax.Array:
        """Calls the model's own `score_batch`: scores B."""
        return self.model.score_batch(flax.core.unfreeze(params), batch)


@flax.struct.dataclass
class Mean(clu.metrics.Average):
    """A mean that is 0, not NaN, where it averages nothing, as at positions that no docid reaches."""

    def compute(self) -> np.ndarray:
        """Returns the mean."""
        return self.total / np.maximum(self.count, 1e-9)


class OptaxOptimizer(optimizers.OptaxWrapper):
    """An optax optimizer whose state is sharded like the parameters. T5X knows the states of some only.

    The rate is the optimiser's own; `Trainer.learning_rate_fn` is what T5X tells as the rate.
    """

    def derive_logical_axes(self, optimizer, param_logical_axes):
        """Returns the logical axes of the optimizer's state."""
        states = partitioning.specs_like_params(
            optimizer.state.param_states, optimizer.target, param_logical_axes
        )
        state = optimizers.OptimizerState(step=None, param_states=states)
        return optimizer.replace(target=param_logical_axes, state=state)


class DocidsBeside(checkpoints.OrbaxCheckpointManagerInterface):
    """T5X's checkpoints, which hold no docids. The docids of a model that searches are added to what is read.

    Here, not as a transformation of what is restored: that casts all arrays to the parameters' dtype.
    """

    def __init__(self, directory: str, train_state, partitioner, *args, model: Model, **settings):
        without = train_state.replace(flax_mutables=flax.core.freeze({}), flax_mutables_axes=None)
        super().__init__(directory, without, partitioner, *args, **settings)
        mesh, axes = partitioner.mesh, partitioner.get_mesh_axes(train_state).flax_mutables

        def place(x: jax.Array, spec) -> jax.Array:
            return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

        arrays = model.docid_arrays()
        docids = {"docids": jax.tree.map(place, arrays, dict(axes["docids"]))} if arrays else {}
        self.docids = flax.core.freeze(docids)

    def restore(self, *args, **settings):
        """Restores T5X's state, with the docids."""
        return super().restore(*args, **settings).replace_flax_mutables(self.docids)


def feature_lengths(model: Model) -> dict[str, int]:
    """Returns T5X's TASK_FEATURE_LENGTHS."""
    return model.feature_lengths


def training_task(model: Model) -> str:
    """Registers what DataConfig mixes as a seqio mixture with the split "train", and returns its name.

    Of a collection without train queries that is `DataConfig.unlabelled`, as in the project's own trainer.
    Cached tasks (`retrieval-jax cache`) are found where T5X is told to use them.

    Raises UserError for what only the project's own batches can do.
    """
    examples, settings = model.examples, model.examples.config
    own = examples.makes_its_own and settings.unlabelled_dropout
    for name in ("curriculum", "unlabelled_dropout" if own else "token_dropout", "typos"):
        if getattr(settings, name):
            raise UserError(f"DataConfig.{name}: only the project's own trainer does that: leave it out")
    if settings.pack > 1:
        raise UserError("DataConfig.pack: T5X packs by itself: --gin.train/utils.DatasetConfig.pack=True")
    ((_, mixture),) = examples.stages()
    shares = {task: share for task, (_, share) in mixture.items()}
    seqio_tasks.register(
        examples.prefix,
        {task: examples.computed(task) for task in shares},
        {"training": shares},
        examples.vocabulary,
    )
    seqio.add_global_cache_dirs([str(model.work.cache(""))])
    return f"{examples.prefix}.training"


def queries_task(model: Model) -> str:
    """Registers the labelled queries of every split as a seqio task, each query once; returns its name.

    Of a generative retriever that searches, seqio's Evaluator then tells MRR, Recall, Hits and nDCG.

    Raises:
      UserError: the collection has no labelled queries.
    """
    collection = model.examples.collection
    splits = {
        split: model.examples.queries(split) for split, count in collection.query_counts.items() if count
    }
    if not splits:
        raise UserError(
            f"{collection.folder}: no labelled queries to evaluate on: train with "
            "--gin.__main__.train.train_eval_dataset_cfg=None"
        )
    judged = [{query.id: query for query in queries} for _, queries in splits.values()]

    def retrieval(
        targets: Sequence[str], predictions: Sequence[Sequence[int]], aux_values: Mapping
    ) -> dict[str, float]:
        run = {
            query: model.searcher.passages.ranked_list(np.asarray(found), scores)
            for query, found, scores in zip(targets, predictions, aux_values["scores"], strict=True)
        }
        # A query may be in several splits, with other judgements: the split that is evaluated has them all.
        asked = min((some for some in judged if some.keys() >= {*targets}), key=len)
        run = drop_identical_ids(run, {query for query in targets if asked[query].is_passage})
        return compute_metrics({query: asked[query].relevant for query in targets}, run)

    return seqio_tasks.register_queries(
        model.examples.prefix, splits, model.examples.vocabulary, [retrieval] if model.searcher else []
    )


def write_predictions(
    path: str,
    inferences: tuple[Sequence, Mapping[str, Sequence]],
    task_ds: tf.data.Dataset,
    mode: str,
    vocabulary: seqio.Vocabulary | None = None,
    *,
    model: Model,
) -> None:
    """The `write_fn` of T5X's infer. A search gives JSON lines of id, query and [{id, score}, …] of passages.

    Best first; passages that share a docid tie. All else (vectors, sampled queries, scores of given targets)
    is written as T5X writes it.
    """
    if mode != "predict_with_aux" or model.searcher is None:
        infer.write_inferences_to_file(path, inferences, task_ds, mode, vocabulary)
        return
    found, aux = inferences
    with tf.io.gfile.GFile(path, "w") as file:
        for query, docids, scores in zip(task_ds.as_numpy_iterator(), found, aux["scores"], strict=True):
            ranking = model.searcher.passages.ranked_list(np.asarray(docids), scores)
            line = {
                "id": query["query"].decode(),
                "query": query["query_pretokenized"].decode(),
                "passages": [{"id": passage, "score": score} for passage, score in ranking],
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _axes(names: Mapping) -> dict:
    """Builds Flax's collection `…_axes` from a tree of axis names."""
    flat = flatten_dict(names)
    return unflatten_dict({(*at, f"{name}_axes"): AxisMetadata(tuple(x)) for (*at, name), x in flat.items()})


def _current_mesh() -> jax.sharding.AbstractMesh | None:
    """Returns the mesh of the T5X function that is being traced; None outside partitioned functions."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh
