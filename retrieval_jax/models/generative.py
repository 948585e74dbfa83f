"""The generative retriever: a T5 that reads a query and writes a docid."""

from typing import Annotated

import gin
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import Names
from retrieval_jax.decoding.atomic import top_docids
from retrieval_jax.decoding.beam_search import constrained_beam_search
from retrieval_jax.decoding.bonuses import Planning, keep, lexical_scores, rerank
from retrieval_jax.decoding.planning import plan, score_all
from retrieval_jax.decoding.trie import Trie
from retrieval_jax.models.encoder_decoder import EncoderDecoder
from retrieval_jax.models.layers import KeysValues, T5Config
from retrieval_jax.models.objectives import Objective, cross_entropy
from retrieval_jax.models.retriever import Batch, register_retriever
from retrieval_jax.models.softmax import exact_products

SCORE_KINDS = ("log_prob", "logits")
Score = Annotated[str, Names("a score of docids", SCORE_KINDS)]


@register_retriever
@gin.configurable(denylist=["config", "optimizer_def"])
class GenerativeRetriever(EncoderDecoder):
    """A T5 that reads a query and writes a docid.

    Its softmax is over the text vocabulary, or over the tokens of docids (atomic ones have one token each).

    Args:
      config: see EncoderDecoder.
      optimizer_def: see EncoderDecoder.
      objective: see EncoderDecoder.
      max_logits_per_block: see EncoderDecoder.
      score: what a docid's score is the sum of, in every search: its tokens' log-probabilities ("log_prob"),
        or their logits ("logits"), for a model that was trained to rank by these (RIPOR). Sums of logits need
        no log-sum-exp of the softmax, and have no upper bound: see `constrained_beam_search`.
    """

    family = "generative"
    writes_docids = True

    def __init__(
        self,
        config: T5Config,
        optimizer_def: optax.GradientTransformation | None = None,
        objective: Objective = cross_entropy,
        max_logits_per_block: int | None = None,
        score: Score = "log_prob",
    ):
        super().__init__(config, optimizer_def, objective, max_logits_per_block)
        if score not in SCORE_KINDS:
            raise UserError(f"GenerativeRetriever.score: no score {score!r}: {' or '.join(SCORE_KINDS)}")
        self.score = score

    @property
    def settings(self) -> dict:
        """See `Retriever.settings`: how docids are scored, where it is not by log-probabilities."""
        return {} if self.sums_log_probs else {"score": self.score}

    @property
    def sums_log_probs(self) -> bool:
        """Whether scores are log-probabilities, for which the log-sum-exp of all logits is computed."""
        return self.score == "log_prob"

    def token_scores(self, logits: jax.Array) -> jax.Array:
        """Computes what tokens add to a docid's score, float32 …×V: log-probabilities, or the logits."""
        return super().token_scores(logits) if self.sums_log_probs else logits

    def predict_batch_with_aux(
        self,
        params: dict,
        batch: Batch,
        rng: jax.Array | None = None,
        *,
        trie: Trie,
        beams: int,
        mesh: Mesh | None = None,
        planning: Planning | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Searches for the docids of highest score; see `constrained_beam_search`.

        Args:
          params: the network's parameters.
          batch: `encoder_input_tokens` B×S, int32, padded with 0.
          rng: unused.
          trie: the docids.
          beams: K, how many docids to find.
          mesh: the mesh over whose axis `data` the queries lie; None for one device.
          planning: what a search that plans ahead takes, for a network with a lexical head (see
            `decoding.planning`); None without a plan.

        Returns:
          (rows of the docid table B×K int32, best first; {"scores": B×K, as `score` says,
          "pruned_upper_bound": B, above which no docid that is left out scores}). With `planning`, scores are
          sequential_weight · (that sum) + (lexical score), and there are "plan_rows" and "plan_scores" B×n,
          the plan, and "plan_steps" B×D, the tokens of each of its docids that beams have written.
        """
        variables, inputs_BxS = self.decode_variables(params), batch["encoder_input_tokens"]
        encoded_BxSxE = self.decode_module.apply(variables, inputs_BxS, method="encode")
        cross_kv, kv_cache = self.decode_module.apply(
            variables, inputs_BxS, 1, trie.length, encoded_BxSxE, method="prefill"
        )

        def step(tokens, position, kv_cache, candidates_I):
            x_BxKxE, kv_cache = self.decode_module.apply(
                variables, tokens, position, kv_cache, cross_kv, inputs_BxS, method="decode_step"
            )
            with exact_products():
                logits, log_z = self.decode_module.apply(
                    variables, x_BxKxE, candidates_I, self.sums_log_probs, method="candidate_logits"
                )
            return logits, log_z, kv_cache

        if planning is None:
            rows, scores, bound, _ = constrained_beam_search(step, kv_cache, trie, beams, mesh)
            return rows, {"scores": scores, "pruned_upper_bound": bound}
        with exact_products():
            weights_BxV = self.decode_module.apply(
                variables, inputs_BxS, True, encoded_BxSxE, method="lexical"
            )
        planned = plan(weights_BxV, planning.sets, planning.size, mesh)
        kept = keep(planned, planning.docids, planning.sequential_weight)
        rows, scores, bound, kept = constrained_beam_search(step, kv_cache, trie, beams, mesh, kept)
        lexical = (
            kept.bonuses(beams)
            if planning.of_prefixes
            else lexical_scores(weights_BxV, planning.sets, planning.docids, rows, mesh)
        )
        rows, scores = rerank(rows, scores, lexical, planning.sequential_weight)
        how = {"plan_rows": planned.row_Bxn, "plan_scores": planned.score_Bxn, "plan_steps": kept.steps_BxD}
        return rows, {"scores": scores, "pruned_upper_bound": bound} | how

    def rank_atomic(
        self,
        params: dict,
        batch: Batch,
        valid_mask_V: jax.Array,
        k: int,
        mesh: Mesh | None = None,
        recall: float | None = None,
        planning: Planning | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Searches atomic docids: one decoding step, then the top k of the docid softmax; see `top_docids`.

        Args:
          params: the network's parameters.
          batch: `encoder_input_tokens` B×S, int32, padded with 0.
          valid_mask_V: see `top_docids`.
          k: see `top_docids`.
          mesh: see `top_docids`.
          recall: see `top_docids`.
          planning: with lexical scores, whose sets are those of the docid tokens; None without. There is
            nothing to plan: every docid has the sum as its score.

        Returns:
          (docid tokens B×k int32, best first; {"scores": B×k, as `score` says; with `planning`,
          sequential_weight · (that) + (lexical score)}).
        """
        if planning is not None:
            scores_BxV = planning.sequential_weight * self.atomic_scores(params, batch)
            scores_BxV += score_all(self.lexical_weights(params, batch), planning.sets, mesh)
            tokens, scores = top_docids(scores_BxV, valid_mask_V, k, mesh, recall, sums_log_probs=False)
            return tokens, {"scores": scores}
        logits_BxV = self._first_logits(params, batch)
        tokens, scores = top_docids(logits_BxV, valid_mask_V, k, mesh, recall, self.sums_log_probs)
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

    def lexical_weights(self, params: dict, batch: Batch) -> jax.Array:
        """Computes the weights of tokens that a network with `T5Config.lexical_head` gives queries.

        Args:
          params: the network's parameters.
          batch: `encoder_input_tokens` B×S, int32, padded with 0.

        Returns:
          Float32 B×vocab_size; see `LexicalHead`.
        """
        with exact_products():
            return self.module.apply({"params": params}, batch["encoder_input_tokens"], method="lexical")

    def encode_queries(self, params: dict, batch: Batch) -> list[KeysValues]:
        """Computes what `docid_scores` needs once for a batch of queries, whatever the docids.

        Args:
          params: the network's parameters.
          batch: `encoder_input_tokens` B×S, int32, padded with 0.

        Returns:
          Each decoder layer's cross-attention keys and values B×S×H×D.
        """
        variables = self.decode_variables(params)
        return self.decode_module.apply(variables, batch["encoder_input_tokens"], method="cross_keys_values")

    def docid_scores(
        self, params: dict, batch: Batch, cross_kv: list[KeysValues], docids_BxKxL: jax.Array
    ) -> jax.Array:
        """Computes the scores of the tokens of docids that are given, as the search does.

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
                score_BxK = self.decode_module.apply(
                    variables, x_BxKxE, token_BxK, self.sums_log_probs, method="token_scores"
                )
            return (token_BxK, kv_cache), jnp.where(token_BxK > 0, score_BxK, 0.0)

        start = (jnp.zeros((B, K), jnp.int32), kv_cache)
        _, scores_LxBxK = jax.lax.scan(read, start, jnp.arange(L))
        return jnp.moveaxis(scores_LxBxK, 0, -1)

    def atomic_scores(self, params: dict, batch: Batch) -> jax.Array:
        """Computes the scores of all atomic docids; see `rank_atomic`.

        Args:
          params: the network's parameters.
          batch: `encoder_input_tokens` B×S, int32, padded with 0.

        Returns:
          Float32 B×V.
        """
        return self.token_scores(self._first_logits(params, batch))

    def _first_logits(self, params: dict, batch: Batch) -> jax.Array:
        """Computes the logits of the first token of a docid, float32 B×V."""
        start = jnp.zeros((batch["encoder_input_tokens"].shape[0], 1), jnp.int32)
        return self.logits(params, {**batch, "decoder_input_tokens": start})[:, 0]
