"""How much searchers lose by other wordings of the queries: typos, words left out, another order.

Penha et al. (ECIR 2022), "Evaluating the Robustness of Retrieval Pipelines with Query Variation Generators".
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set

import numpy as np

from retrieval_jax.data.trec import Run
from retrieval_jax.evaluation.significance import Difference, compare

DEPTH = 10  # first results whose overlap is measured


@dataclasses.dataclass(frozen=True)
class MethodRun:
    """A method's run, as far as it is compared here.

    Attributes:
      run: its ranked lists.
      values_Q: float64, the value of the measure for each query.
      certain: the share of the queries whose first passage is proven to be that of an exhaustive search; None
        where nothing is known of it.
      certain_queries: the ids of these queries; None where they are not known one by one.
      plans: the passages that a planned search considers, as far as they are known; see `plans_of`.
    """

    run: Run
    values_Q: np.ndarray
    certain: float | None = None
    certain_queries: Set[str] | None = None
    plans: Mapping[str, Run] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a variation of the queries does to a method.

    Attributes:
      clean: the mean of the measure for the queries as they are.
      value: the mean for their variations.
      difference: `value` minus `clean`, paired by query.
      overlap: the mean over the queries of the share of the first ten passages that both runs have.
      certain_clean: see `MethodRun.certain`.
      certain: the same for the variations.
      still_certain: the share of the queries that are certain as they are whose variations are certain, too;
        None where none is certain as it is, or it is not known which are.
      plan_overlap: as `overlap`, of the plans; None where one of them is not known.
    """

    clean: float
    value: float
    difference: Difference
    overlap: float
    certain_clean: float | None
    certain: float | None
    still_certain: float | None = None
    plan_overlap: float | None = None

    @property
    def relative_loss(self) -> float:
        """The share of the clean value that is lost; NaN where that is 0."""
        return (self.clean - self.value) / self.clean if self.clean else math.nan


Effects = Mapping[str, Mapping[str, Effect]]
"""Method -> kind of variation -> effect."""


def effects(
    queries: Sequence[str], clean: Mapping[str, MethodRun], varied: Mapping[str, Mapping[str, MethodRun]]
) -> dict[str, dict[str, Effect]]:
    """Compares the runs of variations with those of the queries as they are.

    Args:
      queries: the ids of the queries, in the order of the values.
      clean: method -> its run of the queries as they are.
      varied: kind of variation -> method -> its run.

    Returns:
      The effects of the methods that have both runs. The p-values are corrected over all of them.
    """
    pairs = [(name, kind) for name in clean for kind in varied if name in varied[kind]]
    if not pairs:
        return {}
    changes = {(name, kind): varied[kind][name].values_Q - clean[name].values_Q for name, kind in pairs}
    differences = compare(np.zeros(len(queries)), changes)
    found: dict[str, dict[str, Effect]] = {}
    for name, kind in pairs:
        one, other = clean[name], varied[kind][name]
        found.setdefault(name, {})[kind] = Effect(
            float(one.values_Q.mean()),
            float(other.values_Q.mean()),
            differences[name, kind],
            overlap(one.run, other.run, queries),
            one.certain,
            other.certain,
            _still_certain(one, other),
            _plan_overlap(one, other, queries),
        )
    return found


def _still_certain(one: MethodRun, other: MethodRun) -> float | None:
    """Returns the share of a run's certain queries that are certain in another run, if both are known."""
    if not one.certain_queries or other.certain_queries is None:
        return None
    return len(one.certain_queries & other.certain_queries) / len(one.certain_queries)


def _plan_overlap(one: MethodRun, other: MethodRun, queries: Sequence[str]) -> float | None:
    """Returns the overlap of two runs' plans, as far as one searcher tells both; None if none does."""
    name = next((name for name in one.plans if name in other.plans), None)
    return None if name is None else overlap(one.plans[name], other.plans[name], queries, None)


def plans_of(facts: dict | None, runs: Mapping[str, tuple[Run, dict | None]]) -> dict[str, Run]:
    """Finds the plans of a planned search: the passages of largest lexical score, among which it finds.

    A lexical searcher of the same model and the same sets of tokens (`pag` calls it NAME_lexical) ranks all
    passages by these scores, so that its lists are the beginnings of the plans.

    Args:
      facts: what `search` noted of a run; None for a run of another tool.
      runs: runs of the same queries by name, with their facts.

    Returns:
      Name of such a run -> its lists, no longer than the plans; none if the search does not plan.
    """
    own = facts["recipe"]["searcher"] if facts else {}
    if own.get("kind") != "planned":
        return {}
    same = ("model", "step", "checksum", "sets_fingerprint")
    size, found = own["planned_by"]["plan_size"], {}
    for name, (run, of_run) in runs.items():
        other = of_run["recipe"]["searcher"] if of_run else {}
        if other.get("kind") == "lexical" and all(other.get(key) == own.get(key) for key in same):
            found[name] = {query: ranked[:size] for query, ranked in run.items()}
    return found


def overlap(one: Run, other: Run, queries: Sequence[str], depth: int | None = DEPTH) -> float:
    """Returns the mean over queries of the share of the first passages that two runs have in common.

    Args:
      one: a run.
      other: another one.
      queries: the ids of the queries.
      depth: how many passages of each list count, None for all. The share is of the longer list, if both are
        shorter; two empty lists are the same.
    """

    def share(query: str) -> float:
        tops = [{passage for passage, _ in run.get(query, [])[:depth]} for run in (one, other)]
        longest = max(map(len, tops))
        return len(tops[0] & tops[1]) / longest if longest else 1.0

    return sum(map(share, queries)) / len(queries)


def facts(found: Effects, measure: str, split: str, queries: int) -> dict:
    """Returns what robustness.json says, with null for what is unknown or undefined.

    Args:
      found: the effects.
      measure: the name of the measure.
      split: the split whose variations they are of.
      queries: the number of queries.
    """

    def of(effect: Effect) -> dict:
        loss = effect.relative_loss
        return {
            "clean": effect.clean,
            "value": effect.value,
            "relative_loss": loss if math.isfinite(loss) else None,
            f"overlap@{DEPTH}": effect.overlap,
            "certain_clean": effect.certain_clean,
            "certain": effect.certain,
            "still_certain": effect.still_certain,
            "plan_overlap": effect.plan_overlap,
            "difference": effect.difference.facts(),
        }

    methods = {name: {kind: of(effect) for kind, effect in kinds.items()} for name, kinds in found.items()}
    return {"split": split, "measure": measure, "queries": queries, "methods": methods}
