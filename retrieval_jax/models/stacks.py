"""The layers of a T5's encoder and decoder, and the stacks of them. Letters in shapes: see t5.py.

A stack is a module for each layer, or, with `T5Config.scan_layers`, one module whose arrays hold all layers.
"""

import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.models.layers import (
    MLP,
    REMAT_POLICIES,
    STACK_AXIS,
    Attention,
    KeysValues,
    RelativePositionBias,
    RMSNorm,
    T5Config,
    constrain,
)
from retrieval_jax.models.softmax import NEG_INF

STACKS = {"encoder": "encoder", "decoder": "decoder", "pawa_decoder": "decoder"}
"""The name of a stack -> the name of the module in it that holds all of its layers if they are scanned."""


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each after a norm and beside the residual stream."""

    config: T5Config

    @nn.compact
    def __call__(
        self, x_BxSxE: jax.Array, bias_HxSxS: jax.Array, mask_BxSxS: jax.Array, deterministic: bool
    ) -> jax.Array:
        """Applies the layer to B×S×E; see `Attention` for the bias and the mask."""
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
    """Self-attention, cross-attention and MLP, each after a norm and beside the residual stream."""

    config: T5Config

    def setup(self) -> None:
        """Makes the submodules."""
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
        # Where each query has several rows of targets, these are positions here: they share its keys.
        h = h.reshape(cross_kv[0].shape[0], -1, h.shape[-1])
        attended = self.encoder_decoder_attention(h, cross_kv, cross_mask_BxTxS, deterministic)
        x = x + self.dropout(attended.reshape(x.shape), deterministic)
        return x + self.dropout(self.mlp(self.pre_mlp_layer_norm(x), deterministic), deterministic)

    def __call__(
        self, x_BxTxE, encoded_BxSxE, bias_HxTxT, self_mask_BxTxT, cross_mask_BxTxS, deterministic: bool
    ) -> jax.Array:
        """Applies the layer to all target positions; see `Attention` for the bias and the masks.

        Where each query has C rows of targets, x is (B·C)×T×E, those of a query behind one another.
        """
        x = constrain(x_BxTxE, "batch", None, None)
        h = self.pre_self_attention_layer_norm(x)
        own = self.self_attention.keys_values(h)
        attended = self.self_attention(h, own, self_mask_BxTxT, deterministic, bias_HxTxT)
        x = x + self.dropout(attended, deterministic)
        return self._after_self_attention(
            x, self.cross_keys_values(encoded_BxSxE), cross_mask_BxTxS, deterministic
        )

    def cross_keys_values(self, encoded_BxSxE: jax.Array) -> KeysValues:
        """Computes the keys and values of cross-attention, each B×S×H×D."""
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


class Encoder(nn.Module):
    """A stack of encoder layers, and the norm after it."""

    config: T5Config

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        self.relpos_bias = RelativePositionBias(c, bidirectional=True)
        if c.scan_layers:
            self.encoder = EncoderLayer(c)
        else:
            self.layers = [EncoderLayer(c) for _ in range(c.num_encoder_layers)]
        self.encoder_norm = RMSNorm(c.dtype)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def __call__(self, x_BxSxE: jax.Array, mask_BxSxS: jax.Array, deterministic: bool) -> jax.Array:
        """Encodes embedded tokens.

        Args:
          x_BxSxE: the embedded tokens.
          mask_BxSxS: bool, which positions each may attend to; its first S may be 1.
          deterministic: False for dropout.

        Returns:
          B×S×E.
        """
        c = self.config
        positions = np.arange(x_BxSxE.shape[1])
        bias_HxSxS = self.relpos_bias(positions, positions)
        layers = self.encoder if c.scan_layers else self.layers
        x = self.dropout(x_BxSxE, deterministic)
        x = _run_layers(c, layers, c.num_encoder_layers, x, bias_HxSxS, mask_BxSxS, deterministic)
        return self.dropout(self.encoder_norm(x), deterministic)


class DecoderStack(nn.Module):
    """A stack of `count` decoder layers, and the norm after it.

    Only a stack that is not scanned has a `decode_step`.
    """

    config: T5Config
    count: int

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        self.relpos_bias = RelativePositionBias(c, bidirectional=False)
        if c.scan_layers:
            self.decoder = DecoderLayer(c)
        else:
            self.layers = [DecoderLayer(c) for _ in range(self.count)]
        self.decoder_norm = RMSNorm(c.dtype)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def __call__(self, x_BxTxE, encoded_BxSxE, self_mask_BxTxT, cross_mask_BxTxS, deterministic: bool):
        """Decodes embedded targets, given the encodings and which positions each may attend to; B×T×E.

        Targets may be (B·C)×T×E: C of each encoding, behind one another.
        """
        c = self.config
        positions = np.arange(x_BxTxE.shape[1])
        bias_HxTxT = self.relpos_bias(positions, positions)
        layers = self.decoder if c.scan_layers else self.layers
        shared = (encoded_BxSxE, bias_HxTxT, self_mask_BxTxT, cross_mask_BxTxS, deterministic)
        x = _run_layers(c, layers, self.count, self.dropout(x_BxTxE, deterministic), *shared)
        return self.dropout(self.decoder_norm(x), deterministic)

    def cross_keys_values(self, encoded_BxSxE: jax.Array) -> list[KeysValues]:
        """Computes the keys and values of each layer's cross-attention, each B×S×H×D."""
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


def _run_layers(
    config: T5Config, layers: nn.Module | Sequence[nn.Module], count: int, x: jax.Array, *shared
) -> jax.Array:
    """Runs x through a stack of layers, whose activations are kept or computed again as `config.remat` says.

    Args:
      config: the sizes.
      layers: the modules; with `scan_layers`, one module whose arrays hold all layers.
      count: how many layers there are.
      x: what the first layer reads.
      shared: the other arguments, which are the same for all layers; the last one is static.

    Returns:
      What the last layer gives.
    """

    def layer(module, x, *shared):
        return module(x, *shared)

    if config.remat != "none":
        # Within a scan XLA cannot merge the second computation with the first, so need not be prevented.
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


def unstack_layers(params: dict) -> dict:
    """Converts the parameters of a T5 with `scan_layers` to those of the same T5 without.

    Args:
      params: arrays of all layers of a stack.

    Returns:
      The parameters with arrays of one layer each.
    """

    def unstacked(stack: dict, name: str) -> dict:
        rest = {k: v for k, v in stack.items() if k != name}
        count = jax.tree.leaves(stack[name])[0].shape[STACK_AXIS]
        return rest | {
            f"layers_{i}": jax.tree.map(lambda x, i=i: jnp.take(x, i, axis=STACK_AXIS), stack[name])
            for i in range(count)
        }

    return {name: unstacked(tree, STACKS[name]) if name in STACKS else tree for name, tree in params.items()}


def is_stacked(path: tuple[str, ...]) -> bool:
    """Tells whether a parameter holds all layers of a scanned stack, on axis STACK_AXIS.

    Args:
      path: the parameter's path, of T5X's names.
    """
    return any(STACKS.get(stack) == name for stack, name in itertools.pairwise(path))
