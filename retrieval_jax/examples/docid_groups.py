"""Groups of docids to be ranked: those of passages that answer a query, and of some that do not."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from retrieval_jax.docids.table import DocidTable
from retrieval_jax.docids.token_sets import TokenSets
from retrieval_jax.examples.features import SCORE, SET_IMPACTS, SET_TOKENS, Batch, Feature, Features
from retrieval_jax.examples.targets import Targets, draw_docids, set_features, set_lengths
from retrieval_jax.examples.tasks import PADDING, Example


class DocidGroupTargets(Targets):
    """The feature `inputs` is the text; the others hold a group of at most C candidates, positives first.

    - targets: the candidates' docids in one row, each padded to the T tokens of the longest docid.
    - grade: > 0 for a positive, 0 for a negative, PADDING for no candidate.
    - score: where there is a teacher, C × T numbers, float32: the teacher's score of the first token of a
      candidate's docid, of its first two, …, of the whole docid. A prefix has the largest score of all the
      query's scored passages whose docids begin with it (RIPOR, Zeng et al. 2024); NaN where there is none.
      Copies of the candidate's text count as such passages, but for a whole docid that was scored itself.
    - set_tokens, set_impacts: where there are set docids, C × M; see `set_features`.

    A text that is not a labelled query (firstp, daq, d2q) is a group of its passage alone: nothing is ranked.
    """

    has_groups = True

    def __init__(
        self,
        table: DocidTable,
        input_length: int,
        group_size: int,
        has_scores: bool = False,
        sets: TokenSets | None = None,
    ):
        self.table, self.group_size, self.sets = table, group_size, sets
        self.name, self.draws = f"{table.kind}_groups", table.has_several
        self.features = {
            "inputs": Feature(input_length, add_eos=True),
            "targets": Feature(group_size * table.length, size=table.output_size),
            "grade": Feature(group_size, size=1 << 31),
            **({SCORE: Feature(group_size * table.length, dtype="float32")} if has_scores else {}),
        }
        self.features |= set_lengths(sets and sets.shape, group_size)

    @classmethod
    def of(cls, dataset) -> "DocidGroupTargets":
        """See `Targets.of`."""
        config, has_scores = dataset.config, dataset.config.scores is not None
        group_size = config.positives + config.negatives
        return cls(dataset.table, config.input_length, group_size, has_scores, dataset.sets)

    @classmethod
    def lengths(cls, config, docid_length: int | None = None) -> dict[str, int]:
        """See `Targets.lengths`."""
        group_size = config.positives + config.negatives
        return {
            "inputs": config.input_length,
            "targets": group_size * docid_length,
            "grade": group_size,
            **({SCORE: group_size * docid_length} if config.scores else {}),
        }

    @staticmethod
    def to_batch(features: Batch) -> Batch:
        """Turns padded features into the batch of a generative retriever that ranks.

        Args:
          features: by the names of this class's features.

        Returns:
          Int32 arrays encoder_input_tokens B×S; decoder_target_tokens, decoder_input_tokens and
          decoder_loss_weights, each B×C×T, as those of one docid are B×T (see `Targets.to_batch`); and
          grade B×C. Where there is a teacher, score B×C×T, float32, of the first n + 1 tokens; where there
          are set docids, set_tokens B×C×M, and set_impacts B×C×M, float32, if they have them.
        """
        grade = features["grade"]
        names = ("targets", SCORE, SET_TOKENS, SET_IMPACTS)
        of_docids = {name: features[name].reshape(*grade.shape, -1) for name in names if name in features}
        batch = Targets.to_batch(features | {"targets": of_docids.pop("targets")})
        return batch | {"grade": grade} | of_docids

    def draw(self, examples: Sequence[Example], rngs: Iterable[np.random.Generator]) -> Sequence[Example]:
        """See `Targets.draw`. Of a passage with several docids one is a candidate."""
        return draw_docids(self.table, examples, rngs)

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
        passages_R = self.table.passages_of(np.asarray(example.rows, np.int64))
        return {
            "inputs": example.tokens,
            "targets": [*tokens_RxT.ravel().tolist(), *[0] * (missing * self.table.length)],
            "grade": [*example.grades, *[PADDING] * missing],
            **({SCORE: self._scores(example, tokens_RxT)} if SCORE in self.features else {}),
            **(set_features(self.sets, passages_R, self.group_size) if self.sets else {}),
        }

    def _scores(self, example: Example, tokens_CxT: np.ndarray) -> list[float]:
        """Gives the teacher's score of each prefix of the candidates' docids; NaN for absent candidates."""
        score_GxT = np.full((self.group_size, self.table.length), np.nan, np.float32)
        if example.scored:
            rows_P, scores_P = example.scored.rows_P, example.scored.scores_P
            if self.table.has_several:
                docids = [self.table.docids_of(row) for row in rows_P]
                scores_P = np.repeat(scores_P, np.array([len(rows) for rows in docids], int))
                rows_P = np.concatenate([rows_P[:0], *docids])
            own_P = np.arange(len(rows_P) + len(tokens_CxT)) < len(rows_P)
            # A candidate has the score of any copy of its text, which may have another docid.
            tokens_PxT = np.concatenate([self.table.tokens_NxL[rows_P], tokens_CxT])
            scores_P = np.concatenate([scores_P, np.asarray(example.scores, np.float32)])
            # Most passages share nothing with any candidate.
            some = np.isin(tokens_PxT[:, 0], tokens_CxT[:, 0]) & ~np.isnan(scores_P)
            equal_CxPxT = tokens_CxT[:, None] == tokens_PxT[some]
            shared_CxPxT = np.logical_and.accumulate(equal_CxPxT, axis=-1)
            best_CxT = np.where(shared_CxPxT, scores_P[some, None], -np.inf).max(axis=1, initial=-np.inf)
            whole_CxP = shared_CxPxT[..., -1] & own_P[some]  # as a frozen reference scored them
            whole_C = np.where(whole_CxP, scores_P[some], -np.inf).max(axis=1, initial=-np.inf)
            best_CxT[:, -1] = np.where(whole_CxP.any(axis=1), whole_C, best_CxT[:, -1])
            score_GxT[: len(tokens_CxT)] = np.where(np.isneginf(best_CxT), np.nan, best_CxT)
        return score_GxT.ravel().tolist()
