"""Texts a second: the encoder of a dual encoder beside sentence-transformers, with the same weights.

    python benchmarks/encoding.py [--quick] [--devices N] [--data FOLDER] [--vocabulary FILE]

The model is a folder in sentence-transformers' format with the layers of GTR (T5 1.0's encoder with ReLU, the
mean, a matrix, unit length), 8 layers 512 wide, of random weights: speed does not depend on them, and equal
vectors show that both compute the same. Texts are cut to 256 tokens. Both have all cores, and one after the
other encode the same slices of a collection; sentence-transformers sorts each by length, and has the best of
a few batch sizes; here one device has all cores, as where `index` encodes, or with --devices 2 each of two a
half. Compiling is in no time, and stands beside it (of shapes that the collection before did not have).

Padding's share is of the floating-point operations of matrix products, of the whole collection, as it is
encoded in parts of 4,096 texts a device (with --quick, of its first 4,096).

Needs torch and sentence-transformers. Prints a table, then one line of JSON, by collection:
over_sentence_transformers (texts a second over theirs), the same by processor seconds (of torch they count
those, too, in which its threads wait for one another), and padding_share.
"""

import argparse
import functools
import gzip
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import _quiet  # noqa: F401
import flax.linen as nn
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from retrieval_jax.checkpoints import sentence_transformers, tokenizer
from retrieval_jax.checkpoints.model_folder import LoadedModel, load_model
from retrieval_jax.checkpoints.weights import lazy_arrays
from retrieval_jax.core.progress import log
from retrieval_jax.data.collection import Passage
from retrieval_jax.data.vocabulary import NO_PROMPTS, Vocabulary
from retrieval_jax.embeddings.encoding import PART
from retrieval_jax.embeddings.text_encoder import TextEncoder, passage_encoder
from retrieval_jax.mesh.partitioning import all_devices
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.training.flops import matmul_flops
from retrieval_jax.verbs.convert import convert

LENGTH, DIMENSIONS = 256, 768
NETWORK = T5Config(32128, 512, 8, 64, 2048, 8, 0, mlp_activations=("relu",))
BATCH_SIZES = (16, 32, 64)  # of sentence-transformers, whose own choice is 32
TEXTS = {"squad_dev": 768, "wordnet": 4096}  # that are timed
QUICK_TEXTS = {"squad_dev": 32, "wordnet": 512}
SLICE = 4096
PAUSE = 0.5  # seconds, while the other one's threads still spin
LEAST_COSINE = 0.9999


def read_texts(folder: Path) -> list[str]:
    with gzip.open(folder / "docs.tsv.gz", "rt") as docs:
        return [Passage(*line.rstrip("\n").split("\t", 2)).full_text for line in docs]


def make_models(vocabulary: Vocabulary, scratch: Path) -> tuple[Path, Path]:
    """Folders of the same random weights: of this project and of sentence-transformers."""
    model = DualEncoder(NETWORK, vector_dim=DIMENSIONS)
    shapes = {"left_encoder_input_tokens": (1, 2)}
    variables = jax.jit(lambda key: model.get_initial_variables(key, shapes))(jax.random.key(0))
    arrays, theirs = lazy_arrays(nn.unbox(variables)["params"]), scratch / "theirs"
    theirs.mkdir()
    sentence_transformers.write(theirs, arrays, NETWORK, True, LENGTH, NO_PROMPTS)
    tokenizer.write(theirs, vocabulary, LENGTH)
    convert("unused", str(theirs), model_dir=str(scratch / "ours"))
    return scratch / "ours", theirs


def compile_shapes(encoder: TextEncoder, texts: Sequence[str]) -> float:
    """Encodes a text of each number of tokens; returns the seconds, which compiling takes most of."""
    lengths = {len(tokens): i for i, tokens in enumerate(encoder.vocabulary.tokens(texts, LENGTH))}
    started = time.perf_counter()
    encoder([texts[i] for i in lengths.values()])
    return time.perf_counter() - started


def padding_share(encoder: TextEncoder, opened: LoadedModel, texts: Sequence[str]) -> float:
    @functools.cache
    def flops(*shape: int) -> int:
        tokens = jax.ShapeDtypeStruct(shape, np.int32)
        return matmul_flops(opened.model.encode_passages, opened.params, tokens)

    all_flops = of_texts = 0
    at_once = PART * jax.local_device_count()
    for first in range(0, len(texts), at_once):
        for places, tokens in encoder.batches(texts[first : first + at_once]):
            all_flops += flops(*tokens.shape)
            of_texts += sum(flops(1, n) for n in np.count_nonzero(tokens[: len(places)], axis=1).tolist())
    return 1 - of_texts / all_flops


def timed(encode: Callable[[list[str]], np.ndarray], texts: list[str]) -> tuple[np.ndarray, float, float]:
    """(vectors, seconds, processor seconds of all threads)."""
    time.sleep(PAUSE)
    started, processor = time.perf_counter(), time.process_time()
    vectors = encode(texts)
    return vectors, time.perf_counter() - started, time.process_time() - processor


def compare(ours: Callable, theirs: Callable, texts: list[str], rounds: int) -> dict:
    """Times both on slices of the texts in turn; raises where vectors differ."""
    slices = [texts[first : first + SLICE] for first in range(0, len(texts), SLICE)]
    seconds, processor, largest, least = {0: [], 1: []}, {0: [], 1: []}, 0.0, 1.0
    for some in slices * rounds:
        vectors = []
        for which, encode in enumerate((ours, theirs)):
            found, wall, used = timed(encode, some)
            vectors.append(found)
            seconds[which].append(wall / len(some))
            processor[which].append(used / len(some))
        largest = max(largest, float(np.abs(vectors[0] - vectors[1]).max()))
        least = min(least, float(np.sum(vectors[0] * vectors[1], axis=1).min()))
    assert least > LEAST_COSINE, f"cosine {least} of the same text's two vectors"
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {
        "texts_per_second": [1 / statistics.median(some) for some in seconds.values()],
        "ratio": statistics.median(ratios),
        "by_processor": statistics.median(b / a for a, b in zip(*processor.values(), strict=True)),
        "largest_difference": largest,
        "least_cosine": least,
    }


def best_batch_size(library_model, texts: list[str]) -> int:
    def seconds(size: int) -> float:
        return timed(functools.partial(library_model.encode, batch_size=size), texts)[1]

    return min(BATCH_SIZES, key=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few texts: within a minute")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="has the collections' folders"
    )
    parser.add_argument("--vocabulary", type=Path, help="T5's SentencePiece model; by default, of --data")
    parser.add_argument("--devices", type=int, default=1, help="of a CPU, which share its cores")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    import sentence_transformers as library
    import torch

    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    log(f"{len(jax.devices())} × {jax.devices()[0].device_kind}, {threads} threads in all")
    log(f"JAX {jax.__version__}, torch {torch.__version__}")
    path = options.vocabulary or options.data / "t5vocab" / "t5_spiece_no_bos.model"
    table = Table(
        "collection", "tokens", "texts/s", "theirs", "ratio", "by CPU time", "padding", "compiling, s"
    )
    figures = {"over_sentence_transformers": {}, "by_processor_seconds": {}, "padding_share": {}}
    with tempfile.TemporaryDirectory() as scratch:
        ours, folder = make_models(Vocabulary(path), Path(scratch))
        library_model = library.SentenceTransformer(str(folder), device="cpu")
        mesh = all_devices(devices=jax.devices()[: options.devices])
        opened = load_model(ours, mesh=mesh)
    encoder = passage_encoder(opened, mesh)
    for name, count in (QUICK_TEXTS if options.quick else TEXTS).items():
        texts = read_texts(options.data / name)[: PART if options.quick else None]
        share = padding_share(encoder, opened, texts)
        order = np.random.default_rng(0).permutation(len(texts))[:count]
        some = [texts[i] for i in order]
        compiling = compile_shapes(encoder, some)
        size = 32 if options.quick else best_batch_size(library_model, some[: count // 8])
        theirs = functools.partial(library_model.encode, batch_size=size, show_progress_bar=False)
        theirs(some[:size])  # its first call is slower than the others, as ours, which compiled
        found = compare(encoder, theirs, some, 1 if options.quick else 2)
        tokens = statistics.mean(map(len, encoder.vocabulary.tokens(texts, LENGTH)))
        log(
            f"{name}: batches of {size} are sentence-transformers' fastest; the vectors differ by at most "
            f"{found['largest_difference']:.1e}, least cosine {found['least_cosine']:.7f}"
        )
        rates = [f"{rate:,.1f}" for rate in found["texts_per_second"]]
        ratios = [f"{found[key]:.2f}" for key in ("ratio", "by_processor")]
        table.add_row(name, f"{tokens:.0f}", *rates, *ratios, f"{share:.1%}", f"{compiling:.0f}")
        values = found["ratio"], found["by_processor"], share
        for figure, value in zip(figures.values(), values, strict=True):
            figure[name] = round(value, 3)
    Console(width=120).print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
