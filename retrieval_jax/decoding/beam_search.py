"""Constrained beam search over docids: exact log-probabilities, and only real docids can come out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from retrieval_jax.decoding.trie import Trie

Step = Callable[[jax.Array, int, Any], tuple[jax.Array, Any]]
"""(newest tokens B×K, their position, past) -> (next-token logits B×K×V, new past).

`past` is any pytree of arrays B×K×…, [] at position 0. At position 0 the tokens are 0 (start) and K is 1.
"""


def constrained_beam_search(
    step: Step, trie: Trie, batch_size: int, beams: int
) -> tuple[jax.Array, jax.Array]:
    """Finds the docids of highest log-probability under the model's full softmax.

    A beam's score is the sum of its tokens' log-probabilities: no length penalty, and no renormalisation over
    the allowed tokens. With as many beams as docids the result is that of scoring every docid.

    Args:
      step: the decoder, one token a beam.
      trie: the docids; its arrays may be traced.
      batch_size: B queries.
      beams: K.

    Returns:
      (docid rows B×K, scores B×K), best first. Where there are fewer docids than beams the row is -1 and the
      score -inf.
    """
    length = trie.tokens_NxL.shape[1]
    root = (batch_size, 1)
    tokens = jnp.zeros(root, jnp.int32)  # T5 starts its targets with the padding token
    scores = jnp.zeros(root, jnp.float32)
    # A beam stands at a trie node: `degree` children from edge `child` on, or (0) at docid row `child`.
    child, degree = jnp.zeros(root, jnp.int32), jnp.broadcast_to(trie.root_degree, root)
    past: Any = []
    for position in range(length):
        logits_BxKxV, past = step(tokens, position, past)
        fanout = trie.fanouts[position]
        nth = jnp.arange(fanout)
        # B×K×F candidates: a node's children, or the single docid's next token (its first candidate).
        single = (degree == 0)[..., None]
        edge = jnp.where(single, 0, child[..., None] + nth)
        rest = trie.tokens_NxL[jnp.where(degree == 0, child, 0), position][..., None]
        next_token = jnp.where(single, rest, trie.edge_token_E[edge])
        next_child = jnp.where(single, child[..., None], trie.edge_child_E[edge])
        next_degree = jnp.where(single, 0, trie.edge_degree_E[edge])
        exists = nth < jnp.maximum(degree, 1)[..., None]
        finished = single & (rest == 0)

        log_z_BxKx1 = jax.nn.logsumexp(logits_BxKxV, axis=-1, keepdims=True)
        log_prob = jnp.take_along_axis(logits_BxKxV, next_token, axis=-1) - log_z_BxKx1
        log_prob = jnp.where(finished, 0.0, log_prob)
        total = jnp.where(exists, scores[..., None] + log_prob, -jnp.inf)

        # Never more beams than candidates or than asked for.
        kept = min(beams, total.shape[1] * fanout)
        scores, best = jax.lax.top_k(total.reshape(batch_size, -1), kept)
        parent = best // fanout
        tokens, child, degree = (
            jnp.take_along_axis(x.reshape(batch_size, -1), best, axis=1)
            for x in (next_token, next_child, next_degree)
        )
        past = jax.tree.map(lambda x: jax.vmap(lambda a, i: a[i])(x, parent), past)  # noqa: B023
    found = scores > -jnp.inf
    pad = ((0, 0), (0, beams - scores.shape[1]))
    rows = jnp.pad(jnp.where(found, child, -1), pad, constant_values=-1)
    return rows, jnp.pad(scores, pad, constant_values=-jnp.inf)
