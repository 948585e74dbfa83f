"""The lexical head: a text's weight for each token of the text vocabulary, as in SPLADE.

A learned-sparse retriever scores a passage by the tokens that query and passage share, each with a weight
that the network gives it. The activation is SPLADE's (Formal et al. 2021, "SPLADE v2", equations 1 and 6):
the logarithm saturates, the maximum over positions pools, and most weights are exactly 0. PAG (Zeng et al.
2024) plans a search with such weights.

Letters in shapes: B batch, S length, W positions of a block, E embedding, V text vocabulary.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from retrieval_jax.data.vocabulary import UNK
from retrieval_jax.models.layers import T5Config, constrain
from retrieval_jax.models.softmax import NEG_INF, logits_of

POSITIONS = 16  # of a block: products of so many positions of a batch with all tokens are in memory at once


class LexicalHead(nn.Module):
    """The weights of the text vocabulary's tokens.

        w_t = gain_t · max over positions s of log(1 + relu(scale · (x_s · e_t) / (σ E) + bias)),

    where e_t is the input embedding of the token and σ the standard deviation that embeddings begin with. It
    has no matrix of its own. From random weights whose residual branches begin near 0 (`T5Config`'s
    `branch_init_scale`), (x_s · e_t) / (σ E) is about 1 for the token at the position, and at most about
    5/√E for all others. Scale and bias begin so that 1 becomes log(1 + e - 1) = 1, and all up to 1/2 become
    0: the weights begin as about `gain_t` for the text's own tokens and exactly 0 for all others.
    """

    config: T5Config

    @nn.compact
    def __call__(
        self, x_BxSxE: jax.Array, table_VxE: jax.Array, real_BxS: jax.Array, with_gain: bool = True
    ) -> jax.Array:
        """Computes the weights.

        Args:
          x_BxSxE: the states of the text.
          table_VxE: float32, the input embedding.
          real_BxS: bool, False for padding, which is left out.
          with_gain: whether weights are multiplied by `gain_t`, which is no parameter otherwise. A dual
            encoder's queries are and its passages are not, so that a product of both has the gain once.

        Returns:
          Float32 B×V, none below 0: a gain below 0 counts as 0. Padding, the end of a text and the unknown
          token, which stands for texts that have nothing in common, are 0.
        """
        c = self.config
        begin = 2 * (math.e - 1)

        def parameter(name: str, value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.constant(value), axes)
            return self.param(name, init, shape, jnp.float32)

        gain_V = parameter("gain", 1.0, (c.vocab_size,), ("vocab",)) if with_gain else None
        scale, bias = parameter("scale", begin, (), ()), parameter("bias", -begin / 2, (), ())
        # The maximum is taken of the products: all after them is monotonic while the scale is positive.
        largest_BxV = max_products(x_BxSxE.astype(jnp.float32), table_VxE, real_BxS)
        scaled_BxV = scale / (c.embedding_init_std * c.emb_dim) * largest_BxV + bias
        is_token_V = jnp.arange(c.vocab_size) > UNK
        weights_BxV = jnp.where(is_token_V, jnp.log1p(nn.relu(scaled_BxV)), 0.0)
        return constrain(nn.relu(gain_V) * weights_BxV if with_gain else weights_BxV, "batch", "vocab")


def flops(weights_NxV: jax.Array, counts_N: jax.Array) -> jax.Array:
    """Computes the FLOPS regulariser Σ_t (mean of |w_t|)² of the texts that count (Paria et al. 2020, eq. 4).

    Args:
      weights_NxV: float32.
      counts_N: bool, False for padding.
    """
    total_V = jnp.sum(jnp.where(counts_N[:, None], jnp.abs(weights_NxV), 0.0), axis=0)
    return jnp.sum(jnp.square(total_V / jnp.maximum(jnp.sum(counts_N), 1)))


@jax.custom_vjp
def max_products(x_BxSxE: jax.Array, table_VxE: jax.Array, real_BxS: jax.Array) -> jax.Array:
    """Computes the largest product of each token's row with any position of a text.

    B×S×V products are never in memory together, neither here nor for the gradient, which goes to the first
    position that has the largest product.

    Args:
      x_BxSxE: float32.
      table_VxE: float32.
      real_BxS: bool, the positions that count.

    Returns:
      Float32 B×V; NEG_INF for a text without a position that counts.
    """
    return _forward(x_BxSxE, table_VxE, real_BxS)[0]


def _blocks(x_BxSxE: jax.Array, real_BxS: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts texts into blocks of positions: (their states …×B×W×E, which count …×B×W, first positions …)."""
    B, S, E = x_BxSxE.shape
    W = min(POSITIONS, S)
    missing = -S % W
    x = jnp.pad(x_BxSxE, ((0, 0), (0, missing), (0, 0))).reshape(B, -1, W, E)
    real = jnp.pad(real_BxS, ((0, 0), (0, missing))).reshape(B, -1, W)
    return jnp.moveaxis(x, 1, 0), jnp.moveaxis(real, 1, 0), jnp.arange(0, S + missing, W)


def _forward(x_BxSxE, table_VxE, real_BxS):
    shape = x_BxSxE.shape[0], table_VxE.shape[0]

    def add(carry, block):
        largest_BxV, position_BxV = carry
        x_BxWxE, real_BxW, first = block
        products_BxWxV = logits_of(x_BxWxE, table_VxE.T)
        for w in range(x_BxWxE.shape[1]):  # a vectorised argmax, which XLA's own is not on CPUs
            product_BxV = jnp.where(real_BxW[:, w, None], products_BxWxV[:, w], NEG_INF)
            is_larger = product_BxV > largest_BxV
            largest_BxV = jnp.where(is_larger, product_BxV, largest_BxV)
            position_BxV = jnp.where(is_larger, first + w, position_BxV)
        return (largest_BxV, position_BxV), None

    nothing = jnp.full(shape, NEG_INF, jnp.float32), jnp.full(shape, -1, jnp.int32)
    (largest_BxV, position_BxV), _ = jax.lax.scan(add, nothing, _blocks(x_BxSxE, real_BxS))
    return largest_BxV, (x_BxSxE, table_VxE, real_BxS, position_BxV)


def _backward(kept, gradient_BxV):
    x_BxSxE, table_VxE, real_BxS, position_BxV = kept

    def add(table_gradient_VxE, block):
        x_BxWxE, _, first = block
        positions_W = first + jnp.arange(x_BxWxE.shape[1])
        is_own = position_BxV[:, None, :] == positions_W[:, None]
        own_BxWxV = jnp.where(is_own, gradient_BxV[:, None, :], 0.0)
        table_gradient_VxE += jnp.einsum("bwv,bwe->ve", own_BxWxV, x_BxWxE)
        return table_gradient_VxE, logits_of(own_BxWxV, table_VxE)

    blocks = _blocks(x_BxSxE, real_BxS)
    table_gradient_VxE, x_gradient = jax.lax.scan(add, jnp.zeros_like(table_VxE), blocks)
    x_gradient = jnp.moveaxis(x_gradient, 0, 1).reshape(x_BxSxE.shape[0], -1, x_BxSxE.shape[2])
    return x_gradient[:, : x_BxSxE.shape[1]], table_gradient_VxE, None


max_products.defvjp(_forward, _backward)
