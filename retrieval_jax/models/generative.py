"""The generative retriever: a T5 that reads a query and writes a docid."""

import gin
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from retrieval_jax.decoding.atomic import top_docids
from retrieval_jax.decoding.beam_search import constrained_beam_search
from retrieval_jax.decoding.trie import Trie
from retrieval_jax.models.encoder_decoder import Batch, EncoderDecoder, Metrics
from retrieval_jax.models.softmax import exact_products


@gin.configurable(denylist=["config", "optimizer_def"])
class GenerativeRetriever(EncoderDecoder):
    """Query -> docid. Its softmax is the text vocabulary or the docids (atomic)."""

    family = "generative"
    answer = "docids"

    def predict_batch_with_aux(
        self,
        params: dict,
        batch: Batch,
        rng: jax.Array | None = None,
        *,
        trie: Trie,
        beams: int,
        mesh: Mesh | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """Constrained beam search: (docid rows of the table B×beams, {"scores": B×beams, "bound": B}).

        Best first, by log-probability, which no docid left out has above the bound; see
        `constrained_beam_search`, also for `mesh`. Cross-attention's keys and values are made once a query.
        """
        variables, inputs_BxS = self.decode_variables(params), batch["encoder_input_tokens"]
        cross_kv, cache = self.decode_module.apply(variables, inputs_BxS, 1, trie.length, method="prefill")

        def step(tokens, position, cache, tokens_S):
            x_BxKxE, cache = self.decode_module.apply(
                variables, tokens, position, cache, cross_kv, inputs_BxS, method="decode_step"
            )
            with exact_products():
                return *self.decode_module.apply(
                    variables, x_BxKxE, tokens_S, method="candidate_logits"
                ), cache

        rows, scores, bound = constrained_beam_search(step, cache, trie, beams, mesh)
        return rows, {"scores": scores, "bound": bound}

    def rank_atomic(
        self,
        params: dict,
        batch: Batch,
        real_V: jax.Array,
        k: int,
        mesh: Mesh | None = None,
        recall: float | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """The same for atomic docids: one step, then the best k of the docid softmax; see `top_docids`.

        Gives (docid tokens B×k, {"scores": log-probabilities}).
        """
        start = jnp.zeros((batch["encoder_input_tokens"].shape[0], 1), jnp.int32)
        logits_Bx1xV = self.logits(params, {**batch, "decoder_input_tokens": start})
        tokens, scores = top_docids(logits_Bx1xV[:, 0], real_V, k, mesh, recall)
        return tokens, {"scores": scores}
