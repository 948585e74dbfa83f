"""The T5 1.1 network: encoder, decoder, and the decoder's one-token-a-beam step for docid search.

T5 1.1 (Raffel et al. 2020, section 2.1, and the 1.1 release notes): pre-RMSNorm, relative position
buckets shared by the layers of a stack, gated GELU, no biases, no 1/sqrt(d) in attention (it is in the
query's initialiser), and an output matrix of its own. Parameter names and shapes are T5X's, so public
checkpoints load without renaming.

Letters in shapes: B batch, S encoder length, T decoder length, K beams, E embedding, H heads, D head
size, V output size.
"""

import dataclasses

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np

KeysValues = tuple[jax.Array, jax.Array]
MASKED = -1e10  # added to attention logits; finite, so that an all-padding row stays finite
RELPOS_BUCKETS, RELPOS_MAX_DISTANCE = 32, 128
LOG_Z_GROUPS = 8


@gin.configurable
@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5. One gin file a size in `gin_configs/models/`.

    `output_size` is the width of the decoder's softmax: the text vocabulary (None), or the docids'. Where the
    decoder `reads_outputs`, it has an embedding of its own for such tokens; otherwise it reads the encoder's,
    as T5 does. `dtype` is the computation's; parameters are always float32.

    `embedding_init_std` and `branch_init_scale` say how parameters begin, for training from scratch: the
    embedding's standard deviation, and the variance, relative to T5's, of the matrices by which
    self-attention and MLPs write into the residual stream. Near 0, the network starts as a bag of words that
    the decoder attends to, and learns in minutes what it would otherwise take hours to find.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    dropout_rate: float = 0.1
    dtype: str = "float32"
    embedding_init_std: float = 1.0
    branch_init_scale: float = 1.0
    output_size: int | None = None
    reads_outputs: bool = False


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
        self, x_BxTxE: jax.Array, keys_values: KeysValues, bias: jax.Array, deterministic: bool
    ) -> jax.Array:
        """Attends from x to the keys. `bias` (position and mask) broadcasts to BxHxTxS. Gives BxTxE."""
        keys_BxSxHxD, values_BxSxHxD = keys_values
        query_BxTxHxD = self._heads(self.query(x_BxTxE))
        logits_BxHxTxS = jnp.einsum("bthd,bshd->bhts", query_BxTxHxD, keys_BxSxHxD)
        weights = jax.nn.softmax(logits_BxHxTxS.astype(jnp.float32) + bias, axis=-1)
        weights = self.dropout(weights.astype(self.config.dtype), deterministic)
        mixed_BxTxHxD = jnp.einsum("bhts,bshd->bthd", weights, values_BxSxHxD)
        return self.out(mixed_BxTxHxD.reshape(*mixed_BxTxHxD.shape[:2], -1))

    def attend_own(self, x_BxKxE: jax.Array, keys_values: KeysValues, bias_HxT: jax.Array) -> jax.Array:
        """Each of K beams attends from its newest token to its own keys, each BxKxTxHxD. Gives BxKxE.

        One query has nothing to share between rows: products and sums are one pass over the keys, where tiny
        matrix products would each cost more than their arithmetic.
        """
        keys, values = keys_values
        query_BxKx1xHxD = self._heads(self.query(x_BxKxE))[:, :, None]
        logits_BxKxTxH = jnp.sum((query_BxKx1xHxD * keys).astype(jnp.float32), axis=-1) + bias_HxT.T
        weights = jax.nn.softmax(logits_BxKxTxH, axis=2).astype(values.dtype)
        mixed_BxKxHxD = jnp.sum(weights[..., None] * values, axis=2)
        return self.out(mixed_BxKxHxD.reshape(*x_BxKxE.shape[:2], -1))


class MLP(nn.Module):
    """Gated GELU: wo(gelu(x wi_0) * x wi_1)."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        gate = nn.gelu(Dense(c.mlp_dim, ("embed", "mlp"), c.dtype, name="wi_0")(x), approximate=True)
        x = gate * Dense(c.mlp_dim, ("embed", "mlp"), c.dtype, name="wi_1")(x)
        x = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))(x, deterministic)
        return Dense(c.emb_dim, ("mlp", "embed"), c.dtype, c.branch_init_scale, name="wo")(x)


def relpos_bucket(distance: np.ndarray, bidirectional: bool) -> np.ndarray:
    """T5's bucket of each distance (key position - query position): exact when near, logarithmic when far.

    Half the buckets are for each direction if `bidirectional`; otherwise the future shares bucket 0.
    """
    buckets, offset = RELPOS_BUCKETS, np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0) * buckets
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    # float32 as in T5X and PyTorch: a distance on a bucket's edge must fall on the same side.
    log = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.log(RELPOS_MAX_DISTANCE / exact)
    far = np.minimum(exact + (log * (buckets - exact)).astype(np.int32), buckets - 1)
    return offset + np.where(distance < exact, distance, far)


class RelativePositionBias(nn.Module):
    """A learned number per head and bucket of distance, added to the attention logits."""

    num_heads: int
    bidirectional: bool

    @nn.compact
    def __call__(self, query_positions: np.ndarray, key_positions: np.ndarray) -> jax.Array:
        """1xHxTxS for T query and S key positions (both known when compiling)."""
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table_HxN = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(init, ("heads", "relpos_buckets")),
            (self.num_heads, RELPOS_BUCKETS),
            jnp.float32,
        )
        bucket_TxS = relpos_bucket(key_positions[None, :] - query_positions[:, None], self.bidirectional)
        return table_HxN[:, bucket_TxS][None]


class EncoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x_BxSxE: jax.Array, bias: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        drop = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))
        attention = Attention(c, c.branch_init_scale, name="attention")
        h = RMSNorm(c.dtype, name="pre_attention_layer_norm")(x_BxSxE)
        x = x_BxSxE + drop(attention(h, attention.keys_values(h), bias, deterministic), deterministic)
        h = RMSNorm(c.dtype, name="pre_mlp_layer_norm")(x)
        return x + drop(MLP(c, name="mlp")(h, deterministic), deterministic)


class Encoder(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x_BxSxE: jax.Array, mask_BxS: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        positions = np.arange(x_BxSxE.shape[1])
        bias = RelativePositionBias(c.num_heads, bidirectional=True, name="relpos_bias")(positions, positions)
        bias = bias + jnp.where(mask_BxS, 0.0, MASKED)[:, None, None, :]
        drop = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))
        x = drop(x_BxSxE, deterministic)
        for i in range(c.num_encoder_layers):
            x = EncoderLayer(c, name=f"layers_{i}")(x, bias, deterministic)
        return drop(RMSNorm(c.dtype, name="encoder_norm")(x), deterministic)


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

    def _after_self_attention(self, x, cross: KeysValues, cross_bias, deterministic: bool) -> jax.Array:
        h = self.pre_cross_attention_layer_norm(x)
        x = x + self.dropout(
            self.encoder_decoder_attention(h, cross, cross_bias, deterministic), deterministic
        )
        return x + self.dropout(self.mlp(self.pre_mlp_layer_norm(x), deterministic), deterministic)

    def __call__(self, x_BxTxE, cross: KeysValues, self_bias, cross_bias, deterministic: bool) -> jax.Array:
        h = self.pre_self_attention_layer_norm(x_BxTxE)
        attended = self.self_attention(h, self.self_attention.keys_values(h), self_bias, deterministic)
        x = x_BxTxE + self.dropout(attended, deterministic)
        return self._after_self_attention(x, cross, cross_bias, deterministic)

    def cross_keys_values(self, encoded_BxSxE: jax.Array) -> KeysValues:
        return self.encoder_decoder_attention.keys_values(encoded_BxSxE)

    def step(
        self, x_BxKxE, position, kept: KeysValues, cross: KeysValues, self_bias, cross_bias
    ) -> tuple[jax.Array, KeysValues]:
        """One token for each of K beams; their keys and values go into `kept`, each BxKxTxHxD, at `position`.

        Self-attention is each beam's own; cross-attention treats the beams as positions, so that they
        share their query's keys and values without a copy. Gives (BxKxE, `kept` with this token).
        """
        h = self.pre_self_attention_layer_norm(x_BxKxE)
        kept = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new[:, :, None], position, axis=2),
            kept,
            self.self_attention.keys_values(h),
        )
        x = x_BxKxE + self.self_attention.attend_own(h, kept, self_bias)
        return self._after_self_attention(x, cross, cross_bias, deterministic=True), kept


class Decoder(nn.Module):
    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = RelativePositionBias(c.num_heads, bidirectional=False)
        self.layers = [DecoderLayer(c) for _ in range(c.num_decoder_layers)]
        self.decoder_norm = RMSNorm(c.dtype)
        self.logits_dense = Dense(c.output_size or c.vocab_size, ("embed", "vocab"), c.dtype)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def logits(self, x: jax.Array, deterministic: bool) -> jax.Array:
        return self.logits_dense(self.dropout(x, deterministic)).astype(jnp.float32)

    def some_logits(self, x_BxKxE, tokens_S) -> tuple[jax.Array, jax.Array]:
        kernel_ExV = self.logits_dense.variables["params"]["kernel"].astype(self.config.dtype)
        blocks = log_z_blocks(kernel_ExV.shape[1])
        if blocks == 1 or 2 * len(tokens_S) > kernel_ExV.shape[1]:
            logits_BxKxV = self.logits(x_BxKxE, deterministic=True)
            return logits_BxKxV[..., tokens_S], jax.nn.logsumexp(logits_BxKxV, axis=-1)
        return (x_BxKxE @ kernel_ExV[:, tokens_S]).astype(jnp.float32), log_z(x_BxKxE, kernel_ExV, blocks)

    def __call__(self, x_BxTxE, encoded_BxSxE, mask_BxS, deterministic: bool) -> jax.Array:
        positions = np.arange(x_BxTxE.shape[1])
        causal_TxT = positions[None, :] <= positions[:, None]
        self_bias = self.relpos_bias(positions, positions) + jnp.where(causal_TxT, 0.0, MASKED)
        cross_bias = jnp.where(mask_BxS, 0.0, MASKED)[:, None, None, :]
        x = self.dropout(x_BxTxE, deterministic)
        for layer in self.layers:
            x = layer(x, layer.cross_keys_values(encoded_BxSxE), self_bias, cross_bias, deterministic)
        return self.logits(self.decoder_norm(x), deterministic)

    def cross_keys_values(self, encoded_BxSxE: jax.Array) -> list[KeysValues]:
        return [layer.cross_keys_values(encoded_BxSxE) for layer in self.layers]

    def step(self, x_BxKxE, position, cache: list, cross: list, mask_BxS) -> tuple[jax.Array, list]:
        positions = np.arange(cache[0][0].shape[2])
        bias_1xHxTxT = self.relpos_bias(positions, positions)
        self_bias = jax.lax.dynamic_index_in_dim(bias_1xHxTxT[0], position, axis=1, keepdims=False)
        self_bias += jnp.where(positions <= position, 0.0, MASKED)
        cross_bias = jnp.where(mask_BxS, 0.0, MASKED)[:, None, None, :]
        x, longer = x_BxKxE, []
        for layer, kept, shared in zip(self.layers, cache, cross, strict=True):
            x, kept = layer.step(x, position, kept, shared, self_bias, cross_bias)
            longer.append(kept)
        return self.decoder_norm(x), longer


def log_z_blocks(size: int) -> int:
    """Into how many blocks of about 2,048 outputs a softmax of `size` is best cut; 1: as a whole."""
    eighth = size // LOG_Z_GROUPS
    counts = [n for n in range(1, eighth + 1) if eighth % n == 0] if size % LOG_Z_GROUPS == 0 else [1]
    return min(counts, key=lambda n: abs(size / n - 2048))


def log_z(x_BxKxE: jax.Array, kernel_ExV: jax.Array, blocks: int) -> jax.Array:
    """Float32 B×K: the log-sum-exp of all logits x · kernel, which are never in memory together.

    A block takes a part of each of eight groups of outputs, so that a kernel sharded over its outputs is
    multiplied where it lies; the groups are added up at the end.
    """
    E, V = kernel_ExV.shape
    parts_ExGxNxC = kernel_ExV.reshape(E, LOG_Z_GROUPS, blocks, V // LOG_Z_GROUPS // blocks)
    shape = (*x_BxKxE.shape[:2], LOG_Z_GROUPS)

    def add(carry, block):
        largest_BxKxG, total_BxKxG = carry
        part = jax.lax.dynamic_index_in_dim(parts_ExGxNxC, block, 2, keepdims=False).reshape(E, -1)
        logits_BxKxGxC = (x_BxKxE.reshape(-1, E) @ part).reshape(*shape, -1).astype(jnp.float32)
        largest = jnp.maximum(largest_BxKxG, jnp.max(logits_BxKxGxC, axis=-1))
        total_BxKxG *= jnp.exp(largest_BxKxG - largest)
        total_BxKxG += jnp.sum(jnp.exp(logits_BxKxGxC - largest[..., None]), axis=-1)
        return (largest, total_BxKxG), None

    start = (jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32))
    (largest_BxKxG, total_BxKxG), _ = jax.lax.scan(add, start, jnp.arange(blocks))
    return jax.nn.logsumexp(largest_BxKxG + jnp.log(total_BxKxG), axis=-1)


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
        return jnp.take(table_VxE, tokens, axis=0).astype(self.config.dtype)


class T5(nn.Module):
    """Encoder and decoder over one token embedding. Token 0 is padding, and starts every target."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.token_embedder = TokenEmbedder(c, c.vocab_size)
        if c.reads_outputs:
            self.decoder_token_embedder = TokenEmbedder(c, c.output_size)
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)

    def _embed_targets(self, tokens: jax.Array) -> jax.Array:
        embedder = self.decoder_token_embedder if self.config.reads_outputs else self.token_embedder
        return embedder(tokens)

    def encode(self, inputs_BxS: jax.Array, deterministic: bool = True) -> jax.Array:
        """Encodings BxSxE of tokens (0 = padding)."""
        return self.encoder(self.token_embedder(inputs_BxS), inputs_BxS > 0, deterministic)

    def __call__(
        self, inputs_BxS: jax.Array, decoder_inputs_BxT: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Float32 logits BxTxV of each target position, given the targets before it (teacher forcing)."""
        encoded = self.encode(inputs_BxS, deterministic)
        return self.decoder(self._embed_targets(decoder_inputs_BxT), encoded, inputs_BxS > 0, deterministic)

    def start(
        self, inputs_BxS: jax.Array, beams: int, length: int
    ) -> tuple[list[KeysValues], list[KeysValues]]:
        """Encodes queries, for `step` to write up to `length` tokens for each of some beams.

        Gives (each decoder layer's cross-attention keys and values, BxSxHxD, made once a query; its empty
        cache of the beams' own, BxKxTxHxD).
        """
        c = self.config
        cross = self.decoder.cross_keys_values(self.encode(inputs_BxS))
        empty = jnp.zeros((len(inputs_BxS), beams, length, c.num_heads, c.head_dim), c.dtype)
        return cross, [(empty, empty)] * c.num_decoder_layers

    def step(
        self,
        tokens_BxK: jax.Array,
        position: jax.Array | int,
        cache: list[KeysValues],
        cross: list[KeysValues],
        inputs_BxS: jax.Array,
    ) -> tuple[jax.Array, list[KeysValues]]:
        """What the decoder makes of K beams whose newest token stands at `position`; and the cache with it.

        Gives BxKxE, from which `logits` or `some_logits` read the next token's. The shapes are those of every
        position, so a loop around the step compiles it once. A search that re-orders its beams re-orders the
        cache's second axis.
        """
        x_BxKxE = self._embed_targets(tokens_BxK)
        return self.decoder.step(x_BxKxE, position, cache, cross, inputs_BxS > 0)

    def logits(self, x_BxKxE: jax.Array) -> jax.Array:
        """Float32 logits BxKxV of what `step` gave."""
        return self.decoder.logits(x_BxKxE, deterministic=True)

    def some_logits(self, x_BxKxE: jax.Array, tokens_S: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Float32 (logits BxKxS of some tokens, log-sum-exp BxK of all logits) of what `step` gave."""
        return self.decoder.some_logits(x_BxKxE, tokens_S)
