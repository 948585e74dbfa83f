"""The T5 1.1 network: encoder, decoder, and the decode step that a search takes with one token a beam.

T5 1.1 (Raffel et al. 2020, section 2.1, and the 1.1 release notes) has RMSNorm before each layer, relative
position buckets that the layers of a stack share, gated GELU, no biases, no 1/sqrt(d) in attention (it is in
the query's initialiser), and an output matrix of its own. Parameter names and shapes are T5X's, so public
checkpoints load without renaming.

Letters in shapes: B batch, S encoder length, T decoder length, K beams, E embedding, H heads, D head
size, V output size.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.data.vocabulary import PAD
from retrieval_jax.models.layers import Dense, KeysValues, T5Config, TokenEmbedder, constrain
from retrieval_jax.models.lexical import LexicalHead
from retrieval_jax.models.pawa import PawaAdaptor
from retrieval_jax.models.softmax import candidate_logits, logits_of, token_scores
from retrieval_jax.models.stacks import DecoderStack, Encoder


class Segments(NamedTuple):
    """The example that each position of a packed row belongs to, int32, from 1; 0 is padding.

    Attributes:
      encoder_BxS: of the encoder's positions.
      decoder_BxT: of the decoder's positions.
    """

    encoder_BxS: jax.Array
    decoder_BxT: jax.Array


class Decoder(DecoderStack):
    """The decoder, and the matrix of its softmax, unless that is the embedding's."""

    def setup(self) -> None:
        """Makes the submodules."""
        super().setup()
        c = self.config
        if not c.tied:
            self.logits_dense = Dense(c.outputs, ("embed", "vocab"), "float32")

    def logits(self, x: jax.Array) -> jax.Array:
        """Computes float32 logits …×V."""
        return self.logits_dense(x)


def output_kernel(config: T5Config, params: dict) -> jax.Array:
    """Gives the matrix of the softmax, which multiplies what `T5.hidden` or `T5.decode_step` gave.

    Args:
      config: the sizes.
      params: the parameters of a T5.

    Returns:
      Float32 E×V.
    """
    if config.tied:
        return params["token_embedder"]["embedding"].T
    return params["decoder"]["logits_dense"]["kernel"]


class T5(nn.Module):
    """An encoder and a decoder. Token 0 is padding, and starts every target."""

    config: T5Config

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        self.token_embedder = TokenEmbedder(c, c.vocab_size)
        if c.separate_target_embedding:
            self.decoder_token_embedder = TokenEmbedder(c, c.output_size)
        self.encoder = Encoder(c)
        self.decoder = Decoder(c, c.num_decoder_layers)
        if c.pawa_layers:
            self.pawa_decoder = DecoderStack(c, c.pawa_layers)
            self.pawa_adaptor = PawaAdaptor(c)
        if c.lexical_head:
            self.lexical_head = LexicalHead(c)

    def _embed_targets(self, tokens: jax.Array) -> jax.Array:
        embedder = (
            self.decoder_token_embedder if self.config.separate_target_embedding else self.token_embedder
        )
        return embedder(tokens)

    def encode(
        self, inputs_BxS: jax.Array, deterministic: bool = True, segment_BxS: jax.Array | None = None
    ) -> jax.Array:
        """Encodes tokens.

        Args:
          inputs_BxS: int32, 0 is padding.
          deterministic: False for dropout.
          segment_BxS: the examples of packed rows; None for rows of one example.

        Returns:
          B×S×E.
        """
        mask_BxSxS = _same(segment_BxS, segment_BxS) if segment_BxS is not None else _real(inputs_BxS)
        return self.encoder(self.token_embedder(inputs_BxS), mask_BxSxS, deterministic)

    def lexical(
        self, inputs_BxS: jax.Array, deterministic: bool = True, encoded_BxSxE: jax.Array | None = None
    ) -> jax.Array:
        """Computes a weight for each token of the text vocabulary; see `LexicalHead`.

        It reads the encoder's states, which a search has computed anyway. PAG's (Zeng et al. 2024, section
        3.1) reads the decoder's states given the query's tokens, one pass of the decoder more.

        Args:
          inputs_BxS: int32, 0 is padding.
          deterministic: False for dropout.
          encoded_BxSxE: what `encode` gave for them; None: they are encoded here.

        Returns:
          Float32 B×vocab_size.
        """
        x_BxSxE = self.encode(inputs_BxS, deterministic) if encoded_BxSxE is None else encoded_BxSxE
        table_VxE = nn.unbox(self.token_embedder.variables["params"]["embedding"])
        return self.lexical_head(x_BxSxE, table_VxE, inputs_BxS != PAD)

    def hidden(
        self,
        inputs_BxS: jax.Array,
        decoder_inputs_BxT: jax.Array,
        deterministic: bool = True,
        segments: Segments | None = None,
        encoded_BxSxE: jax.Array | None = None,
    ) -> jax.Array:
        """Computes what the softmax reads for each target, given the targets before it (teacher forcing).

        Args:
          inputs_BxS: int32, 0 is padding.
          decoder_inputs_BxT: int32, the targets, moved one position to the right; B×C×T for C targets of each
            input, which is encoded once for all of them.
          deterministic: False for dropout.
          segments: the examples of packed rows, which do not see one another; None for rows of one example.
          encoded_BxSxE: what `encode` gave for the inputs; None: they are encoded here.

        Returns:
          B×T×E (B×C×T×E), from which `logits` makes the logits.
        """
        T = decoder_inputs_BxT.shape[-1]
        causal_TxT = np.tril(np.ones((1, T, T), bool))
        encoded = encoded_BxSxE
        if encoded is None:
            encoded = self.encode(inputs_BxS, deterministic, segments and segments.encoder_BxS)
        if segments is None:
            self_mask, cross_mask = jnp.asarray(causal_TxT), _real(inputs_BxS)
        else:
            self_mask = causal_TxT & _same(segments.decoder_BxT, segments.decoder_BxT)
            cross_mask = _same(segments.decoder_BxT, segments.encoder_BxS)
        embedded = self._embed_targets(decoder_inputs_BxT.reshape(-1, T))
        shared = (embedded, encoded, self_mask, cross_mask, deterministic)
        x = self.decoder(*shared)
        if self.config.pawa_layers:
            x = self.pawa_adaptor(x, self.pawa_decoder(*shared))
        x = self._scaled(x).reshape(*decoder_inputs_BxT.shape, -1)
        return constrain(x, "batch", *[None] * (x.ndim - 1))

    def __call__(
        self, inputs_BxS: jax.Array, decoder_inputs_BxT: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Computes float32 logits B×T×V, or B×C×T×V; see `hidden`."""
        if self.config.lexical_head and self.is_initializing():
            self.lexical(inputs_BxS)  # makes its parameters
        return self.logits(self.hidden(inputs_BxS, decoder_inputs_BxT, deterministic))

    def prefill(
        self, inputs_BxS: jax.Array, beams: int, length: int, encoded_BxSxE: jax.Array | None = None
    ) -> tuple[list[KeysValues], list[KeysValues]]:
        """Encodes queries, for `decode_step` to write up to `length` tokens in each of K beams.

        Args:
          inputs_BxS: int32 tokens, 0 is padding.
          beams: K, for which the empty cache has room.
          length: T, how many tokens the cache has room for.
          encoded_BxSxE: what `encode` made of the queries, where that is known; None to encode them.

        Returns:
          (cross_kv: each decoder layer's cross-attention keys and values B×S×H×D, made once a query;
          kv_cache: each layer's empty self-attention cache B×K×H×T×D). The PAWA decoder's layers come last.
        """
        cross_kv = self.cross_keys_values(inputs_BxS, encoded_BxSxE)
        return cross_kv, self.empty_cache(cross_kv, beams, length)

    def cross_keys_values(
        self, inputs_BxS: jax.Array, encoded_BxSxE: jax.Array | None = None
    ) -> list[KeysValues]:
        """Encodes queries: the first result of `prefill`, which any number of caches may go with."""
        encoded = self.encode(inputs_BxS) if encoded_BxSxE is None else encoded_BxSxE
        cross_kv = self.decoder.cross_keys_values(encoded)
        return (
            cross_kv + self.pawa_decoder.cross_keys_values(encoded) if self.config.pawa_layers else cross_kv
        )

    def empty_cache(self, cross_kv: list[KeysValues], beams: int, length: int) -> list[KeysValues]:
        """Makes the second result of `prefill`."""
        c = self.config
        empty = jnp.zeros((cross_kv[0][0].shape[0], beams, c.num_heads, length, c.head_dim), c.dtype)
        return [(empty, empty)] * len(cross_kv)

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
        """Divides by √E where the softmax uses the embedding, whose rows have about that length (T5 1.0)."""
        return x * self.config.emb_dim**-0.5 if self.config.tied else x

    def logits(self, x_BxKxE: jax.Array) -> jax.Array:
        """Computes float32 logits …×V of what `decode_step` or `hidden` gave."""
        if not self.config.tied:
            return self.decoder.logits(x_BxKxE)
        return logits_of(x_BxKxE, self._kernel())

    def candidate_logits(
        self, x_BxKxE: jax.Array, tokens_S: jax.Array, with_log_z: bool = True
    ) -> tuple[jax.Array, jax.Array | None]:
        """Computes the logits of candidate tokens; see `softmax.candidate_logits`.

        Args:
          x_BxKxE: what `decode_step` gave.
          tokens_S: int32, the candidates.
          with_log_z: whether the log-sum-exp is computed.

        Returns:
          (float32 logits B×K×S, float32 log-sum-exp B×K of all logits or None).
        """
        return candidate_logits(x_BxKxE, self._kernel(), tokens_S, with_log_z)

    def token_scores(self, x_BxKxE: jax.Array, tokens_BxK: jax.Array, with_log_z: bool = True) -> jax.Array:
        """Computes float32 scores B×K of one token each; see `softmax.token_scores`."""
        return token_scores(x_BxKxE, self._kernel(), tokens_BxK, with_log_z)

    def _kernel(self) -> jax.Array:
        params = nn.unbox(self.variables["params"])  # while they are made, with their axes' names
        return output_kernel(self.config, params)


def _real(tokens_BxS: jax.Array) -> jax.Array:
    """Makes the mask B×1×S by which all positions attend to every token but padding."""
    return (tokens_BxS != PAD)[:, None, :]


def _same(segment_BxT: jax.Array, segment_BxS: jax.Array) -> jax.Array:
    """Makes the mask B×T×S of packed rows: the tokens of an example attend to that example's alone."""
    return (segment_BxT[:, :, None] == segment_BxS[:, None, :]) & (segment_BxS > 0)[:, None, :]
