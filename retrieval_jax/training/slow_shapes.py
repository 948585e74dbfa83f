"""Shapes that make a TPU compute more than was asked for: what they waste, and which setting would not.

A TPU works on tiles of 8 × 128 numbers (sublanes × lanes): a matrix of 48 columns is computed as one of 128.
And it multiplies hundreds of times while it reads one number from its memory: a matrix that few tokens are
multiplied by is mostly waited for. Only what costs a good part of a step is worth a line.

Letters: E, F and V are the widths of the embedding, the MLPs and the softmax, H heads of D, S and T tokens of
a row of inputs and of targets.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
from jax.sharding import Mesh

from retrieval_jax.data.vocabulary import round_up
from retrieval_jax.mesh.hardware import Tpu
from retrieval_jax.mesh.partitioning import Rules
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.softmax import Blocks

LANES, SUBLANES = 128, 8
WORTH_A_LINE = 0.05  # of the products of a step
IDLE = 0.5  # of the chip's arithmetic, while it reads the parameters


@dataclasses.dataclass(frozen=True)
class _Work:
    """The sizes, on one chip, of the matrix products of a network.

    Attributes:
      config: the network.
      E, heads, D, joined, F, V: the widths; `joined` is H·D. `heads` may be a fraction.
      inputs, S: tokens of the encoder, and of one of its rows.
      targets, T: the same of the decoder, or, for a dual encoder, of the encoder of passages.
      decodes: whether there is a decoder.
    """

    config: T5Config
    E: int
    heads: float
    D: int
    joined: int
    F: int
    V: int
    inputs: int
    S: int
    targets: int
    T: int
    decodes: bool

    def products(self) -> float:
        """Counts the multiplications of a forward pass."""
        c, attention, mlp = self.config, self.E * self.joined, (len(self.config.mlp_activations) + 1) * self.E
        per_head = 2 * self.heads * self.D
        layer = 4 * attention + mlp * self.F
        encoded = self.inputs * (layer + per_head * self.S)
        if not self.decodes:
            return c.num_encoder_layers * (encoded + self.targets * (layer + per_head * self.T))
        decoded = self.targets * (layer + 2 * attention + per_head * (self.S + self.T))
        decoded += 2 * self.inputs * attention  # keys and values of the inputs
        return (
            c.num_encoder_layers * encoded
            + (c.num_decoder_layers + c.pawa_layers) * decoded
            + self.targets * self.E * self.V
        )

    def padded(self) -> "_Work":
        """Gives the sizes as the chip computes them."""
        lanes = {
            name: round_up(getattr(self, name), LANES) for name in ("E", "D", "joined", "F", "V", "S", "T")
        }
        tokens = {name: round_up(getattr(self, name), SUBLANES) for name in ("inputs", "targets")}
        if self.D == 64:
            lanes["D"] = 64  # T5's own in all sizes: pretrained weights leave no choice
        return dataclasses.replace(self, **lanes, **tokens)


def _parts(mesh: Mesh, rules: Rules, name: str) -> int:
    """Gives the number of chips that a logical axis is divided over."""
    axes = dict(rules).get(name) or ()
    size = 1
    for axis in (axes,) if isinstance(axes, str) else axes:
        size *= mesh.shape[axis]
    return size


def _work(
    config: T5Config, shapes: Mapping[str, tuple], mesh: Mesh, rules: Rules, microbatches: int
) -> _Work:
    if "left_encoder_input_tokens" in shapes:
        (rows, S), (_, group, T) = (shapes[f"{x}_encoder_input_tokens"] for x in ("left", "right"))
        decodes = False
    else:
        (rows, S), (_, *candidates, T) = shapes["encoder_input_tokens"], shapes["decoder_input_tokens"]
        group, decodes = math.prod(candidates), True
    rows = -(-rows // (_parts(mesh, rules, "batch") * microbatches))
    joined, V = config.num_heads * config.head_dim, config.outputs
    return _Work(
        config,
        E=config.emb_dim,
        heads=config.num_heads / _parts(mesh, rules, "heads"),
        D=config.head_dim,
        joined=-(-joined // _parts(mesh, rules, "joined_kv")),
        F=-(-config.mlp_dim // _parts(mesh, rules, "mlp")),
        V=-(-V // _parts(mesh, rules, "vocab")),
        inputs=rows * S,
        S=S,
        targets=rows * group * T,
        T=T,
        decodes=decodes,
    )


def slow_training(
    model,
    shapes: Mapping[str, tuple],
    mesh: Mesh,
    rules: Rules,
    microbatches: int,
    chip: Tpu,
    least_ms: Mapping[str, float],
) -> list[str]:
    """Finds the settings by whose shapes a training step is slow on a TPU.

    Args:
      model: the retriever.
      shapes: name -> shape of the arrays of a global batch.
      mesh: the chips.
      rules: the mesh axes of each logical axis.
      microbatches: the parts of a batch.
      chip: the kind of the chips.
      least_ms: what the step takes at least, as `slices.summary` has it.

    Returns:
      A line for each: "SETTING: what is wasted: the remedy".
    """
    work = _work(model.config, shapes, mesh, rules, microbatches=microbatches)
    found = [*_padding(work, model.config)]
    if work.decodes and getattr(model, "max_logits_per_block", None):
        tokens = work.targets
        if _parts(mesh, rules, "vocab") > mesh.shape["model"]:  # the outputs lie over `data`: all tokens meet
            tokens *= _parts(mesh, rules, "batch")
        found += _blocks(work, tokens, model.max_logits_per_block, chip)
    multiplied, read = least_ms["FLOP/s"], least_ms["memory bandwidth"]
    if 1 - multiplied / read > IDLE:
        found.append(
            f"train.batch_size: a chip reads and writes its parameters for {read:.3g} ms a step and "
            f"multiplies for {multiplied:.3g} ms: {1 - multiplied / read:.0%} of its arithmetic is idle: a "
            f"batch {read / multiplied:.1f} times as large takes about as long"
        )
    return found


def slow_search(
    config: T5Config, batch_size: int, hypotheses: int, mesh: Mesh, rules: Rules, chip: Tpu
) -> list[str]:
    """Finds the settings by whose shapes a search is slow on a TPU.

    Args:
      config: the network.
      batch_size: the queries of a batch.
      hypotheses: the tokens that a query has in a step of the decoder: its beams, or 1.
      mesh: the chips.
      rules: the mesh axes of each logical axis.
      chip: the kind of the chips.

    Returns:
      A line for each: "SETTING: what is wasted: the remedy".
    """
    found, chips = [], mesh.shape["data"]
    searched = round_up(batch_size, chips)
    if 1 - batch_size / searched >= WORTH_A_LINE:
        found.append(
            f"make_index.batch_size: {batch_size} queries are searched as {searched}, for {chips} chips "
            f"along `data`: {1 - batch_size / searched:.0%} of the work is wasted: set {searched}"
        )
    # A chip multiplies so many tokens by a parameter while it reads the next one, in the network's dtype.
    enough = chip.flops * jnp.dtype(config.dtype).itemsize / (2 * chip.bandwidth)
    tokens = searched // chips * hypotheses
    if 1 - tokens / enough > IDLE:
        queries = chips * -(-int(enough) // hypotheses)
        found.append(
            f"make_index.batch_size: with {searched} queries a chip reads every parameter for {tokens} "
            f"tokens a step: {1 - tokens / enough:.0%} of its arithmetic is idle: up to {queries} queries "
            "take about as long"
        )
    shapes = {
        "encoder_input_tokens": (searched, LANES),
        "decoder_input_tokens": (searched * hypotheses, LANES),
    }
    work = _work(config, shapes, mesh, rules, microbatches=1)
    work = dataclasses.replace(work, targets=round_up(tokens, SUBLANES))
    return [*found, *_padding(work, config)]


def _padding(work: _Work, config: T5Config) -> Iterator[str]:
    """Yields a line for each size that is padded at a cost."""
    padded = work.padded()
    total = padded.products()
    joined, outputs = config.num_heads * config.head_dim, config.outputs
    own_head = config.head_dim != 64 and config.head_dim % LANES
    row, larger = f"a multiple of {LANES}, with DataConfig.pack for several texts a row", "a larger batch"
    of_targets = "the docids' length" if work.decodes else "DataConfig.passage_length"
    sizes = (  # (sizes that are padded, the setting, the whole network's size, its name, the remedy)
        (("E",), "T5Config.emb_dim", config.emb_dim, "embedding", ""),
        (("D", "joined"), "T5Config.head_dim", config.head_dim, "width of a head", "64 or 128")
        if own_head
        else (("joined",), "T5Config.num_heads", joined, "width of all heads", ""),
        (("F",), "T5Config.mlp_dim", config.mlp_dim, "width of the MLP", ""),
        (("V",), "DOCIDS", outputs, "softmax", ""),
        (("S",), "DataConfig.input_length", work.S, "row of inputs", row),
        (("T",), of_targets, work.T, "row of targets" if work.decodes else "passage", row),
        (("inputs",), "train.batch_size", work.inputs, "tokens of inputs", larger),
        (("targets",), "train.batch_size", work.targets, "tokens of targets", larger),
    )
    for names, setting, whole, what, remedy in sizes:
        real = {name: getattr(work, name) for name in names}
        wasted = 1 - dataclasses.replace(padded, **real).products() / total
        if wasted < WORTH_A_LINE:
            continue
        size, computed = real[names[0]], getattr(padded, names[0])
        if not remedy and whole != size and whole % LANES == 0:  # it is the mesh that cuts it
            setting, remedy = "make_mesh.model_parallelism", "fewer chips that share the weights"
        yield (
            f"{setting}: on a chip the {what}, {size:,}, is computed as {computed:,}: {wasted:.0%} of all "
            f"products are wasted: choose {remedy or f'a multiple of {LANES * round(whole / size)}'}"
        )


def _blocks(work: _Work, tokens: int, most: int, chip: Tpu) -> Iterator[str]:
    """Yields a line where a softmax is cut into blocks that are too narrow, or for nothing.

    Args:
      work: the sizes.
      tokens: the targets that a chip computes logits of.
      most: the setting `max_logits_per_block`.
      chip: the kind of the chips.
    """
    name = "GenerativeRetriever.max_logits_per_block"
    cut = Blocks.of(work.V, most // tokens)
    softmax = tokens * work.E * work.V
    share = softmax / (work.products() - work.targets * work.E * work.V + softmax)
    # For each block the float32 vectors of all tokens are read: 4 bytes for 2 FLOPs an output.
    enough = min(round_up(int(2 * chip.flops / chip.bandwidth), LANES), work.V)
    if share * (1 - cut.width / enough) >= WORTH_A_LINE:
        yield (
            f"{name}: {most:,} logits of {tokens:,} tokens a chip are blocks of {cut.width:,} outputs, for "
            f"each of which the tokens' vectors are read: {1 - cut.width / enough:.0%} of the softmax's "
            f"arithmetic is idle: set {enough * tokens:,} or more"
        )
    elif cut.count == 1 and share / (3 + share) >= WORTH_A_LINE:
        yield (
            f"{name}: all logits of a chip are one block, and yet are computed again for the gradient: "
            f"{share / (3 + share):.0%} of all products are wasted: set None"
        )
