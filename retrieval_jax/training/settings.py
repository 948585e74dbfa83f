"""The settings of a training run, as plain values."""

import dataclasses
from collections.abc import Sequence

from retrieval_jax.training.loss_spike_guard import LossSpikeGuard


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """What a run does for how long, and how often it evaluates, saves and logs.

    Attributes:
      steps: number of training steps of the whole run, those before a resume included.
      batch_size: examples of a global batch.
      seed: of the random initial parameters, of the data's order and of dropout.
      microbatches: number of equal parts of a batch whose gradients are accumulated; see `make_train_step`.
      random_bits: the generator of dropout's random bits; see `make_train_step`.
      eval_every: steps between two evaluations.
      save_every: steps between two checkpoints.
      log_every: steps between two points of the learning curve.
      max_minutes: minutes of training, evaluations included, after which the run ends early; None: no limit.
      keep: number of newest checkpoints that stay on disk.
      keep_best: the evaluator's metric by which the best checkpoint stays beside them; None: none does.
      profile: (steps before the trace, steps to trace) for TensorBoard's profile plugin; None: no trace.
      spike_guard: what happens when the loss rises sharply.
    """

    steps: int = 1000
    batch_size: int = 128
    seed: int = 0
    microbatches: int = 1
    random_bits: str = "threefry2x32"
    eval_every: int = 500
    save_every: int = 500
    log_every: int = 10
    max_minutes: float | None = None
    keep: int = 2
    keep_best: str | None = "MRR@10"
    profile: Sequence[int] | None = None
    spike_guard: LossSpikeGuard = dataclasses.field(default_factory=LossSpikeGuard)
