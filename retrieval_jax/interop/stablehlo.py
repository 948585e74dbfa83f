"""StableHLO programs for serving without this package, by `jax.export`, with their arrays beside them.

A program takes the arrays of weights.safetensors (and, for docids, of docids.safetensors) as dictionaries,
and tokens B×S (int32, any B), so nothing large is a constant in it. It runs on CPUs, GPUs and TPUs, and needs
nothing but jax and safetensors:

    program = jax.export.deserialize(Path("search.stablehlo").read_bytes())
    found = program.call(load_file("weights.safetensors"), load_file("docids.safetensors"), tokens)
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pyarrow as pa
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from retrieval_jax.checkpoints.model_folder import LoadedModel
from retrieval_jax.checkpoints.weights import lazy_arrays, write_safetensors
from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.decoding.atomic import DocidTokens
from retrieval_jax.decoding.bonuses import Planning
from retrieval_jax.decoding.trie import Trie
from retrieval_jax.docids.search_strategies import STRATEGIES
from retrieval_jax.docids.search_strategy import SearchStrategy
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.docids.token_sets import TokenSets
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.search.planned import aligned

PLATFORMS = ("cpu", "cuda", "tpu")
Arrays = Mapping[str, jax.Array]
K = 100  # passages per query that an exported search finds, where no number of beams sets that


def write(
    folder: Path,
    opened: LoadedModel,
    table: DocidTable | None,
    manifest: Mapping,
    sets: TokenSets | None = None,
) -> dict:
    """Writes a dual encoder's two encoders, or a generative retriever's search.

    - encode_queries.stablehlo, encode_passages.stablehlo: (weights, tokens B×S) -> vectors B×E.
    - search.stablehlo: (weights, docids, tokens B×S) -> (rows B×K of ids.arrow, scores B×K); rows of -1 name
      no passage. Passages that share a docid are found by the first of them; a passage that has several is in
      several rows, and may be found by each: its first row is its best one. A planned searcher's program
      plans, too; a docid that passages share has the score of the best one.

    Args:
      folder: an existing folder.
      opened: the model.
      table: the docids that a generative retriever writes; None for a dual encoder.
      manifest: the searcher's manifest, which has the number of beams.
      sets: the token sets of a planned searcher; None for others.

    Returns:
      What the manifest says: the lengths S of the texts' tokens, the versions of jax and of its format, for
      encoders the prompts that come before texts, and for a search what its scores are ("log_prob" or
      "logits": sums over a docid's tokens).

    Raises:
      UserError: the model neither encodes nor searches.
    """
    facts = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "calling_convention_version": jax.config.jax_export_calling_convention_version,
    }
    weights = flatten_dict(opened.params, sep="/")
    _save(folder, "weights", weights)
    model, description = opened.model, opened.description
    if isinstance(model, DualEncoder):
        lengths = {"queries": description["input_length"], "passages": description["passage_length"]}
        for name, length in lengths.items():
            encode = model.encode_queries if name == "queries" else model.encode_passages
            program = functools.partial(_encode, encode)
            _write(folder / f"encode_{name}.stablehlo", program, weights, length=length)
        return facts | {"lengths": lengths, "prompts": dict(zip(lengths, model.prompts, strict=True))}
    if table is None or not isinstance(model, GenerativeRetriever):
        raise UserError("export: only a dual encoder or a searcher that writes docids becomes StableHLO")
    strategy, outputs = STRATEGIES[table.search], model.config.outputs
    docids, first_N = strategy.build(table, outputs)
    planning = None
    if sets is not None:
        size = min(manifest["planned_by"]["plan_size"], len(table.passage_ids))
        planning = strategy.build_planning(table, docids, first_N, aligned(sets, table), size)
        weight = np.float32(manifest["sequential_weight"])
        planning = dataclasses.replace(planning, sequential_weight=weight)
    width = strategy.width(manifest["beams"], min(K, len(table.passage_ids)), outputs)
    program = functools.partial(_search, model, strategy, docids, planning, width)
    docids = {name: np.asarray(x) for name, x in (docids.arrays | _named(planning)).items()}
    _save(folder, "docids", docids)
    passages_N = table.passages_of(np.arange(len(table.tokens_NxL)))
    arrow_ids.write(folder / "ids.arrow", table.passage_ids.take(pa.array(passages_N)))
    length = description["input_length"]
    _write(folder / "search.stablehlo", program, weights, docids, length=length)
    return facts | {"lengths": {"queries": length}, "score": model.score}


def load_program(folder: str | Path, name: str) -> export.Exported:
    """Reads a program that `write` wrote, perhaps with another version of jax.

    Args:
      folder: the exported folder.
      name: "search", "encode_queries" or "encode_passages".

    Returns:
      The program; its `call` takes the arrays and tokens.

    Raises:
      UserError: the program is not there, or this version of jax cannot read it.
    """
    folder = paths.as_path(folder)
    manifest, path = storage.read_manifest(folder, "export"), folder / f"{name}.stablehlo"
    if not path.is_file():
        raise UserError(f"{path}: no such program: a search or the encoders are in an exported folder")
    first, last = (
        export.minimum_supported_calling_convention_version,
        export.maximum_supported_calling_convention_version,
    )
    try:
        program = export.deserialize(bytearray(path.read_bytes()))
        readable = first <= program.calling_convention_version <= last
        program.mlir_module()  # raises where its StableHLO is a later one than this jaxlib's
    except Exception:  # of several kinds, which jax does not document
        readable = False
    if not readable:
        raise UserError(
            f"{path}: written by jax {manifest['jax']}, and jax {jax.__version__} cannot read it: install "
            f"one that is not older than {manifest['jax']} and at most 6 months newer, or export it again"
        )
    return program


def _encode(encode: Callable, weights: Arrays, tokens_BxS: jax.Array) -> jax.Array:
    return encode(unflatten_dict(weights, sep="/"), tokens_BxS)


def _search(
    model: GenerativeRetriever,
    strategy: type[SearchStrategy],
    docids: Trie | DocidTokens,
    planning: Planning | None,
    width: int,
    weights: Arrays,
    arrays: Arrays,
    tokens_BxS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    params, batch = unflatten_dict(weights, sep="/"), {"encoder_input_tokens": tokens_BxS}
    # Their own arrays would be constants of the program.
    docids = dataclasses.replace(docids, **{name: arrays[name] for name in docids.arrays})
    planning = jax.tree.unflatten(jax.tree.structure(planning), [arrays[name] for name in _named(planning)])
    rows, aux = strategy.decode(model, params, batch, docids, width, planning=planning)
    return rows, aux["scores"]


def _named(planning: Planning | None) -> dict:
    """Returns the arrays of what a planned search takes, by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(planning)
    return {f"planning{jax.tree_util.keystr(path)}": x for path, x in leaves}


def _save(folder: Path, name: str, arrays: Mapping) -> None:
    """Writes arrays into a single file, so that a program takes them as they are read from it."""
    lazy = lazy_arrays(arrays)
    write_safetensors(folder, name, lazy, shard_bytes=sum(array.nbytes for array in lazy.values()))


@contextlib.contextmanager
def _no_source_lines() -> Iterator[None]:
    """Keeps the lines of source files out of the programs that are exported inside."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def _write(path: Path, program: Callable, *arrays: Arrays, length: int) -> None:
    (B,) = export.symbolic_shape("B")
    shapes = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(some)) for some in arrays]
    tokens = jax.ShapeDtypeStruct((B, length), jnp.int32)
    with _no_source_lines():
        exported = export.export(jax.jit(program), platforms=PLATFORMS)(*shapes, tokens)
    path.write_bytes(exported.serialize())
