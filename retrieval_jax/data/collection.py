"""Passages, queries and relevance judgements (qrels), of which a collection consists."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text that can be retrieved.

    Attributes:
      id: its name, which is unique, not empty and without white space (TREC files separate columns by it).
      title: its title; may be empty.
      text: its text; may be empty if there is a title.
    """

    id: str
    title: str
    text: str

    @property
    def full_text(self) -> str:
        """Title and text as one string, as models and BM25 read them."""
        return f"{self.title}. {self.text}" if self.title else self.text


@dataclasses.dataclass(frozen=True)
class Query:
    """A question with its relevance judgements.

    Attributes:
      id: its name, unique in a split.
      text: the question.
      positives: passage id -> grade (> 0). A query that was judged without any still counts in every mean.
      negatives: ids of passages that were judged irrelevant, hardest first if the source orders them.
      label: who judged: "human", "llm", or "" if the source does not say.
      missing: like `positives`, of passages that are not in the collection (with `ON_ERROR=skip`).
      is_passage: whether the query is itself a passage of this id and text (as in ArguAna and Quora), so that
        evaluations leave it out of its own results. False if it is among its positives.
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
        """Passage id -> grade (> 0) of all passages that count in an evaluation, in the collection or not."""
        return {**self.positives, **self.missing}

    @property
    def judgements(self) -> dict[str, int]:
        """Passage id -> grade of all judgements, as in a file of qrels; the grade of negatives is 0."""
        return {**self.relevant, **dict.fromkeys(self.negatives, 0)}
