"""Mixtures of tasks: those of the generative-retrieval paper, and how the tasks of a mixture are weighed."""

from collections.abc import Callable, Mapping, Sized

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log

# The generative-retrieval paper's rows: which tasks are mixed, each in proportion to its examples (the paper
# does not say in which). Rows 4 and 5 change the model, not the mixture. On MS MARCO, whose passages are some
# 64 tokens, DaQ is FirstP; on NQ and TriviaQA, row 7 has both, and queries of a generator trained on them.
PAPER_MIXTURES: Mapping[str, tuple[str, ...]] = {
    "1a": ("labelled",),
    "2a": ("firstp", "labelled"),
    "2b": ("daq", "labelled"),
    "3a": ("daq", "d2q", "labelled"),
    "3b": ("firstp", "d2q", "labelled"),
    "6b": ("d2q",),
    "7": ("firstp", "daq", "d2q", "labelled"),
}


def mix_tasks(
    mixture: str | Mapping[str, float], make: Callable[[str], Sized]
) -> Mapping[str, tuple[Sized, float]]:
    """Weighs the tasks of a mixture.

    Args:
      mixture: the name of one of PAPER_MIXTURES, whose tasks are weighed by their number of examples; or the
        weight of each task.
      make: makes the examples of a task, by its name.

    Returns:
      {task: (its examples, its weight)}. The weights sum to 1; tasks without examples are left out.

    Raises:
      UserError: the mixture is unknown, or no task has both a weight and examples.
    """
    if isinstance(mixture, str):
        if mixture not in PAPER_MIXTURES:
            raise UserError(f"no mixture {mixture!r}: the paper's rows are {', '.join(PAPER_MIXTURES)}")
        made = {name: make(name) for name in PAPER_MIXTURES[mixture]}
        weights = {name: len(examples) for name, examples in made.items()}
    else:
        made = {name: make(name) for name, weight in mixture.items() if weight}
        weights = {name: mixture[name] for name in made}
    mixed = {name: examples for name, examples in made.items() if len(examples)}
    if not mixed:
        raise UserError("no task has both a weight and examples: set --gin.DataConfig.mixture")
    if empty := [name for name in made if name not in mixed]:
        log(f"{', '.join(empty)}: no examples, so left out of the mixture (DataConfig.mixture)")
    total = sum(weights[name] for name in mixed)
    return {name: (examples, weights[name] / total) for name, examples in mixed.items()}
