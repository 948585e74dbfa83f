"""Retriever families: how the models of a class are trained and evaluated while they train.

A family from outside the package is a model class, registered by `models.retriever.register_retriever`, and a
`RetrieverFamily` of it, registered by `register_family`.
"""

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh

from retrieval_jax.core.errors import UserError
from retrieval_jax.examples.docid_groups import DocidGroupTargets
from retrieval_jax.examples.targets import DocidTargets, PassageTargets, QueryTargets, Targets
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.models import joint_ranking, ranking  # noqa: F401 (gin finds their objectives)
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.lexical_encoder import LexicalEncoder
from retrieval_jax.models.query_generator import QueryGenerator
from retrieval_jax.models.retriever import Retriever
from retrieval_jax.training.evaluators import (
    DenseEvaluator,
    Evaluator,
    GenerativeEvaluator,
    LossEvaluator,
    lexical_evaluator,
)
from retrieval_jax.training.settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class RetrieverFamily:
    """What training needs to know of a class of models.

    Attributes:
      model: the class; its subclasses belong to the family, unless they have one of their own.
      target_type: makes the targets of an example, and batches of them.
      evaluator: makes what evaluates the model while it trains, of (model, examples, settings, mesh).
      folder_name: names a model's folder where no docids and no MODEL_DIR name it.
      group_target_type: makes the targets of an example where a query comes with negatives
        (`DataConfig.negatives`), if that is another class.
    """

    model: type[Retriever]
    target_type: type[Targets]
    evaluator: Callable[[Retriever, TrainDataset, TrainSettings, Mesh | None], Evaluator]
    folder_name: str
    group_target_type: type[Targets] | None = None

    def targets_for(self, config: DataConfig) -> type[Targets]:
        """Gives the class of the targets of a training with these data."""
        return self.group_target_type if self.group_target_type and config.negatives else self.target_type


_FAMILIES: dict[type[Retriever], RetrieverFamily] = {}


def register_family(family: RetrieverFamily) -> None:
    """Makes a family known, by its class of models."""
    _FAMILIES[family.model] = family


def family_of(retriever: type[Retriever]) -> RetrieverFamily:
    """Finds the family of a class of models.

    Raises:
      UserError: the class and its bases have no family.
    """
    for cls in retriever.__mro__:
        if cls in _FAMILIES:
            return _FAMILIES[cls]
    known = ", ".join(f"@{cls.__name__}" for cls in _FAMILIES)
    raise UserError(f"train.retriever: @{retriever.__name__} has no registered family: choose one of {known}")


register_family(
    RetrieverFamily(
        GenerativeRetriever,
        DocidTargets,
        GenerativeEvaluator,
        "generative",
        group_target_type=DocidGroupTargets,
    )
)
register_family(RetrieverFamily(DualEncoder, PassageTargets, DenseEvaluator, "dual_encoder"))
register_family(RetrieverFamily(LexicalEncoder, PassageTargets, lexical_evaluator, "lexical"))
register_family(RetrieverFamily(QueryGenerator, QueryTargets, LossEvaluator, "doc2query"))
