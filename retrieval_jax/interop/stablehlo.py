"""Programs for serving without this package: `jax.export`'s, with their arrays beside them.

A program takes the arrays of weights.safetensors (and, for docids, of docids.safetensors) as dictionaries,
and tokens B×S (int32, any B): nothing large is a constant in it. It runs on CPUs, GPUs and TPUs, with jax and
safetensors alone:

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
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from retrieval_jax.checkpoints.model_folder import LoadedModel
from retrieval_jax.checkpoints.weights import lazy_arrays, write_safetensors
from retrieval_jax.core import arrow_ids, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.decoding.trie import Trie, build_trie
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever

PLATFORMS = ("cpu", "cuda", "tpu")
Arrays = Mapping[str, jax.Array]
K = 100  # passages a query that a search over atomic docids finds


def write(folder: Path, opened: LoadedModel, table: DocidTable | None, manifest: Mapping) -> dict:
    """Writes a dual encoder's two encoders, or a generative retriever's search.

    - encode_queries.stablehlo, encode_passages.stablehlo: (weights, tokens B×S) -> vectors B×E.
    - search.stablehlo: (weights, docids, tokens B×S) -> (rows B×K of ids.arrow, log-probabilities B×K); rows
      of -1 name no passage. Passages that share a docid are found by the first of them.

    Gives what the manifest says: the most tokens that each takes, of encoders the prompts that come before
    texts, and the versions of jax and of its format. Raises UserError for a model that does neither.
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
    if table.kind == "atomic":
        docids = {"row_V": table.row_of_tokens(model.config.output_size)}
        program = functools.partial(_atomic, model, min(K, len(table.passage_ids)))
    else:
        trie, _ = build_trie(table.tokens_NxL)
        docids = {name: np.asarray(x) for name, x in trie.arrays.items()}
        program = functools.partial(_search, model, trie, manifest["beams"])
    _save(folder, "docids", docids)
    arrow_ids.write(folder / "ids.arrow", table.passage_ids)
    length = description["input_length"]
    _write(folder / "search.stablehlo", program, weights, docids, length=length)
    return facts | {"lengths": {"queries": length}}


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
    trie: Trie,
    beams: int,
    weights: Arrays,
    docids: Arrays,
    tokens_BxS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    params, batch = unflatten_dict(weights, sep="/"), {"encoder_input_tokens": tokens_BxS}
    trie = dataclasses.replace(trie, **docids)  # whose own arrays would be constants
    rows, aux = model.predict_batch_with_aux(params, batch, trie=trie, beams=beams)
    return rows, aux["scores"]


def _atomic(
    model: GenerativeRetriever, k: int, weights: Arrays, docids: Arrays, tokens_BxS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    batch, row_V = {"encoder_input_tokens": tokens_BxS}, docids["row_V"]
    tokens, aux = model.rank_atomic(unflatten_dict(weights, sep="/"), batch, row_V >= 0, k)
    return jnp.where(tokens >= 0, row_V[tokens], -1), aux["scores"]


def _save(folder: Path, name: str, arrays: Mapping) -> None:
    """One file, so that a program is given it as it was read."""
    lazy = lazy_arrays(arrays)
    write_safetensors(folder, name, lazy, shard_bytes=sum(array.nbytes for array in lazy.values()))


@contextlib.contextmanager
def _no_source_lines() -> Iterator[None]:
    """Inside, programs do not tell where in which file each operation was written."""
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
