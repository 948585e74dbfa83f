"""Groups of docids to be ranked: those of passages that answer a query, and of some that do not."""

import itertools
from collections.abc import Sequence

import numpy as np

from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.targets import Batch, Feature, Features, Targets
from retrieval_jax.examples.tasks import PADDING, Example


class DocidGroupTargets(Targets):
    """The feature `inputs` is the text; the others hold a group of at most C candidates, positives first.

    - targets: the candidates' docids in one row, each padded to the T tokens of the longest docid.
    - grade: > 0 for a positive, 0 for a negative, PADDING for no candidate.

    A text that is not a labelled query (firstp, daq, d2q) is a group of its passage alone: nothing is ranked.
    """

    has_groups = True

    def __init__(self, table: DocidTable, input_length: int, group_size: int):
        self.table, self.group_size = table, group_size
        self.name = f"{table.kind}_groups"
        self.features = {
            "inputs": Feature(input_length, add_eos=True),
            "targets": Feature(group_size * table.length, size=table.output_size),
            "grade": Feature(group_size, size=1 << 31),
        }

    @classmethod
    def of(cls, dataset) -> "DocidGroupTargets":
        """See `Targets.of`."""
        config = dataset.config
        return cls(dataset.table, config.input_length, config.positives + config.negatives)

    @classmethod
    def lengths(cls, config, docid_length: int | None = None) -> dict[str, int]:
        """See `Targets.lengths`."""
        group_size = config.positives + config.negatives
        return {"inputs": config.input_length, "targets": group_size * docid_length, "grade": group_size}

    @staticmethod
    def to_batch(features: Batch) -> Batch:
        """Turns padded features into the batch of a generative retriever that ranks.

        Args:
          features: by the names of this class's features.

        Returns:
          Int32 arrays encoder_input_tokens B×S; decoder_target_tokens, decoder_input_tokens and
          decoder_loss_weights, each B×C×T, as those of one docid are B×T (see `Targets.to_batch`); and
          grade B×C.
        """
        grade = features["grade"]
        targets = features["targets"].reshape(*grade.shape, -1)
        return Targets.to_batch(features | {"targets": targets}) | {"grade": grade}

    def get(self, examples: Sequence[Example]) -> list[Features]:
        """See `Targets.get`."""
        rows = list(itertools.chain.from_iterable(example.rows for example in examples))
        tokens_RxT = self.table.tokens_NxL[rows]
        ends = itertools.accumulate(len(example.rows) for example in examples)
        return [
            self._features(example, tokens_RxT[end - len(example.rows) : end])
            for example, end in zip(examples, ends, strict=True)
        ]

    def _features(self, example: Example, tokens_RxT: np.ndarray) -> Features:
        """Gives the features of an example, of whose candidates the docids are given."""
        missing = self.group_size - len(example.rows)
        return {
            "inputs": example.tokens,
            "targets": [*tokens_RxT.ravel().tolist(), *[0] * (missing * self.table.length)],
            "grade": [*example.grades, *[PADDING] * missing],
        }
