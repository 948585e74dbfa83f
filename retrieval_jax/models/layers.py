"""The parts of a T5's layers: attention, MLP, RMSNorm, embedding; and `T5Config`.

Letters in shapes: see t5.py.
"""

import dataclasses
import math
from typing import Annotated

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import Dtype, Fraction, NonNegative, Positive, Within
from retrieval_jax.data.vocabulary import PAD
from retrieval_jax.models.softmax import NEG_INF

KeysValues = tuple[jax.Array, jax.Array]
"""The keys and values of an attention layer."""
ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "linear": lambda x: x,
}
# The axis of layers in the arrays of a scanned stack. T5X has it on axis 1; XLA then copies all parameters at
# each step: 0.8 GiB a chip more for XXL on 16 chips.
STACK_AXIS = 0
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@gin.configurable
@dataclasses.dataclass(frozen=True)
class T5Config:
    """The sizes of a T5. Each size has a gin file in `gin_configs/models/`.

    Attributes:
      vocab_size: rows of the token embedding.
      emb_dim: E, the width of the residual stream.
      num_heads: H.
      head_dim: D.
      mlp_dim: the width of the MLPs.
      num_encoder_layers: how many layers the encoder has.
      num_decoder_layers: how many layers the decoder has.
      dropout_rate: of all dropouts.
      dtype: that of the computation; parameters are always float32.
      embedding_init_std: the standard deviation of random embeddings.
      branch_init_scale: the initial variance, relative to T5's, of the matrices by which self-attention and
        MLPs write into the residual stream. Near 0, a network that is trained from scratch begins as a bag of
        words that the decoder attends to, and learns in minutes what otherwise takes hours.
      output_size: V, the width of the decoder's softmax; None: that of the text vocabulary.
      separate_target_embedding: whether the decoder embeds target tokens by a table of its own, of
        `output_size` rows. Otherwise it shares the encoder's, as T5 does.
      scan_layers: whether each array holds all layers of a stack, on its first axis. Then a program of 24
        layers compiles as fast as one of a single layer.
      remat: what the backward pass computes again instead of keeping it: "none" keeps everything, "dots"
        keeps all matrix products, "full" only what goes from layer to layer.
      pawa_layers: above 0, the layers of the prefix-aware weight-adaptive decoder (NCI, Wang et al. 2022,
        section 3.3).
      mlp_activations: one for T5 1.0 (2020), ("relu",), of which docT5query, GTR and Sentence-T5 were made;
        two whose outputs are multiplied for T5 1.1. This and the next three have T5X's names.
      logits_via_embedding: whether a softmax over texts uses the embedding as its matrix, as in T5 1.0. The
        softmax of docids with a vocabulary of their own always has a matrix of its own.
      relpos_buckets: how many buckets of relative positions there are.
      relpos_max_distance: from this distance on, all share the last bucket.
      lexical_head: whether the network also gives a text a weight for each token of the text vocabulary; see
        `lexical.LexicalHead`.
    """

    vocab_size: int
    emb_dim: Positive
    num_heads: Positive
    head_dim: Positive
    mlp_dim: Positive
    num_encoder_layers: NonNegative
    num_decoder_layers: NonNegative
    dropout_rate: Fraction = 0.1
    dtype: Dtype = "float32"
    embedding_init_std: float = 1.0
    branch_init_scale: float = 1.0
    output_size: int | None = None
    separate_target_embedding: bool = False
    scan_layers: bool = False
    remat: str = "none"
    pawa_layers: NonNegative = 0
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    logits_via_embedding: bool = False
    relpos_buckets: Annotated[int, Within(4)] = 32
    relpos_max_distance: Positive = 128
    lexical_head: bool = False

    def __post_init__(self) -> None:
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"T5Config.remat: no policy {self.remat!r}: {', '.join(REMAT_POLICIES)}")
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))  # JSON has lists
        if self.relpos_max_distance <= self.relpos_buckets // 2:
            raise UserError(
                f"T5Config.relpos_max_distance: {self.relpos_max_distance}: set more than "
                f"{self.relpos_buckets // 2}, half of T5Config.relpos_buckets"
            )
        if not self.mlp_activations:
            raise UserError(f"T5Config.mlp_activations: none: {', '.join(ACTIVATIONS)}")
        for name in self.mlp_activations:
            if name not in ACTIVATIONS:
                raise UserError(f"T5Config.mlp_activations: no {name!r}: {', '.join(ACTIVATIONS)}")

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding's."""
        return self.logits_via_embedding and self.output_size is None

    @property
    def outputs(self) -> int:
        """The number of tokens that the decoder chooses from."""
        return self.output_size or self.vocab_size


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains how an array lies on the mesh, if there is one; see `mesh_context`.

    Args:
      x: the array.
      axes: the logical name of each of its axes; None for one that is not sharded.

    Returns:
      The array.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, nn.logical_to_mesh_axes(axes))


class Dense(nn.Module):
    """A linear layer without bias, …×I to …×`features`. Products and results are in `dtype`.

    Attributes:
      features: the width of the output.
      axes: the logical axes of the kernel, which say how it is sharded.
      dtype: that of the computation; the kernel is float32.
      init_scale: the variance of the random kernel, relative to 1 / I.
    """

    features: int
    axes: tuple[str, str]
    dtype: Dtype = "float32"
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies x by the kernel."""
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, self.axes), (x.shape[-1], self.features), jnp.float32
        )
        if not jax.sharding.get_abstract_mesh().empty:
            # Left alone, XLA:TPU lays attention's kernels as the heads like them, and for that copies those
            # of all layers of a scan at each training step: 0.2 GiB a chip for XXL on 16.
            kernel = with_layout_constraint(kernel, Layout(major_to_minor=(0, 1)))
        # As one matrix: XLA's CPU compiler takes half the time for the gradients of the 2-D product.
        flat = jnp.dot(x.astype(self.dtype).reshape(-1, x.shape[-1]), kernel.astype(self.dtype))
        return flat.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """T5's layer norm: it subtracts no mean and adds no bias; its statistics are float32."""

    dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of x."""
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",)),
            (x.shape[-1],),
            jnp.float32,
        )
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return (x * scale).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head attention. Its keys and values are computed apart, so that they can be cached and shared."""

    config: T5Config
    out_init_scale: float = 1.0

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        joined = c.num_heads * c.head_dim
        # 1/head_dim: the scaling that other transformers apply to the attention logits.
        self.query = Dense(joined, ("embed", "joined_kv"), c.dtype, init_scale=1.0 / c.head_dim)
        self.key = Dense(joined, ("embed", "joined_kv"), c.dtype)
        self.value = Dense(joined, ("embed", "joined_kv"), c.dtype)
        self.out = Dense(c.emb_dim, ("joined_kv", "embed"), c.dtype, self.out_init_scale)
        # One mask for all query positions (as T5X does): cheap random bits.
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)

    def keys_values(self, x_BxSxE: jax.Array) -> KeysValues:
        """Computes keys and values, each B×S×H×D."""
        return self._heads(self.key(x_BxSxE)), self._heads(self.value(x_BxSxE))

    def __call__(
        self,
        x_BxTxE: jax.Array,
        keys_values: KeysValues,
        mask_BxTxS: jax.Array,
        deterministic: bool,
        bias_HxTxS: jax.Array | float = 0.0,
    ) -> jax.Array:
        """Attends from each position of x to the keys.

        Args:
          x_BxTxE: from where to attend.
          keys_values: see `keys_values`.
          mask_BxTxS: bool, which keys each position may attend to; its T may be 1, for all positions.
          deterministic: False for dropout.
          bias_HxTxS: added to the logits.

        Returns:
          B×T×E.
        """
        keys_BxSxHxD, values_BxSxHxD = keys_values
        query_BxTxHxD = self._heads(self.query(x_BxTxE))
        logits_BxHxTxS = jnp.einsum("bthd,bshd->bhts", query_BxTxHxD, keys_BxSxHxD)
        # Mask and bias stay apart until here: their sum, BxHxTxS, would be kept for all layers of a scan.
        masked = jnp.where(mask_BxTxS[:, None], logits_BxHxTxS.astype(jnp.float32) + bias_HxTxS, NEG_INF)
        weights = jax.nn.softmax(masked, axis=-1)
        weights = self.dropout(weights.astype(self.config.dtype), deterministic)
        mixed_BxTxHxD = jnp.einsum("bhts,bshd->bthd", weights, values_BxSxHxD)
        return self.out(mixed_BxTxHxD.reshape(*mixed_BxTxHxD.shape[:2], -1))

    def decode_self_attention(
        self, x_BxKxE: jax.Array, keys_values: KeysValues, bias_HxT: jax.Array
    ) -> jax.Array:
        """Attends from the newest token of each of K beams to the beam's own cached keys.

        The keys of a head lie together in the cache: on a CPU this takes a third of the time that it takes
        with heads as the innermost axis.

        Args:
          x_BxKxE: the newest tokens.
          keys_values: the cache, each B×K×H×T×D.
          bias_HxT: added to the logits; NEG_INF masks later positions.

        Returns:
          B×K×E.
        """
        keys, values = keys_values
        query_BxKxHxD = self._heads(self.query(x_BxKxE))
        logits_BxKxHxT = jnp.einsum("bkhd,bkhtd->bkht", query_BxKxHxD, keys).astype(jnp.float32) + bias_HxT
        weights = jax.nn.softmax(logits_BxKxHxT, axis=-1).astype(values.dtype)
        mixed_BxKxHxD = jnp.einsum("bkht,bkhtd->bkhd", weights, values)
        return self.out(mixed_BxKxHxD.reshape(*x_BxKxE.shape[:2], -1))


class MLP(nn.Module):
    """The feed-forward layer. T5 1.1: wo(gelu(x wi_0) * x wi_1). T5 1.0: wo(relu(x wi))."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Applies the layer to …×E; `deterministic` is False for dropout."""
        c = self.config
        names = [f"wi_{i}" for i in range(len(c.mlp_activations))] if len(c.mlp_activations) > 1 else ["wi"]
        x = math.prod(
            ACTIVATIONS[activation](Dense(c.mlp_dim, ("embed", "mlp"), c.dtype, name=name)(x))
            for name, activation in zip(names, c.mlp_activations, strict=True)
        )
        x = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))(x, deterministic)
        return Dense(c.emb_dim, ("mlp", "embed"), c.dtype, c.branch_init_scale, name="wo")(x)


def relpos_bucket(
    distance: np.ndarray, bidirectional: bool, buckets: int = 32, max_distance: int = 128
) -> np.ndarray:
    """Finds T5's bucket of each distance: near distances have buckets of their own, far ones share them.

    Args:
      distance: int, key position - query position, of any shape.
      bidirectional: whether each direction has half of the buckets; otherwise all keys after the query share
        bucket 0.
      buckets: how many there are.
      max_distance: up to here buckets widen logarithmically; from here on all distances share the last.

    Returns:
      The buckets, of the shape of `distance`.
    """
    offset = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0) * buckets
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    # float32 as in T5X and PyTorch: a distance on a bucket's edge must fall on the same side.
    log = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.log(max_distance / exact)
    far = np.minimum(exact + (log * (buckets - exact)).astype(np.int32), buckets - 1)
    return offset + np.where(distance < exact, distance, far)


class RelativePositionBias(nn.Module):
    """A learned number for each head and bucket of distances, which is added to the attention logits."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, query_positions: np.ndarray, key_positions: np.ndarray) -> jax.Array:
        """Gives the biases.

        Args:
          query_positions: T positions, known when compiling.
          key_positions: S positions, known when compiling.

        Returns:
          Float32 H×T×S.
        """
        c = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table_HxN = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(init, ("heads", "relpos_buckets")),
            (c.num_heads, c.relpos_buckets),
            jnp.float32,
        )
        distance_TxS = key_positions[None, :] - query_positions[:, None]
        bucket_TxS = relpos_bucket(distance_TxS, self.bidirectional, c.relpos_buckets, c.relpos_max_distance)
        return table_HxN[:, bucket_TxS]


class TokenEmbedder(nn.Module):
    """An embedding of `size` tokens, in the dtype of the computation; negative tokens are read as padding."""

    config: T5Config
    size: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Looks up int32 tokens of any shape; …×E."""
        table_VxE = self.param(
            "embedding",
            nn.with_logical_partitioning(
                nn.initializers.normal(self.config.embedding_init_std), ("vocab", "embed")
            ),
            (self.size, self.config.emb_dim),
            jnp.float32,
        )
        return jnp.take(table_VxE, jnp.maximum(tokens, PAD), axis=0).astype(self.config.dtype)
