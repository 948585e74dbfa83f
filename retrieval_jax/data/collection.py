"""The first noun: passages, queries and relevance judgements (qrels)."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text that can be retrieved. `id` is unique, not empty, and has no whitespace (TREC files)."""

    id: str
    title: str
    text: str

    @property
    def full_text(self) -> str:
        """Title and text in one string, as models and BM25 read them."""
        return f"{self.title}. {self.text}" if self.title else self.text


@dataclasses.dataclass(frozen=True)
class Query:
    """A question with its judged passages.

    Attributes:
      positives: passage id -> grade (> 0). A query that was judged without any keeps its place in the means.
      negatives: ids of passages known to be irrelevant, hardest first where the source orders them.
      label: who judged: "human", "llm", or "" where the source does not say.
      missing: the same as `positives`, of passages that are not in the collection (`ON_ERROR='skip'`).
      is_passage: whether it is itself a passage, of that id and with that text (as in ArguAna and Quora), so
        that evaluations leave this one out of its results; not where it shall find it.
    """

    id: str
    text: str
    positives: dict[str, int]
    negatives: tuple[str, ...] = ()
    label: str = ""
    missing: Mapping[str, int] = dataclasses.field(default_factory=dict)
    is_passage: bool = False

    @property
    def relevant(self) -> dict[str, int]:
        """Passage id -> grade (> 0) of all that count in an evaluation, found or not to be found."""
        return {**self.positives, **self.missing}

    @property
    def judgements(self) -> dict[str, int]:
        """Passage id -> grade of all that was judged, as in a file of qrels."""
        return {**self.relevant, **dict.fromkeys(self.negatives, 0)}
