"""The first noun: passages, queries and relevance judgements (qrels)."""

import dataclasses


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
      positives: passage id -> grade (> 0).
      negatives: ids of passages known to be irrelevant, hardest first where the source orders them.
      label: who judged: "human", "llm", or "" where the source does not say.
    """

    id: str
    text: str
    positives: dict[str, int]
    negatives: tuple[str, ...] = ()
    label: str = ""
