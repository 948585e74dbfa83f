"""The generative retriever: a T5 that reads a query and writes a docid."""

import gin
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from retrieval_jax.decoding.atomic import top_docids
from retrieval_jax.decoding.beam_search import constrained_beam_search
from retrieval_jax.decoding.trie import Trie
from retrieval_jax.models.encoder_decoder import EncoderDecoder
from retrieval_jax.models.layers import KeysValues
from retrieval_jax.models.retriever import Batch, register_retriever
from retrieval_jax.models.softmax import exact_products


@register_retriever
@gin.configurable(denylist=["config", "optimizer_def"])
class GenerativeRetriever(EncoderDecoder):
    """A T5 that reads a query and writes a docid.

    Its softmax is over the text vocabulary, or over the tokens of docids (atomic ones have one token each).
    """

    family = "generative"
    writes_docids = True

    def predict_batch_with_aux(
        self,
        params: dict,
        batch: Batch,
        rng: jax.Array | None = None,
        *,
        trie: Trie,
        beams: int,
        mesh: Mesh | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Searches for the docids of highest log-probability; see `constrained_beam_search`.

        Args:
          params: the network's parameters.
          batch: `encoder_input_tokens` B×S, int32, padded with 0.
          rng: unused.
          trie: the docids.
          beams: K, how many docids to find.
          mesh: the mesh over whose axis `data` the queries lie; None for one device.

        Returns:
          (rows of the docid table B×K int32, best first; {"scores": their log-probabilities B×K,
          "pruned_upper_bound": B, above which no docid that is left out scores}).
        """
        variables, inputs_BxS = self.decode_variables(params), batch["encoder_input_tokens"]
        cross_kv, kv_cache = self.decode_module.apply(variables, inputs_BxS, 1, trie.length, method="prefill")

        def step(tokens, position, kv_cache, candidates_I):
            x_BxKxE, kv_cache = self.decode_module.apply(
                variables, tokens, position, kv_cache, cross_kv, inputs_BxS, method="decode_step"
            )
            with exact_products():
                logits, log_z = self.decode_module.apply(
                    variables, x_BxKxE, candidates_I, method="candidate_logits"
                )
            return logits, log_z, kv_cache

        rows, scores, bound = constrained_beam_search(step, kv_cache, trie, beams, mesh)
        return rows, {"scores": scores, "pruned_upper_bound": bound}

    def rank_atomic(
        self,
        params: dict,
        batch: Batch,
        valid_mask_V: jax.Array,
        k: int,
        mesh: Mesh | None = None,
        recall: float | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Searches atomic docids: one decoding step, then the top k of the docid softmax; see `top_docids`.

        Args:
          params: the network's parameters.
          batch: `encoder_input_tokens` B×S, int32, padded with 0.
          valid_mask_V: see `top_docids`.
          k: see `top_docids`.
          mesh: see `top_docids`.
          recall: see `top_docids`.

        Returns:
          (docid tokens B×k int32, best first; {"scores": their log-probabilities B×k}).
        """
        start = jnp.zeros((batch["encoder_input_tokens"].shape[0], 1), jnp.int32)
        logits_Bx1xV = self.logits(params, {**batch, "decoder_input_tokens": start})
        tokens, scores = top_docids(logits_Bx1xV[:, 0], valid_mask_V, k, mesh, recall)
        return tokens, {"scores": scores}

    def first_states(self, params: dict, inputs_BxS: jax.Array) -> jax.Array:
        """Computes what the softmax reads for the first token of a docid: float32 B×E.

        Args:
          params: the network's parameters; those of the softmax are not needed.
          inputs_BxS: int32 queries, padded with 0.
        """
        start = jnp.zeros((inputs_BxS.shape[0], 1), jnp.int32)
        batch = {"encoder_input_tokens": inputs_BxS, "decoder_input_tokens": start}
        return self.hidden(params, batch)[:, 0].astype(jnp.float32)

    def encode_queries(self, params: dict, batch: Batch) -> list[KeysValues]:
        """Computes what `docid_log_probs` needs once for a batch of queries, whatever the docids.

        Args:
          params: the network's parameters.
          batch: `encoder_input_tokens` B×S, int32, padded with 0.

        Returns:
          Each decoder layer's cross-attention keys and values B×S×H×D.
        """
        variables = self.decode_variables(params)
        return self.decode_module.apply(variables, batch["encoder_input_tokens"], method="cross_keys_values")

    def docid_log_probs(
        self, params: dict, batch: Batch, cross_kv: list[KeysValues], docids_BxKxL: jax.Array
    ) -> jax.Array:
        """Computes the log-probabilities of the tokens of docids that are given, as the search does.

        A query's docids are read like beams of a search whose tokens are known.

        Args:
          params: the network's parameters.
          batch: `encoder_input_tokens` B×S, int32, padded with 0.
          cross_kv: of these queries; see `encode_queries`.
          docids_BxKxL: int32, docids of each query, padded with 0.

        Returns:
          Float32 B×K×L; 0 after a docid's end. A docid's score is the sum.
        """
        variables, inputs_BxS = self.decode_variables(params), batch["encoder_input_tokens"]
        B, K, L = docids_BxKxL.shape
        kv_cache = self.decode_module.apply(variables, cross_kv, K, L, method="empty_cache")

        def read(carry, position):
            newest_BxK, kv_cache = carry
            x_BxKxE, kv_cache = self.decode_module.apply(
                variables, newest_BxK, position, kv_cache, cross_kv, inputs_BxS, method="decode_step"
            )
            token_BxK = jax.lax.dynamic_index_in_dim(docids_BxKxL, position, axis=2, keepdims=False)
            with exact_products():
                log_prob_BxK = self.decode_module.apply(
                    variables, x_BxKxE, token_BxK, method="token_log_probs"
                )
            return (token_BxK, kv_cache), jnp.where(token_BxK > 0, log_prob_BxK, 0.0)

        start = (jnp.zeros((B, K), jnp.int32), kv_cache)
        _, log_probs_LxBxK = jax.lax.scan(read, start, jnp.arange(L))
        return jnp.moveaxis(log_probs_LxBxK, 0, -1)

    def atomic_log_probs(self, params: dict, batch: Batch) -> jax.Array:
        """Computes the log-probabilities of all atomic docids; see `rank_atomic`.

        Args:
          params: the network's parameters.
          batch: `encoder_input_tokens` B×S, int32, padded with 0.

        Returns:
          Float32 B×V.
        """
        start = jnp.zeros((batch["encoder_input_tokens"].shape[0], 1), jnp.int32)
        logits_BxV = self.logits(params, {**batch, "decoder_input_tokens": start})[:, 0]
        return logits_BxV - jax.nn.logsumexp(logits_BxV, axis=-1, keepdims=True)
