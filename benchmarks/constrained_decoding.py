"""What does the constraint cost? Milliseconds a query of beam search with and without the docid trie.

    python benchmarks/constrained_decoding.py [--quick]

A T5 (256 wide, 2 + 1 layers, 8,064 pieces, random weights) reads 32 random queries and decodes 40 beams:

- this search: `constrained_beam_search` over 100,000 random docids of 5 to 8 pieces, like those of numeric
  passage ids (5,000 docids with --quick);
- unconstrained: the same network and length; at each step, the best of all beams × pieces;
- Hugging Face: `generate` with `prefix_allowed_tokens_fn` over a dict trie, a network of the same sizes, in
  batches of 8; only where torch and transformers are installed.

The first two are run in turn, and medians are printed: a table, then the same figures as one line of JSON.
Encoding the queries is part of every time; compiling is not.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from retrieval_jax.data.vocabulary import EOS
from retrieval_jax.decoding.beam_search import Step, constrained_beam_search
from retrieval_jax.decoding.trie import build_trie
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.t5 import T5Config

BATCH, BEAMS, QUERY_LENGTH, HF_BATCH = 32, 40, 16, 8
CONFIG = T5Config(8064, 256, 4, 64, 512, num_encoder_layers=2, num_decoder_layers=1)


def random_docids(count: int, rng: np.random.Generator) -> np.ndarray:
    """int32 count × 8: four to seven of the 1,110 pieces of one to three digits, then EOS."""
    tokens = rng.integers(2, 2 + 1110, (count, 8), dtype=np.int32)
    ends = rng.integers(4, 8, (count, 1))
    place = np.arange(8)
    return np.where(place < ends, tokens, np.where(place == ends, EOS, 0))


def unconstrained_beam_search(step: Step, length: int, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """The most probable sequences of `length` tokens: (tokens B×K×T, scores B×K)."""
    tokens = jnp.zeros((batch_size, 1), jnp.int32)
    scores = jnp.zeros((batch_size, 1))
    past, written = [], jnp.zeros((batch_size, 1, 0), jnp.int32)
    for position in range(length):
        logits_BxKxV, past = step(tokens, position, past)
        total = scores[..., None] + jax.nn.log_softmax(logits_BxKxV)
        scores, best = jax.lax.top_k(total.reshape(batch_size, -1), BEAMS)
        parent, tokens = best // CONFIG.vocab_size, best % CONFIG.vocab_size
        past, written = jax.tree.map(lambda x: jax.vmap(lambda a, i: a[i])(x, parent), (past, written))  # noqa: B023
        written = jnp.concatenate([written, tokens[..., None]], axis=-1)
    return written, scores


def searches(model: GenerativeRetriever, length: int):
    """The two compiled searches: ours (params, trie, queries), unconstrained (params, queries)."""

    def stepper(params, queries):
        apply = functools.partial(model.module.apply, {"params": params})
        cross = apply(queries, method="start")
        return lambda tokens, position, past: apply(tokens, position, past, cross, queries, method="step")

    @jax.jit
    def ours(params, trie, queries):
        return constrained_beam_search(stepper(params, queries), trie, len(queries), BEAMS)

    @jax.jit
    def unconstrained(params, queries):
        return unconstrained_beam_search(stepper(params, queries), length, len(queries))

    return ours, unconstrained


def milliseconds(run) -> float:
    """What one call takes."""
    started = time.perf_counter()
    jax.block_until_ready(run())
    return 1000 * (time.perf_counter() - started)


def time_both(docids: np.ndarray, queries: np.ndarray, repetitions: int) -> dict:
    """Builds the trie and runs both searches in turn."""
    started = time.perf_counter()
    trie, _ = build_trie(docids)
    build_seconds = time.perf_counter() - started
    size = sum(array.nbytes for array in jax.tree.leaves(trie))
    count = int(np.count_nonzero(trie.tokens_NxL[:, 0]))

    model = GenerativeRetriever(CONFIG)
    shapes = {"encoder_input_tokens": (1, QUERY_LENGTH), "decoder_input_tokens": (1, docids.shape[1])}
    params = nn.unbox(model.get_initial_variables(jax.random.key(0), shapes))["params"]
    ours, unconstrained = searches(model, docids.shape[1])
    params, trie, queries = jax.device_put((params, trie, queries))
    runs = [lambda: ours(params, trie, queries), lambda: unconstrained(params, queries)]
    for run in runs:
        milliseconds(run)  # compiles
    times = [[milliseconds(run) for run in runs] for _ in range(repetitions)]
    medians = [statistics.median(column) / len(queries) for column in zip(*times, strict=True)]
    return {
        "milliseconds_per_query": dict(zip(("ours", "unconstrained"), medians, strict=True)),
        "constraint_cost": medians[0] / medians[1],
        "build_seconds": build_seconds,
        "bytes_per_docid": size / count,
        "docids": count,
    }


def hugging_face(docids: np.ndarray, queries: np.ndarray, repetitions: int) -> float | None:
    """Milliseconds a query of `generate`, or None where it is not installed."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        return None
    import torch
    import transformers

    c = CONFIG
    config = transformers.T5Config(
        vocab_size=c.vocab_size,
        d_model=c.emb_dim,
        d_kv=c.head_dim,
        d_ff=c.mlp_dim,
        num_heads=c.num_heads,
        num_layers=c.num_encoder_layers,
        num_decoder_layers=c.num_decoder_layers,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    network = transformers.T5ForConditionalGeneration(config).eval()
    trie: dict = {}
    for docid in docids.tolist():
        node = trie
        for token in filter(None, docid):
            node = node.setdefault(token, {})

    def allowed(_, written):
        node = trie
        for token in written.tolist()[1:]:
            node = node.get(token, {})
        return list(node) or [EOS]

    generate = functools.partial(
        network.generate,
        torch.tensor(queries[:HF_BATCH], dtype=torch.long),
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
        length_penalty=0.0,
        max_new_tokens=docids.shape[1],
        prefix_allowed_tokens_fn=allowed,
    )
    with torch.inference_mode():
        return statistics.median(milliseconds(generate) for _ in range(repetitions)) / HF_BATCH


def show(figures: dict) -> None:
    """The table, then the JSON."""
    times, cost, speedup = (figures[k] for k in ("milliseconds_per_query", "constraint_cost", "hf_speedup"))
    title = f"{figures['docids']:,} docids, {BEAMS} beams, on {jax.devices()[0].device_kind}"
    table = Table("", "this search", "unconstrained", "Hugging Face", title=title)
    cells = ["-" if value is None else f"{value:.2f}" for value in times.values()]
    table.add_row("milliseconds a query", *cells)
    table.add_row("this search = 1", "1", f"{1 / cost:.2f}", "-" if speedup is None else f"{speedup:.2f}")
    table.add_row("building the trie, seconds", f"{figures['build_seconds']:.3f}", "-", "-")
    table.add_row("bytes a docid", f"{figures['bytes_per_docid']:.1f}", "-", "-")
    Console().print(table)
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5,000 docids, few repetitions: within a minute")
    quick = parser.parse_args().quick
    rng = np.random.default_rng(0)
    docids = random_docids(5_000 if quick else 100_000, rng)
    queries = rng.integers(2, CONFIG.vocab_size, (BATCH, QUERY_LENGTH), dtype=np.int32)
    figures = time_both(docids, queries, repetitions=3 if quick else 9)
    hf = hugging_face(docids, queries, repetitions=1 if quick else 3)
    times = figures["milliseconds_per_query"]
    times["hf"] = hf
    figures["hf_speedup"] = hf and hf / times["ours"]
    show(figures)


if __name__ == "__main__":
    main()
