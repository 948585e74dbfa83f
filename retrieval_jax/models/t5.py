"""The T5 1.1 network: encoder, decoder, and the decoder's one-token-a-beam step for docid search.

T5 1.1 (Raffel et al. 2020, section 2.1, and the 1.1 release notes): pre-RMSNorm, relative position
buckets shared by the layers of a stack, gated GELU, no biases, no 1/sqrt(d) in attention (it is in the
query's initialiser), and an output matrix of its own. Parameter names and shapes are T5X's, so public
checkpoints load without renaming.

Letters in shapes: B batch, S encoder length, T decoder length, K beams, E embedding, H heads, D head
size, V output size.
"""

import itertools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.data.vocabulary import PAD
from retrieval_jax.models.layers import (
    NEG_INF,
    STACK_AXIS,
    DecoderLayer,
    Dense,
    EncoderLayer,
    KeysValues,
    RelativePositionBias,
    RMSNorm,
    T5Config,
    TokenEmbedder,
    constrain,
    run_layers,
)
from retrieval_jax.models.softmax import candidate_logits, logits_of

PAWA_TOKENS = 2048
STACKS = {"encoder": "encoder", "decoder": "decoder", "pawa_decoder": "decoder"}
"""A stack's name -> the name in it of the one module that holds all of its layers when they are scanned."""


class Segments(NamedTuple):
    """Which example each position of a packed row belongs to (int32; 0 is padding): B×S and B×T."""

    encoder_BxS: jax.Array
    decoder_BxT: jax.Array


class Encoder(nn.Module):
    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = RelativePositionBias(c, bidirectional=True)
        if c.scan_layers:
            self.encoder = EncoderLayer(c)
        else:
            self.layers = [EncoderLayer(c) for _ in range(c.num_encoder_layers)]
        self.encoder_norm = RMSNorm(c.dtype)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def __call__(self, x_BxSxE: jax.Array, mask_BxSxS: jax.Array, deterministic: bool) -> jax.Array:
        """Encodings BxSxE. The mask says which positions each may look at (its first S may be 1)."""
        c = self.config
        positions = np.arange(x_BxSxE.shape[1])
        bias_HxSxS = self.relpos_bias(positions, positions)
        layers = self.encoder if c.scan_layers else self.layers
        x = self.dropout(x_BxSxE, deterministic)
        x = run_layers(c, layers, c.num_encoder_layers, x, bias_HxSxS, mask_BxSxS, deterministic)
        return self.dropout(self.encoder_norm(x), deterministic)


class DecoderStack(nn.Module):
    """A decoder up to its last norm. Only one that is not scanned can `step`."""

    config: T5Config
    count: int

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = RelativePositionBias(c, bidirectional=False)
        if c.scan_layers:
            self.decoder = DecoderLayer(c)
        else:
            self.layers = [DecoderLayer(c) for _ in range(self.count)]
        self.decoder_norm = RMSNorm(c.dtype)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def __call__(self, x_BxTxE, encoded_BxSxE, self_mask_BxTxT, cross_mask_BxTxS, deterministic: bool):
        c = self.config
        positions = np.arange(x_BxTxE.shape[1])
        bias_HxTxT = self.relpos_bias(positions, positions)
        layers = self.decoder if c.scan_layers else self.layers
        shared = (encoded_BxSxE, bias_HxTxT, self_mask_BxTxT, cross_mask_BxTxS, deterministic)
        x = run_layers(c, layers, self.count, self.dropout(x_BxTxE, deterministic), *shared)
        return self.dropout(self.decoder_norm(x), deterministic)

    def cross_keys_values(self, encoded_BxSxE: jax.Array) -> list[KeysValues]:
        return [layer.cross_keys_values(encoded_BxSxE) for layer in self.layers]

    def decode_step(
        self, x_BxKxE, position, kv_cache: list[KeysValues], cross_kv: list[KeysValues], cross_mask_BxTxS
    ) -> tuple[jax.Array, list[KeysValues]]:
        """Feeds one token a beam through the layers; see `T5.decode_step`.

        Returns:
          (the stack's output B×K×E after its last norm; the cache with the token's keys and values).
        """
        positions = np.arange(kv_cache[0][0].shape[3])
        bias_HxTxT = self.relpos_bias(positions, positions)
        bias_HxT = jax.lax.dynamic_index_in_dim(bias_HxTxT, position, axis=1, keepdims=False)
        bias_HxT += jnp.where(positions <= position, 0.0, NEG_INF)
        x, new_cache = x_BxKxE, []
        for layer, layer_cache, layer_cross_kv in zip(self.layers, kv_cache, cross_kv, strict=True):
            x, layer_cache = layer.decode_step(
                x, position, layer_cache, layer_cross_kv, bias_HxT, cross_mask_BxTxS
            )
            new_cache.append(layer_cache)
        return self.decoder_norm(x), new_cache


class Decoder(DecoderStack):
    """The decoder, and the softmax over what it writes, unless that is the embedding's."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        if not c.tied:
            self.logits_dense = Dense(c.output_size or c.vocab_size, ("embed", "vocab"), "float32")

    def logits(self, x: jax.Array) -> jax.Array:
        return self.logits_dense(x)


def output_kernel(config: T5Config, params: dict) -> jax.Array:
    """The matrix E×V (float32) by which the softmax reads what `hidden` or `step` gave."""
    if config.tied:
        return params["token_embedder"]["embedding"].T
    return params["decoder"]["logits_dense"]["kernel"]


class PawaAdaptor(nn.Module):
    """x_i A_i, where the d×d matrix A_i is a linear function of what the PAWA decoder says at i.

    NCI (Wang et al. 2022, equations 4 and 5) writes a position's logits as h_i A_i W. Multiplied from the
    left as here, A_i W (d×V a token) never exists, and the softmax stays one matrix for all tokens.
    """

    config: T5Config

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, adapting_BxTxE: jax.Array) -> jax.Array:
        E = self.config.emb_dim
        # Of all d·d products that make one output: keeps the scale of x where both have it.
        init = nn.initializers.normal(1.0 / E)
        kernel_AxExO = self.param(
            "kernel", nn.with_logical_partitioning(init, ("pawa", "embed", None)), (E, E, E), jnp.float32
        )
        kernel_AxExO = kernel_AxExO.astype(self.config.dtype)

        @jax.checkpoint  # a matrix a token: computed again, not kept
        def adapt(x_BxCxE, adapting_BxCxE):
            matrix_BxCxExO = jnp.einsum("bca,aeo->bceo", adapting_BxCxE, kernel_AxExO)
            return jnp.einsum("bce,bceo->bco", x_BxCxE, matrix_BxCxExO)

        B, T = x_BxTxE.shape[:2]
        width = max((c for c in range(1, T + 1) if T % c == 0 and B * c <= PAWA_TOKENS), default=1)
        if width == T:
            return adapt(x_BxTxE, adapting_BxTxE)
        parts = [jnp.moveaxis(y.reshape(B, T // width, width, E), 1, 0) for y in (x_BxTxE, adapting_BxTxE)]
        return jnp.moveaxis(jax.lax.map(lambda part: adapt(*part), tuple(parts)), 0, 1).reshape(B, T, E)


class T5(nn.Module):
    """Encoder and decoder over one token embedding. Token 0 is padding, and starts every target."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.token_embedder = TokenEmbedder(c, c.vocab_size)
        if c.separate_target_embedding:
            self.decoder_token_embedder = TokenEmbedder(c, c.output_size)
        self.encoder = Encoder(c)
        self.decoder = Decoder(c, c.num_decoder_layers)
        if c.pawa_layers:
            self.pawa_decoder = DecoderStack(c, c.pawa_layers)
            self.pawa_adaptor = PawaAdaptor(c)

    def _embed_targets(self, tokens: jax.Array) -> jax.Array:
        embedder = (
            self.decoder_token_embedder if self.config.separate_target_embedding else self.token_embedder
        )
        return embedder(tokens)

    def encode(
        self, inputs_BxS: jax.Array, deterministic: bool = True, segment_BxS: jax.Array | None = None
    ) -> jax.Array:
        """Encodings BxSxE of tokens (0 = padding)."""
        mask_BxSxS = _same(segment_BxS, segment_BxS) if segment_BxS is not None else _real(inputs_BxS)
        return self.encoder(self.token_embedder(inputs_BxS), mask_BxSxS, deterministic)

    def hidden(
        self,
        inputs_BxS: jax.Array,
        decoder_inputs_BxT: jax.Array,
        deterministic: bool = True,
        segments: Segments | None = None,
    ) -> jax.Array:
        """BxTxE from which `logits` reads each target's, given the targets before it (teacher forcing).

        `segments` are those of packed rows: an example then sees no other of its row.
        """
        T = decoder_inputs_BxT.shape[1]
        causal_TxT = np.tril(np.ones((1, T, T), bool))
        if segments is None:
            encoded = self.encode(inputs_BxS, deterministic)
            self_mask, cross_mask = jnp.asarray(causal_TxT), _real(inputs_BxS)
        else:
            encoded = self.encode(inputs_BxS, deterministic, segments.encoder_BxS)
            self_mask = causal_TxT & _same(segments.decoder_BxT, segments.decoder_BxT)
            cross_mask = _same(segments.decoder_BxT, segments.encoder_BxS)
        embedded = self._embed_targets(decoder_inputs_BxT)
        shared = (embedded, encoded, self_mask, cross_mask, deterministic)
        x = self.decoder(*shared)
        if self.config.pawa_layers:
            x = self.pawa_adaptor(x, self.pawa_decoder(*shared))
        return constrain(self._scaled(x), "batch", None, None)

    def __call__(
        self, inputs_BxS: jax.Array, decoder_inputs_BxT: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Float32 logits BxTxV; see `hidden`."""
        return self.logits(self.hidden(inputs_BxS, decoder_inputs_BxT, deterministic))

    def prefill(
        self, inputs_BxS: jax.Array, beams: int, length: int
    ) -> tuple[list[KeysValues], list[KeysValues]]:
        """Encodes queries, for `decode_step` to write up to `length` tokens in each of K beams.

        Args:
          inputs_BxS: int32 tokens, 0 is padding.
          beams: K, for which the empty cache has room.
          length: T, how many tokens the cache has room for.

        Returns:
          (cross_kv: each decoder layer's cross-attention keys and values B×S×H×D, made once a query;
          kv_cache: each layer's empty self-attention cache B×K×H×T×D). The PAWA decoder's layers come last.
        """
        c = self.config
        encoded = self.encode(inputs_BxS)
        cross_kv = self.decoder.cross_keys_values(encoded)
        if c.pawa_layers:
            cross_kv += self.pawa_decoder.cross_keys_values(encoded)
        empty = jnp.zeros((inputs_BxS.shape[0], beams, c.num_heads, length, c.head_dim), c.dtype)
        return cross_kv, [(empty, empty)] * len(cross_kv)

    def decode_step(
        self,
        tokens_BxK: jax.Array,
        position: jax.Array | int,
        kv_cache: list[KeysValues],
        cross_kv: list[KeysValues],
        inputs_BxS: jax.Array,
    ) -> tuple[jax.Array, list[KeysValues]]:
        """Feeds the newest token of each of K beams through the decoder.

        The shapes are the same at every position, so a loop around the step compiles it once. A search that
        re-orders its beams re-orders the second axis of the cache.

        Args:
          tokens_BxK: int32, the newest tokens; at position 0 they are 0 (T5's start token).
          position: of these tokens, from 0; may be traced.
          kv_cache: keys and values of the tokens before; see `prefill`.
          cross_kv: keys and values of the queries; see `prefill`.
          inputs_BxS: the queries' tokens, of which padding is masked.

        Returns:
          (B×K×E, from which `logits` or `candidate_logits` read the next tokens' logits; the cache with the
          newest tokens).
        """
        n, mask = self.config.num_decoder_layers, _real(inputs_BxS)
        embedded_BxKxE = self._embed_targets(tokens_BxK)
        x, new_cache = self.decoder.decode_step(embedded_BxKxE, position, kv_cache[:n], cross_kv[:n], mask)
        if not self.config.pawa_layers:
            return self._scaled(x), new_cache
        adapting, pawa_cache = self.pawa_decoder.decode_step(
            embedded_BxKxE, position, kv_cache[n:], cross_kv[n:], mask
        )
        return self._scaled(self.pawa_adaptor(x, adapting)), new_cache + pawa_cache

    def _scaled(self, x: jax.Array) -> jax.Array:
        """T5 1.0's embedding has rows of length about √E, and its softmax reads with them."""
        return x * self.config.emb_dim**-0.5 if self.config.tied else x

    def logits(self, x_BxKxE: jax.Array) -> jax.Array:
        """Float32 logits BxKxV of what `step` or `hidden` gave."""
        if not self.config.tied:
            return self.decoder.logits(x_BxKxE)
        return logits_of(x_BxKxE, self._kernel())

    def candidate_logits(self, x_BxKxE: jax.Array, tokens_S: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Float32 (logits BxKxS of some tokens, log-sum-exp BxK of all logits) of what `step` gave."""
        return candidate_logits(x_BxKxE, self._kernel(), tokens_S)

    def _kernel(self) -> jax.Array:
        params = nn.unbox(self.variables["params"])  # while they are made, with their axes' names
        return output_kernel(self.config, params)


def _real(tokens_BxS: jax.Array) -> jax.Array:
    """Attention's mask Bx1xS: all may look at every token that is not padding (PAD_SYMBOL is none)."""
    return (tokens_BxS != PAD)[:, None, :]


def _same(segment_BxT: jax.Array, segment_BxS: jax.Array) -> jax.Array:
    """Attention's mask BxTxS of packed rows: an example's tokens look at its own, and at no padding."""
    return (segment_BxT[:, :, None] == segment_BxS[:, None, :]) & (segment_BxS > 0)[:, None, :]


def unstack_layers(params: dict) -> dict:
    """The parameters of a scanned T5 as those of the same T5 that is not: an array a layer."""

    def unstacked(stack: dict, name: str) -> dict:
        rest = {k: v for k, v in stack.items() if k != name}
        count = jax.tree.leaves(stack[name])[0].shape[STACK_AXIS]
        return rest | {
            f"layers_{i}": jax.tree.map(lambda x, i=i: jnp.take(x, i, axis=STACK_AXIS), stack[name])
            for i in range(count)
        }

    return {name: unstacked(tree, STACKS[name]) if name in STACKS else tree for name, tree in params.items()}


def is_stacked(path: tuple[str, ...]) -> bool:
    """Whether the parameter of that path (T5X's names) holds a scanned stack's layers, on axis STACK_AXIS."""
    return any(STACKS.get(stack) == name for stack, name in itertools.pairwise(path))
