"""The blocks that a T5's encoder and decoder are stacks of. Letters in shapes: see t5.py."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from retrieval_jax.models.layers import (
    MLP,
    REMAT_POLICIES,
    STACK_AXIS,
    Attention,
    KeysValues,
    RMSNorm,
    T5Config,
    constrain,
)


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


def run_layers(
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
