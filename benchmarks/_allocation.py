"""How an objective's gradient falls on a query's positives: by autodiff, and by the paper's formulas.

Wang et al. 2026, "Training Dense Retrievers with Multiple Positive Passages", section 3. Letters in shapes: B
queries, G candidates of a query.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import numpy as np
from scipy.special import expit, logsumexp

from retrieval_jax.models import contrastive
from retrieval_jax.models.dual_encoder import DualEncoder

OBJECTIVES = {
    "InfoNCE": contrastive.info_nce,
    "JointLH": contrastive.joint_lh,
    "SumMargLH": contrastive.sum_marg_lh,
    "LSEPair": contrastive.lse_pair,
    "Rand1LH": contrastive.rand1_lh,
}


def closed_form(
    name: str, scores_BxG: np.ndarray, positive_BxG: np.ndarray, negatives_B: np.ndarray
) -> np.ndarray:
    """Computes the gradient of an objective with respect to the scores of a query's positives, in float64.

    Args:
      name: a key of OBJECTIVES. Rand1LH's is the expectation over what it draws.
      scores_BxG: the scores of each query's candidates.
      positive_BxG: which of them are positives; each query has one or more.
      negatives_B: LSE_N.

    Returns:
      float64 B×G, 0 for candidates that are no positives.
    """
    s_BxG = np.where(positive_BxG, np.asarray(scores_BxG, np.float64), -np.inf)
    n_Bx1 = np.asarray(negatives_B, np.float64)[:, None]
    m_Bx1 = positive_BxG.sum(1, keepdims=True)
    all_Bx1 = logsumexp(s_BxG, axis=1, keepdims=True)  # LSE_P(s)
    inverse_Bx1 = logsumexp(np.where(positive_BxG, -s_BxG, -np.inf), axis=1, keepdims=True)  # LSE_P(-s)
    q_BxG = expit(n_Bx1 - s_BxG)
    match name:
        case "InfoNCE":
            first_BxG = np.arange(s_BxG.shape[1]) == positive_BxG.argmax(1)[:, None]
            gradient_BxG = -q_BxG * first_BxG
        case "JointLH":
            gradient_BxG = np.exp(s_BxG - np.logaddexp(all_Bx1, n_Bx1)) - 1 / m_Bx1  # p_i - 1/m
        case "SumMargLH":
            w_BxG = np.exp(s_BxG - all_Bx1)
            gradient_BxG = -w_BxG * expit(n_Bx1 - all_Bx1)  # -w_i (1 - P⁺)
        case "LSEPair":
            v_BxG = np.exp(np.where(positive_BxG, -s_BxG, -np.inf) - inverse_Bx1)
            gradient_BxG = -expit(n_Bx1 + inverse_Bx1) * v_BxG  # -σ v_i
        case "Rand1LH":
            gradient_BxG = -q_BxG / m_Bx1
        case _:
            raise ValueError(f"no objective {name!r}")
    return np.where(positive_BxG, gradient_BxG, 0.0)


def by_autodiff(
    name: str, scores_BxG: np.ndarray, positive_BxG: np.ndarray, negatives_B: np.ndarray
) -> np.ndarray:
    """Computes the same by differentiating the objective that is trained with, LSE_N held fixed."""

    def total(scores_BxG: jax.Array) -> jax.Array:
        return OBJECTIVES[name](scores_BxG, positive_BxG, negatives_B, None).sum()

    return np.where(positive_BxG, jax.grad(total)(scores_BxG), 0.0)


def scores_of(model: DualEncoder) -> Callable[[dict, dict], tuple[jax.Array, jax.Array, jax.Array]]:
    """Makes a jitted function of (parameters, batch): what the model's loss gives an objective.

    These are scores_BxG, positive_BxG and negatives_B, LSE_N.
    """

    def scores(params: dict, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        seen = []

        def keep(scores_BxG, positive_BxG, negatives_B, rng=None):
            seen.append((scores_BxG, positive_BxG, negatives_B))
            return 0.0 * negatives_B

        loss = dataclasses.replace(model.vector_loss, objective=keep, distillation=None)
        tokens_BxGxP = batch["right_encoder_input_tokens"]
        tokens_MxP = tokens_BxGxP.reshape(-1, tokens_BxGxP.shape[-1])
        queries_BxE = model.scale * model.encode_queries(params, batch["left_encoder_input_tokens"])
        loss(queries_BxE, model.encode_passages(params, tokens_MxP), batch, None)
        return seen[0]

    return jax.jit(scores)


def measure(model: DualEncoder, params: dict, batches: Iterable[dict], names: Iterable[str]) -> dict:
    """Measures how objectives would share their gradient among the positives of real batches.

    Args:
      model: the dual encoder.
      params: its parameters.
      batches: batches for its objective.
      names: of objectives.

    Returns:
      {objective: {"by_rank": the mean gradient of the positives of queries that have the most, the highest
      score first, by autodiff; "formula": the same by the closed form; "queries": how many those are;
      "pushed_down": of queries with several positives, the share of the positives whose gradient is above 0,
      so that a step lowers their score; "difference": the largest between autodiff and formula}}.
    """
    scores = scores_of(model)
    seen = [tuple(map(np.asarray, scores(params, batch))) for batch in batches]
    return {name: _shared(name, seen) for name in names}


def _shared(name: str, seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict:
    ways: dict[str, Callable] = {"by_rank": by_autodiff, "formula": closed_form}
    told, gradients, of_several = {}, {}, []
    most = max(int(positive_BxG.sum(1).max()) for _, positive_BxG, _ in seen)
    for way, function in ways.items():
        of_rank, gradients[way] = [], []
        for scores_BxG, positive_BxG, negatives_B in seen:
            some = positive_BxG.any(1)
            arrays = scores_BxG[some], positive_BxG[some], negatives_B[some]
            gradient_BxG = function(name, *arrays)
            gradients[way].append(gradient_BxG[arrays[1]])
            if way == "by_rank":
                several = arrays[1].sum(1) > 1
                of_several.append(gradient_BxG[several][arrays[1][several]])
            whole = arrays[1].sum(1) == most
            order_BxM = np.argsort(np.where(arrays[1], -arrays[0], np.inf)[whole], axis=1)[:, :most]
            of_rank.append(np.take_along_axis(gradient_BxG[whole], order_BxM, axis=1))
        told[way] = np.concatenate(of_rank).mean(0).tolist()
        told["queries"] = sum(map(len, of_rank))
    measured, formula = (np.concatenate(gradients[way]) for way in ways)
    down = np.concatenate(of_several) > 0
    told["pushed_down"] = float(down.mean()) if len(down) else 0.0  # a single positive is never
    return told | {"difference": float(np.abs(measured - formula).max())}
