"""The dual encoder: one T5 encoder for queries and passages; relevance is the cosine of their vectors."""

from collections.abc import Mapping

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import optax

from retrieval_jax.models.generative import Batch, Metrics
from retrieval_jax.models.layers import Dense, T5Config, TokenEmbedder
from retrieval_jax.models.objectives import in_batch_softmax
from retrieval_jax.models.t5 import Encoder


class DualEncoderNetwork(nn.Module):
    """Encoder, mean over the real tokens, projection without bias in float32, unit length (GTR).

    Parameter names are t5x_retrieval's: token_embedder, encoder, projection_layer.
    """

    config: T5Config
    vector_dim: int

    def setup(self) -> None:
        self.token_embedder = TokenEmbedder(self.config, self.config.vocab_size)
        self.encoder = Encoder(self.config)
        self.projection_layer = Dense(self.vector_dim, ("embed", "joined_kv"))

    def __call__(self, tokens_BxS: jax.Array, deterministic: bool = True) -> jax.Array:
        """Float32 unit vectors B×vector_dim of tokens (0 = padding)."""
        embedded = self.token_embedder(tokens_BxS)
        real_BxS = tokens_BxS > 0
        encoded_BxSxE = self.encoder(embedded, real_BxS[:, None, :], deterministic).astype(jnp.float32)
        real_BxSx1 = real_BxS[..., None]
        count = jnp.maximum(jnp.sum(real_BxSx1, axis=1), 1)
        vectors = self.projection_layer(jnp.sum(encoded_BxSxE * real_BxSx1, axis=1) / count)
        return vectors * jax.lax.rsqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True) + 1e-12)


@gin.configurable(denylist=["config", "optimizer_def"])
class DualEncoder:
    """T5X's model interface over a dual encoder with shared towers.

    A batch holds left_encoder_input_tokens B×S (queries), right_encoder_input_tokens B×G×P (each query's
    candidates, a positive first), passage B×G (their rows, -1 is padding) and grade B×G (> 0 positive, 0
    negative), all int32. `scale` multiplies the cosines (1 / temperature).
    """

    family = "dual encoder"
    answer = "passages"

    def __init__(
        self,
        config: T5Config,
        optimizer_def: optax.GradientTransformation | None = None,
        vector_dim: int = 768,
        scale: float = 100.0,
    ):
        self.config = config
        self.vector_dim = vector_dim
        self.scale = scale
        self.module = DualEncoderNetwork(config, vector_dim)
        self.optimizer_def = optimizer_def

    @property
    def FEATURE_CONVERTER_CLS(self):
        from retrieval_jax.data.feature_converters import DualEncoderFeatureConverter  # TensorFlow

        return DualEncoderFeatureConverter

    def get_initial_variables(
        self, rng: jax.Array, input_shapes: Mapping[str, tuple], input_types: object = None
    ) -> dict:
        """Random parameters, boxed with their logical axis names."""
        return self.module.init(rng, jnp.ones(input_shapes["left_encoder_input_tokens"], jnp.int32))

    def encode_queries(
        self, params: dict, tokens_BxS: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """Unit vectors B×vector_dim, float32, of tokens (0 = padding)."""
        return self._encode(params, tokens_BxS, dropout_rng)

    def encode_passages(
        self, params: dict, tokens_BxS: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """The same of passages."""
        return self._encode(params, tokens_BxS, dropout_rng)

    def _encode(self, params: dict, tokens_BxS: jax.Array, dropout_rng: jax.Array | None) -> jax.Array:
        return self.module.apply(
            {"params": params},
            tokens_BxS,
            deterministic=dropout_rng is None,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        )

    def loss_fn(self, params: dict, batch: Batch, dropout_rng: jax.Array | None) -> tuple[jax.Array, Metrics]:
        """Mean over the rows of both directions' in-batch softmax loss (nats)."""
        keys = (None, None) if dropout_rng is None else jax.random.split(dropout_rng)
        queries = self.encode_queries(params, batch["left_encoder_input_tokens"], keys[0])
        candidates_BxGxP = batch["right_encoder_input_tokens"]
        passages = self.encode_passages(
            params, candidates_BxGxP.reshape(-1, candidates_BxGxP.shape[-1]), keys[1]
        )
        nll, right = in_batch_softmax(queries, passages, batch["passage"], batch["grade"], self.scale)
        rows = jnp.float32(len(queries))
        return nll / rows, {"loss": (nll, rows), "accuracy": (right, rows)}

    def eval_fn(self, params: dict, batch: Batch) -> tuple[jax.Array, Metrics]:
        """`loss_fn` without dropout."""
        return self.loss_fn(params, batch, None)

    def predict_batch_with_aux(
        self, params: dict, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[jax.Array, Metrics]:
        """(The queries' vectors B×vector_dim, {})."""
        return self.encode_queries(params, batch["left_encoder_input_tokens"]), {}

    def score_batch(self, params: dict, batch: Batch) -> jax.Array:
        """Cosine of each query with its first candidate, B."""
        queries = self.encode_queries(params, batch["left_encoder_input_tokens"])
        passages = self.encode_passages(params, batch["right_encoder_input_tokens"][:, 0])
        return jnp.sum(queries * passages, axis=-1)
