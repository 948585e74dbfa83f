"""The query generator (doc2query): a T5 that reads a passage and writes queries that the passage answers."""

import gin
import jax

from retrieval_jax.decoding.sampling import sample_top_k
from retrieval_jax.models.encoder_decoder import EncoderDecoder
from retrieval_jax.models.retriever import Batch, Metrics, register_retriever


@register_retriever
@gin.configurable(denylist=["config", "optimizer_def"])
class QueryGenerator(EncoderDecoder):
    """A T5 that reads a passage and writes a query, as docT5query (Nogueira and Lin 2019)."""

    family = "query generator"

    def sample(
        self,
        params: dict,
        passages_BxS: jax.Array,
        keys_B: jax.Array,
        count: int,
        length: int,
        temperature: float = 1.0,
        top_k: int = 10,
    ) -> tuple[jax.Array, jax.Array]:
        """Samples queries; see `sample_top_k`. A passage is encoded once for all its queries.

        Args:
          params: the network's parameters.
          passages_BxS: int32 tokens, 0 is padding.
          keys_B: typed PRNG keys, one a passage.
          count: how many queries a passage.
          length: how many tokens a query has at most.
          temperature: divides the logits.
          top_k: among how many tokens is drawn.

        Returns:
          (tokens B×count×length int32, padded with 0; their log-probabilities B×count, float32).
        """
        variables = self.decode_variables(params)
        cross_kv, cache = self.decode_module.apply(variables, passages_BxS, count, length, method="prefill")

        def step(tokens, position, cache):
            x_BxNxE, cache = self.decode_module.apply(
                variables, tokens, position, cache, cross_kv, passages_BxS, method="decode_step"
            )
            return self.decode_module.apply(variables, x_BxNxE, method="logits"), cache

        return sample_top_k(step, cache, keys_B, count, length, temperature, top_k)

    def predict_batch_with_aux(
        self, params: dict, batch: Batch, rng: jax.Array, *, count: int, length: int
    ) -> tuple[jax.Array, Metrics]:
        """Samples `count` queries a passage; T5X calls it so.

        Args:
          params: the network's parameters.
          batch: `encoder_input_tokens` B×S, the passages.
          rng: a key.
          count: how many queries a passage.
          length: how many tokens a query has at most.

        Returns:
          (tokens B×count×length int32, {"scores": their log-probabilities B×count}).
        """
        passages_BxS = batch["encoder_input_tokens"]
        keys_B = jax.random.split(rng, len(passages_BxS))
        tokens, scores = self.sample(params, passages_BxS, keys_B, count, length)
        return tokens, {"scores": scores}
