"""The network of a dual encoder: a text's tokens to its vector."""

from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import PAD
from retrieval_jax.models.layers import Dense, T5Config, TokenEmbedder
from retrieval_jax.models.lexical import LexicalHead
from retrieval_jax.models.softmax import exact_products
from retrieval_jax.models.stacks import DecoderStack, Encoder

Vectors = TypeVar("Vectors", jax.Array, np.ndarray)
TOWERS = ("left_tower", "right_tower")  # of queries and of passages, if they are not shared
POOLINGS = ("mean", "decoder")  # of vectors; LexicalEncoder's is LEXICAL
LEXICAL = "lexical"
GTR_DIM = 768  # the size of GTR's vectors, whatever the size of its T5


def split_tower(name: str) -> tuple[str, str]:
    """Splits the name of a parameter into its tower and the rest.

    Args:
      name: of a parameter, with slashes.

    Returns:
      ("left_tower/", the rest) for a parameter of that tower; ("", the name) for one that is in no tower.
    """
    tower, _, rest = name.partition("/")
    return (f"{tower}/", rest) if tower in TOWERS else ("", name)


class DualEncoderNetwork(nn.Module):
    """A T5 that gives a text one vector, of unit length with `normalize`.

    With `pooling` "mean" that is the mean of the encoder's states, multiplied by a projection without bias
    (GTR; Ni et al. 2021, section 3.1). With "decoder" it is the decoder's first state: what a softmax would
    read to write the first token (RIPOR; Zeng et al. 2024). A generative retriever that begins with these
    weights then reads queries as this network does. There is a projection only where `vector_dim` is not the
    state's own size. With LEXICAL it is the lexical head's weights of the text vocabulary's tokens.

    Parameter names are T5X's: token_embedder, encoder, decoder (without a softmax), projection_layer; and
    lexical_head.
    """

    config: T5Config
    vector_dim: int
    normalize: bool = True
    pooling: str = "mean"

    @classmethod
    def of(
        cls, config: T5Config, vector_dim: int | None, normalize: bool, pooling: str
    ) -> "DualEncoderNetwork":
        """Makes the network that settings of `DualEncoder` describe.

        Args:
          config: the sizes of the network.
          vector_dim: see `DualEncoder`; None for its default.
          normalize: see `DualEncoder`.
          pooling: see `DualEncoder`.

        Raises:
          UserError: there is no such pooling, or the network has no decoder that it needs.
        """
        if pooling not in POOLINGS:
            raise UserError(f"DualEncoder.pooling: no {pooling!r}: choose {' or '.join(map(repr, POOLINGS))}")
        if pooling == "decoder" and not config.num_decoder_layers:
            raise UserError(
                "DualEncoder.pooling: 'decoder' needs a decoder: set T5Config.num_decoder_layers, or 'mean'"
            )
        own = config.emb_dim if pooling == "decoder" else GTR_DIM
        return cls(config, vector_dim or own, normalize, pooling)

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        self.token_embedder = TokenEmbedder(c, c.vocab_size)
        self.encoder = Encoder(c)
        if self.pooling == "decoder":
            self.decoder = DecoderStack(c, c.num_decoder_layers)
        if self.pooling == LEXICAL:
            self.lexical_head = LexicalHead(c)
        self.projects = self.pooling == "mean" or (self.pooling == "decoder" and self.vector_dim != c.emb_dim)
        if self.projects:
            self.projection_layer = Dense(self.vector_dim, ("embed", "joined_kv"))

    def __call__(self, tokens_BxS: jax.Array, deterministic: bool = True) -> jax.Array:
        """Encodes texts to vectors.

        Args:
          tokens_BxS: int32, 0 is padding.
          deterministic: False for dropout.

        Returns:
          Float32 B×vector_dim; of unit length with `normalize`.
        """
        if self.pooling == LEXICAL:
            return self.lexical(tokens_BxS, deterministic)
        real_BxS = tokens_BxS != PAD
        encoded_BxSxE = self._encode(tokens_BxS, deterministic)
        if self.pooling == "decoder":
            vectors = self._first_state(encoded_BxSxE, real_BxS, deterministic)
        else:
            vectors = _mean(encoded_BxSxE, real_BxS)
        if self.projects:
            with exact_products():  # one product a text, whereas the encoder has some a token: cheap
                vectors = self.projection_layer(vectors)
        return unit_length(vectors) if self.normalize else vectors

    def _encode(self, tokens_BxS: jax.Array, deterministic: bool) -> jax.Array:
        mask_Bx1xS = (tokens_BxS != PAD)[:, None, :]
        return self.encoder(self.token_embedder(tokens_BxS), mask_Bx1xS, deterministic)

    def lexical(self, tokens_BxS: jax.Array, deterministic: bool = True, with_gain: bool = True) -> jax.Array:
        """Computes a weight for each token of the text vocabulary, where `pooling` is LEXICAL.

        Args:
          tokens_BxS: int32, 0 is padding.
          deterministic: False for dropout.
          with_gain: see `LexicalHead`.

        Returns:
          Float32 B×vocab_size.
        """
        encoded_BxSxE = self._encode(tokens_BxS, deterministic)
        table_VxE = nn.unbox(self.token_embedder.variables["params"]["embedding"])
        return self.lexical_head(encoded_BxSxE, table_VxE, tokens_BxS != PAD, with_gain)

    def _first_state(self, encoded_BxSxE: jax.Array, real_BxS: jax.Array, deterministic: bool) -> jax.Array:
        """Computes the decoder's state B×E, float32, after T5's start token, which is padding's."""
        start_Bx1xE = self.token_embedder(jnp.full((real_BxS.shape[0], 1), PAD))
        itself = jnp.ones((1, 1, 1), bool)
        states_Bx1xE = self.decoder(start_Bx1xE, encoded_BxSxE, itself, real_BxS[:, None, :], deterministic)
        return states_Bx1xE[:, 0].astype(jnp.float32)


def _mean(encoded_BxSxE: jax.Array, real_BxS: jax.Array) -> jax.Array:
    """Computes the means B×E, float32, of the states of each text's own tokens."""
    real_BxSx1 = real_BxS[..., None]
    count = jnp.maximum(jnp.sum(real_BxSx1, axis=1), 1)
    return jnp.sum(encoded_BxSxE.astype(jnp.float32) * real_BxSx1, axis=1) / count


def unit_length(vectors: Vectors) -> Vectors:
    """Divides float32 vectors …×E, of JAX or of NumPy, by their lengths; a vector of zeros stays one."""
    xp = np if isinstance(vectors, np.ndarray) else jnp
    return vectors / xp.sqrt(xp.sum(xp.square(vectors), axis=-1, keepdims=True) + 1e-12)


def shorten(vectors: Vectors, dimensions: int, normalize: bool) -> Vectors:
    """Gives the first dimensions of vectors.

    Args:
      vectors: float32 …×E, of JAX or of NumPy.
      dimensions: how many; vectors that have no more stay as they are.
      normalize: whether they get unit length again, as vectors of a network with `normalize` have.

    Returns:
      Float32 …×dimensions.
    """
    if dimensions >= vectors.shape[-1]:
        return vectors
    first = vectors[..., :dimensions]
    return unit_length(first) if normalize else first
