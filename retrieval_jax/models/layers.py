"""The layers that a T5's encoder and decoder are stacks of. Letters in shapes: see t5.py."""

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import Fraction, NonNegative, Positive
from retrieval_jax.data.vocabulary import PAD

KeysValues = tuple[jax.Array, jax.Array]
NEG_INF = -1e10  # added to attention logits; finite, so that an all-padding row stays finite
ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "linear": lambda x: x,
}
# Of the layers in the arrays of a scanned stack. T5X has them on axis 1, and XLA then copies all parameters
# at each step: 0.8 GiB a chip more for XXL on 16 chips.
STACK_AXIS = 0
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@gin.configurable
@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5. One gin file a size in `gin_configs/models/`.

    `output_size` is the width of the decoder's softmax: the text vocabulary (None), or the docids'. With
    `separate_target_embedding` the decoder embeds target tokens by a table of its own of `output_size` rows;
    otherwise it shares the encoder's, as T5 does. `dtype` is that of the computation; parameters are float32.

    `embedding_init_std` and `branch_init_scale` say how parameters begin, for training from scratch: the
    embedding's standard deviation, and the variance, relative to T5's, of the matrices by which
    self-attention and MLPs write into the residual stream. Near 0, the network starts as a bag of words that
    the decoder attends to, and learns in minutes what it would otherwise take hours to find.

    For large models: with `scan_layers` each array holds all layers of a stack, on its first axis, so that a
    program of 24 layers compiles as fast as one of one; `remat` says what the backward pass computes again
    instead of keeping: "none" keeps all, "dots" all matrix products, "full" only what goes from layer to
    layer.

    `pawa_layers` > 0 adds the prefix-aware weight-adaptive decoder (NCI, Wang et al. 2022, section 3.3).

    The last four make other members of the family, by T5X's names. T5 1.0 (2020), of which docT5query, GTR
    and Sentence-T5 were made, has `mlp_activations` ("relu",), and with `logits_via_embedding` a softmax over
    texts whose matrix is the embedding's; docids of their own always have a matrix of their own.
    """

    vocab_size: int
    emb_dim: Positive
    num_heads: Positive
    head_dim: Positive
    mlp_dim: Positive
    num_encoder_layers: NonNegative
    num_decoder_layers: NonNegative
    dropout_rate: Fraction = 0.1
    dtype: str = "float32"
    embedding_init_std: float = 1.0
    branch_init_scale: float = 1.0
    output_size: int | None = None
    separate_target_embedding: bool = False
    scan_layers: bool = False
    remat: str = "none"
    pawa_layers: NonNegative = 0
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    logits_via_embedding: bool = False
    relpos_buckets: int = 32
    relpos_max_distance: int = 128

    def __post_init__(self) -> None:
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"T5Config.remat: no policy {self.remat!r}: {', '.join(REMAT_POLICIES)}")
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))  # JSON has lists
        for name in self.mlp_activations:
            if name not in ACTIVATIONS:
                raise UserError(f"T5Config.mlp_activations: no {name!r}: {', '.join(ACTIVATIONS)}")

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding's."""
        return self.logits_via_embedding and self.output_size is None


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Says by logical names how x lies on the mesh, where a trainer has told of one; else x alone."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, nn.logical_to_mesh_axes(axes))


class Dense(nn.Module):
    """x_…xI -> …xO without bias; the kernel's logical axes name how it is sharded."""

    features: int
    axes: tuple[str, str]
    dtype: str = "float32"
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
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
    """T5's layer norm: no mean, no bias; statistics in float32."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
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
    """Multi-head attention whose keys and values are made apart, so that they can be kept and shared."""

    config: T5Config
    out_init_scale: float = 1.0

    def setup(self) -> None:
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
        """Keys and values, each BxSxHxD."""
        return self._heads(self.key(x_BxSxE)), self._heads(self.value(x_BxSxE))

    def __call__(
        self,
        x_BxTxE: jax.Array,
        keys_values: KeysValues,
        mask_BxTxS: jax.Array,
        deterministic: bool,
        bias_HxTxS: jax.Array | float = 0.0,
    ) -> jax.Array:
        """Attends from x to the keys where the mask is true (its T may be 1, for all alike). Gives BxTxE."""
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
        """Each of K beams attends from its newest token to its own keys, each BxKxHxTxD. Gives BxKxE.

        A head's keys lie together: a third of the time, on a CPU, of the same sums with the heads innermost.
        """
        keys, values = keys_values
        query_BxKxHxD = self._heads(self.query(x_BxKxE))
        logits_BxKxHxT = jnp.einsum("bkhd,bkhtd->bkht", query_BxKxHxD, keys).astype(jnp.float32) + bias_HxT
        weights = jax.nn.softmax(logits_BxKxHxT, axis=-1).astype(values.dtype)
        mixed_BxKxHxD = jnp.einsum("bkht,bkhtd->bkhd", weights, values)
        return self.out(mixed_BxKxHxD.reshape(*x_BxKxE.shape[:2], -1))


class MLP(nn.Module):
    """T5 1.1: wo(gelu(x wi_0) * x wi_1). T5 1.0: wo(relu(x wi))."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
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
    """T5's bucket of each distance (key position - query position): exact when near, logarithmic when far.

    Half the buckets are for each direction if `bidirectional`; otherwise the future shares bucket 0. All from
    `max_distance` on share the last.
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
    """A learned number per head and bucket of distance, added to the attention logits."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, query_positions: np.ndarray, key_positions: np.ndarray) -> jax.Array:
        """HxTxS for T query and S key positions (both known when compiling)."""
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


class EncoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(
        self, x_BxSxE: jax.Array, bias_HxSxS: jax.Array, mask_BxSxS: jax.Array, deterministic: bool
    ) -> jax.Array:
        c = self.config
        drop = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))
        attention = Attention(c, c.branch_init_scale, name="attention")
        x = constrain(x_BxSxE, "batch", None, None)
        h = RMSNorm(c.dtype, name="pre_attention_layer_norm")(x)
        attended = attention(h, attention.keys_values(h), mask_BxSxS, deterministic, bias_HxSxS)
        x = x + drop(attended, deterministic)
        h = RMSNorm(c.dtype, name="pre_mlp_layer_norm")(x)
        return x + drop(MLP(c, name="mlp")(h, deterministic), deterministic)


class DecoderLayer(nn.Module):
    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.pre_self_attention_layer_norm = RMSNorm(c.dtype)
        self.self_attention = Attention(c, c.branch_init_scale)
        self.pre_cross_attention_layer_norm = RMSNorm(c.dtype)
        self.encoder_decoder_attention = Attention(c)
        self.pre_mlp_layer_norm = RMSNorm(c.dtype)
        self.mlp = MLP(c)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def _after_self_attention(
        self, x, cross_kv: KeysValues, cross_mask_BxTxS, deterministic: bool
    ) -> jax.Array:
        h = self.pre_cross_attention_layer_norm(x)
        attended = self.encoder_decoder_attention(h, cross_kv, cross_mask_BxTxS, deterministic)
        x = x + self.dropout(attended, deterministic)
        return x + self.dropout(self.mlp(self.pre_mlp_layer_norm(x), deterministic), deterministic)

    def __call__(
        self, x_BxTxE, encoded_BxSxE, bias_HxTxT, self_mask_BxTxT, cross_mask_BxTxS, deterministic: bool
    ) -> jax.Array:
        x = constrain(x_BxTxE, "batch", None, None)
        h = self.pre_self_attention_layer_norm(x)
        own = self.self_attention.keys_values(h)
        attended = self.self_attention(h, own, self_mask_BxTxT, deterministic, bias_HxTxT)
        x = x + self.dropout(attended, deterministic)
        return self._after_self_attention(
            x, self.cross_keys_values(encoded_BxSxE), cross_mask_BxTxS, deterministic
        )

    def cross_keys_values(self, encoded_BxSxE: jax.Array) -> KeysValues:
        return self.encoder_decoder_attention.keys_values(encoded_BxSxE)

    def decode_step(
        self,
        x_BxKxE: jax.Array,
        position: jax.Array | int,
        kv_cache: KeysValues,
        cross_kv: KeysValues,
        bias_HxT: jax.Array,
        cross_mask_BxTxS: jax.Array,
    ) -> tuple[jax.Array, KeysValues]:
        """Feeds one token of each of K beams through the layer, and adds its keys and values to the cache.

        Each beam's self-attention sees the beam alone. Cross-attention treats beams as positions, so that
        they share the keys and values of their query without a copy.

        Args:
          x_BxKxE: the tokens.
          position: where in the cache their keys and values go.
          kv_cache: keys and values of the beams' earlier tokens, each B×K×H×T×D.
          cross_kv: keys and values of the encodings, each B×S×H×D.
          bias_HxT: added to the logits of self-attention; it also masks later positions.
          cross_mask_BxTxS: which encodings may be attended to (its T may be 1).

        Returns:
          (B×K×E; the cache with these tokens).
        """
        h = self.pre_self_attention_layer_norm(x_BxKxE)
        kv_cache = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new[:, :, :, None], position, axis=3),
            kv_cache,
            self.self_attention.keys_values(h),
        )
        x = x_BxKxE + self.self_attention.decode_self_attention(h, kv_cache, bias_HxT)
        return self._after_self_attention(x, cross_kv, cross_mask_BxTxS, deterministic=True), kv_cache


def run_layers(
    config: T5Config, layers: nn.Module | Sequence[nn.Module], count: int, x: jax.Array, *shared
) -> jax.Array:
    """X through `count` layers that are all given the same beside it, kept or computed again as `remat` says.

    With `scan_layers`, `layers` is one module that holds the arrays of all of them.
    """

    def layer(module, x, *shared):
        return module(x, *shared)

    if config.remat != "none":
        # Within a scan XLA cannot merge the second computation with the first: nothing need prevent it.
        policy = REMAT_POLICIES[config.remat]
        static = 1 + len(shared)  # deterministic
        layer = nn.remat(layer, policy=policy, prevent_cse=not config.scan_layers, static_argnums=(static,))
    if not config.scan_layers:
        for module in layers:
            x = layer(module, x, *shared)
        return x
    scan = nn.scan(
        lambda module, x: (layer(module, x, *shared), None),
        variable_axes={"params": STACK_AXIS},
        split_rngs={"params": True, "dropout": True},
        length=count,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scan(layers, x)[0]


class TokenEmbedder(nn.Module):
    config: T5Config
    size: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table_VxE = self.param(
            "embedding",
            nn.with_logical_partitioning(
                nn.initializers.normal(self.config.embedding_init_std), ("vocab", "embed")
            ),
            (self.size, self.config.emb_dim),
            jnp.float32,
        )
        return jnp.take(table_VxE, jnp.maximum(tokens, PAD), axis=0).astype(self.config.dtype)
