"""The adaptor of the prefix-aware weight-adaptive decoder (PAWA) of NCI. Letters in shapes: see t5.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from retrieval_jax.models.layers import T5Config

PAWA_TOKENS = 2048  # about how many matrices, one a token, a PAWA adaptor holds at a time


class PawaAdaptor(nn.Module):
    """Multiplies each position by a matrix of its own, a linear function of the PAWA decoder's output there.

    NCI (Wang et al. 2022, equations 4 and 5) computes a position's logits as h_i A_i W. This module computes
    h_i A_i first, so that A_i W, E×V for each token, never exists, and the softmax has one matrix for all
    tokens.
    """

    config: T5Config

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, adapting_BxTxE: jax.Array) -> jax.Array:
        """Multiplies.

        Args:
          x_BxTxE: h, the decoder's output.
          adapting_BxTxE: the PAWA decoder's output, of which A is made.

        Returns:
          B×T×E.
        """
        E = self.config.emb_dim
        # Each output is a sum of E·E products: this keeps the scale of x if both inputs have it.
        init = nn.initializers.normal(1.0 / E)
        kernel_AxExO = self.param(
            "kernel", nn.with_logical_partitioning(init, ("pawa", "embed", None)), (E, E, E), jnp.float32
        )
        kernel_AxExO = kernel_AxExO.astype(self.config.dtype)

        @jax.checkpoint  # the matrices, one a token, are computed again for the gradient
        def adapt(x_BxCxE, adapting_BxCxE):
            matrix_BxCxExO = jnp.einsum("bca,aeo->bceo", adapting_BxCxE, kernel_AxExO)
            return jnp.einsum("bce,bceo->bco", x_BxCxE, matrix_BxCxExO)

        B, T = x_BxTxE.shape[:2]
        width = max((c for c in range(1, T + 1) if T % c == 0 and B * c <= PAWA_TOKENS), default=1)
        if width == T:
            return adapt(x_BxTxE, adapting_BxTxE)
        parts = [jnp.moveaxis(y.reshape(B, T // width, width, E), 1, 0) for y in (x_BxTxE, adapting_BxTxE)]
        return jnp.moveaxis(jax.lax.map(lambda part: adapt(*part), tuple(parts)), 0, 1).reshape(B, T, E)
