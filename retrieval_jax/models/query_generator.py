"""The query generator (doc2query): a T5 that reads a passage and writes queries that it answers."""

import gin
import jax

from retrieval_jax.decoding.sampling import sample_top_k
from retrieval_jax.models.encoder_decoder import EncoderDecoder
from retrieval_jax.models.retriever import Batch, Metrics, register_retriever


@register_retriever
@gin.configurable(denylist=["config", "optimizer_def"])
class QueryGenerator(EncoderDecoder):
    """Passage -> query, as docT5query (Nogueira and Lin 2019)."""

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
        """(tokens B×count×length int32, their log-probabilities B×count) of sampled queries.

        See `sample_top_k`. A passage is encoded once for all its queries.
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
        """`count` sampled queries a passage: (tokens B×count×length, {"scores": log-probabilities})."""
        passages_BxS = batch["encoder_input_tokens"]
        keys_B = jax.random.split(rng, len(passages_BxS))
        tokens, scores = self.sample(params, passages_BxS, keys_B, count, length)
        return tokens, {"scores": scores}
