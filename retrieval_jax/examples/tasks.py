"""Tasks: the texts that should find passages. A task behaves like an array of examples; see examples.py."""

import abc
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from retrieval_jax.core import storage
from retrieval_jax.data.collection import Collection, Passage, Query
from retrieval_jax.data.copies import KnownAnswers
from retrieval_jax.data.scores import ScoredPassages, ScoredRows
from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.data.variations import add_typo
from retrieval_jax.data.vocabulary import Vocabulary

PADDING = -1  # in a dual encoder's candidates: the row and the grade of no passage


@dataclasses.dataclass(frozen=True)
class Example:
    """A text, and the passages that it is about.

    Attributes:
      tokens: the tokens of the text, without an end of sequence.
      rows: the rows of the passages in the collection; one row where the targets have no groups.
      grades: the relevance of each: > 0 for positives, which come first, 0 for negatives.
      other_positives: rows of more passages that the text is about, which are never its negatives.
      scores: a teacher's score of each row, NaN where it gave none; empty where there is no teacher.
      scored: all passages that the teacher scored for the text, those of `rows` among them; None where there
        is no teacher.
      rest: where the text is a part of the one passage, the passage's text without this part, which is what a
        dual encoder reads as the passage; None: the whole passage.
      copy: the tokens of the text with a typo, where the text itself stays as it is (`Typos.copies`); None
        where there is no such copy.
    """

    tokens: list[int]
    rows: Sequence[int]
    grades: Sequence[int]
    other_positives: Sequence[int] = ()
    scores: Sequence[float] = ()
    scored: ScoredPassages | None = None
    rest: str | None = None
    copy: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class Typos:
    """Which queries have typos, drawn again in each epoch.

    Attributes:
      share: the probability that a query has one.
      copies: whether it is in a copy of the query, which the example has besides the query.
    """

    share: float = 0.0
    copies: bool = False

    def encode(
        self, vocabulary: Vocabulary, texts: Sequence[str], rngs: Iterable[np.random.Generator]
    ) -> list[tuple[list[int], list[int] | None]]:
        """Gives the tokens of each text and of its copy. Nothing is drawn where `share` is 0."""
        varied = texts
        if self.share:
            varied = [
                add_typo(text, rng) if rng.random() < self.share else text
                for text, rng in zip(texts, rngs, strict=False)
            ]
        tokens = vocabulary.encode_all(varied)
        if not self.copies:
            return [(of_text, None) for of_text in tokens]
        return list(zip(vocabulary.encode_all(texts), tokens, strict=True))


NO_TYPOS = Typos()


class Task(abc.ABC):
    """Examples by number: `task(i, rng)` gives example i.

    Attributes:
      draws: whether an example may differ from one epoch to the next, as `rng` draws it.
    """

    draws = False

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of examples."""

    @abc.abstractmethod
    def get(self, numbers: Sequence[int], rngs: Iterable[np.random.Generator]) -> list[Example]:
        """Makes the examples of these numbers; many at once take less time than one after the other.

        Args:
          numbers: numbers of examples.
          rngs: for each of them a generator, which draws where there is a choice.
        """

    def __call__(self, i: int, rng: np.random.Generator) -> Example:
        """Makes example i."""
        return self.get([i], [rng])[0]


class FirstP(Task):
    """The first `length` tokens of each passage (FirstP)."""

    def __init__(self, collection: Collection, vocabulary: Vocabulary, length: int):
        self.collection, self.vocabulary, self.length = collection, vocabulary, length

    def __len__(self) -> int:
        return self.collection.passage_count

    def get(self, numbers: Sequence[int], rngs: Iterable[np.random.Generator]) -> list[Example]:
        """See `Task.get`."""
        texts = [passage.full_text for passage in self.collection.get(numbers)]
        chunks = self.vocabulary.encode_chunks(texts, self.length, [0.0] * len(texts))
        return [Example(tokens, [i], [1]) for tokens, i in zip(chunks, numbers, strict=True)]


class DaQ(Task):
    """`chunks` random chunks of `length` tokens of each passage ("document as query"); a short one is whole.

    Example i is a chunk of passage i % passages, so that an epoch visits every passage before the next chunk
    of any. Where a chunk starts depends on the passage and the number of the chunk alone.
    """

    def __init__(self, collection: Collection, vocabulary: Vocabulary, length: int, chunks: int):
        self.collection, self.vocabulary = collection, vocabulary
        self.length, self.chunks = length, chunks

    def __len__(self) -> int:
        return self.chunks * self.collection.passage_count

    def get(self, numbers: Sequence[int], rngs: Iterable[np.random.Generator]) -> list[Example]:
        """See `Task.get`."""
        places = [divmod(i, self.collection.passage_count) for i in numbers]
        rows = [row for _, row in places]
        texts = [passage.full_text for passage in self.collection.get(rows)]
        starts = [storage.hash_fraction(f"{row}.{chunk}") for chunk, row in places]
        chunks = self.vocabulary.encode_chunks(texts, self.length, starts)
        return [Example(tokens, [row], [1]) for tokens, row in zip(chunks, rows, strict=True)]


class Sentences(Task):
    """`count` sentences of each passage, each with the rest of its passage (the inverse cloze task).

    A dual encoder that is given a part of a passage and the whole of it learns to compare words one by one;
    here it must find the passage by what its other sentences say (Lee et al. 2019, section 3.1, who keep a
    tenth of the sentences in their passages). Example i is of passage i % passages. Which sentence it is
    depends on the passage and the number of the sentence alone.
    """

    def __init__(self, collection: Collection, vocabulary: Vocabulary, count: int):
        self.collection, self.vocabulary, self.count = collection, vocabulary, count

    def __len__(self) -> int:
        return self.count * self.collection.passage_count

    def get(self, numbers: Sequence[int], rngs: Iterable[np.random.Generator]) -> list[Example]:
        """See `Task.get`."""
        places = [divmod(i, self.collection.passage_count) for i in numbers]
        rows = [row for _, row in places]
        passages = self.collection.get(rows)
        parts = [
            self.part(passage, storage.hash_fraction(f"{row}.{number}.sentence"))
            for (number, row), passage in zip(places, passages, strict=True)
        ]
        inputs = self.vocabulary.encode_all([part for part, _ in parts])
        return [
            Example(tokens, [row], [1], rest=rest)
            for tokens, row, (_, rest) in zip(inputs, rows, parts, strict=True)
        ]

    def part(self, passage: Passage, drawn: float) -> tuple[str, str]:
        """Gives the part of a passage that a number in [0, 1) chooses, and the rest."""
        return cut_sentence(passage.full_text, drawn)


class Titles(Sentences):
    """The title of each passage, with its text as the passage; where it has none, a sentence of it."""

    def __init__(self, collection: Collection, vocabulary: Vocabulary):
        super().__init__(collection, vocabulary, 1)

    def part(self, passage: Passage, drawn: float) -> tuple[str, str]:
        """See `Sentences.part`."""
        if passage.title.strip() and passage.text.strip():
            return passage.title, passage.text
        return super().part(passage, drawn)


def cut_sentence(text: str, drawn: float) -> tuple[str, str]:
    """Takes a sentence out of a text.

    Sentences end at full stops, question marks and exclamation marks before white space (or without it, in
    Chinese and Japanese), and at line breaks. Of a text without two sentences, the first or the last half of
    its words is taken. Where nothing else would be left (of a single word, say), the whole text stays.

    Args:
      text: the text.
      drawn: in [0, 1); it chooses the sentence.

    Returns:
      (the sentence, the text without all sentences that contain it).
    """
    for split in (_sentences, _halves):
        parts = split(text)
        chosen = parts[int(drawn * len(parts))] if parts else text
        rest = " ".join(part for part in parts if chosen not in part)
        if rest and chosen not in rest:
            return chosen, rest
    return text, text


def _sentences(text: str) -> list[str]:
    parts = re.split(r"(?<=[.!?])\s+|(?<=[。！？])|[\r\n]+", text)
    return [part.strip() for part in parts if any(map(str.isalnum, part))]


def _halves(text: str) -> list[str]:
    words = text.split()
    middle = len(words) // 2
    return [" ".join(some) for some in (words[:middle], words[middle:]) if some]


class D2Q(Task):
    """The synthetic queries of each passage (D2Q), a share of them with a typo (`typos`)."""

    def __init__(self, queries: SyntheticQueries, vocabulary: Vocabulary, typos: Typos = NO_TYPOS):
        self.queries, self.vocabulary, self.typos = queries, vocabulary, typos
        self.draws = typos.share > 0
        self.ends = np.cumsum(queries.counts, dtype=np.int64)  # after each passage's queries

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def get(self, numbers: Sequence[int], rngs: Iterable[np.random.Generator]) -> list[Example]:
        """See `Task.get`."""
        rows = np.searchsorted(self.ends, numbers, side="right")
        places = (numbers - self.ends[rows]).tolist()  # before the end of the passage's queries: negative
        distinct, which = np.unique(rows, return_inverse=True)  # a passage's queries are one record
        queries = self.queries.get(distinct.tolist())
        texts = [queries[at][place] for at, place in zip(which.tolist(), places, strict=True)]
        inputs = self.typos.encode(self.vocabulary, texts, rngs)
        return [
            Example(tokens, [row], [1], copy=copy)
            for (tokens, copy), row in zip(inputs, rows.tolist(), strict=True)
        ]


class LabelledPairs(Task):
    """Each labelled query with each of its positives, one at a time, a share with a typo (`typos`)."""

    def __init__(
        self,
        collection: Collection,
        vocabulary: Vocabulary,
        queries: Sequence[Query],
        typos: Typos = NO_TYPOS,
    ):
        self.vocabulary, self.typos = vocabulary, typos
        self.draws = typos.share > 0
        pairs = [(q.text, p, grade) for q in queries for p, grade in q.positives.items()]
        self.texts = [text for text, _, _ in pairs]
        self.rows = collection.find_rows([passage for _, passage, _ in pairs])
        self.grades = [grade for _, _, grade in pairs]

    def __len__(self) -> int:
        return len(self.texts)

    def get(self, numbers: Sequence[int], rngs: Iterable[np.random.Generator]) -> list[Example]:
        """See `Task.get`."""
        inputs = self.typos.encode(self.vocabulary, [self.texts[i] for i in numbers], rngs)
        return [
            Example(tokens, [int(self.rows[i])], [self.grades[i]], copy=copy)
            for (tokens, copy), i in zip(inputs, numbers, strict=True)
        ]


class LabelledGroups(Task):
    """Each labelled query with at most `positives` of its positives and `negatives` of its negatives.

    Where a query has more, they are drawn without replacement, again in each epoch; where it has fewer, the
    group is smaller. A passage with the same text as one that answers the query is never its negative, and of
    negatives with one text the first is there.

    Args:
      collection: the collection.
      vocabulary: how the queries become tokens.
      queries: the queries.
      positives: the most positives of a group.
      negatives: the most negatives of a group.
      answers: the passages that are known to answer each query.
      scores: a teacher's scores, which come with the group; None where there is no teacher. A passage has the
        score of any copy of its text.
      draw_scored: whether the passages that the teacher scored are negatives, too.
      typos: which queries have typos.
    """

    def __init__(
        self,
        collection: Collection,
        vocabulary: Vocabulary,
        queries: Sequence[Query],
        positives: int,
        negatives: int,
        answers: KnownAnswers,
        scores: ScoredRows | None = None,
        draw_scored: bool = False,
        typos: Typos = NO_TYPOS,
    ):
        self.vocabulary, self.queries, self.typos = vocabulary, queries, typos
        self.positives, self.negatives = positives, negatives
        self.scores, self.draw_scored = scores, draw_scored
        ids = [(*q.positives, *answers.others(q), *q.negatives) for q in queries]
        self.rows = collection.find_rows(itertools.chain.from_iterable(ids))
        self.first_rows = collection.first_copies(self.rows)  # a row a text
        self.starts = np.concatenate([[0], np.cumsum([len(some) for some in ids], dtype=np.int64)])

    @property
    def draws(self) -> bool:
        """See `Task`. Where scored passages are negatives, it is not counted which queries have enough."""
        return bool(
            self.typos.share
            or any(len(query.positives) > self.positives for query in self.queries)
            or (
                self.negatives
                and (self.draw_scored or any(len(query.negatives) > self.negatives for query in self.queries))
            )
        )

    def __len__(self) -> int:
        return len(self.queries)

    def get(self, numbers: Sequence[int], rngs: Iterable[np.random.Generator]) -> list[Example]:
        """See `Task.get`."""
        for_typos, for_groups = itertools.tee(rngs)
        texts = [self.queries[i].text for i in numbers]
        return [
            dataclasses.replace(self._group(i, rng, tokens), copy=copy)
            for i, rng, (tokens, copy) in zip(
                numbers, for_groups, self.typos.encode(self.vocabulary, texts, for_typos), strict=False
            )
        ]

    def has_scored_negatives(self) -> bool:
        """Returns whether the teacher scored a negative of any query."""
        for i, query in enumerate(self.queries):
            negatives = {first for _, first in self._negatives(i)}
            if not negatives.isdisjoint(self.scores[query.id].first_rows_P.tolist()):
                return True
        return False

    def _negatives(self, i: int) -> list[tuple[int, int]]:
        """Gives the negatives of query i, one a text: (row, the first row with the same text)."""
        start, end = self.starts[i], self.starts[i + 1]
        rows, first_rows = (some[start:end].tolist() for some in (self.rows, self.first_rows))
        bad = len(rows) - len(self.queries[i].negatives)
        found = [zip(rows[bad:], first_rows[bad:], strict=True)]
        if self.draw_scored:
            scored = self.scores[self.queries[i].id]
            found.append(zip(scored.rows_P.tolist(), scored.first_rows_P.tolist(), strict=True))
        answers, row_of_text = {*first_rows[:bad]}, {}
        for row, first in itertools.chain.from_iterable(found):
            row_of_text.setdefault(first, row)
        return [(row, first) for first, row in row_of_text.items() if first not in answers]

    def _group(self, i: int, rng: np.random.Generator, tokens: list[int]) -> Example:
        """Draws the candidates of query i, whose tokens are given."""
        query = self.queries[i]
        rows, first_rows = (
            some[self.starts[i] : self.starts[i + 1]].tolist() for some in (self.rows, self.first_rows)
        )
        good, bad = len(query.positives), len(rows) - len(query.negatives)
        negatives = self._negatives(i)
        scored = self.scores[query.id] if self.scores else None
        drawn = _draw(rng, good, self.positives)
        chosen = [negatives[n] for n in _draw(rng, len(negatives), self.negatives)]
        grades = [*query.positives.values()]
        scores = []
        if scored:
            of_text = scored.by_text()
            firsts = (*(first_rows[j] for j in drawn), *(first for _, first in chosen))
            scores = [of_text.get(first, math.nan) for first in firsts]
        return Example(
            tokens,
            [*(rows[j] for j in drawn), *(row for row, _ in chosen)],
            [*(grades[j] for j in drawn), *[0] * len(chosen)],
            [rows[j] for j in range(bad) if j not in drawn and rows[j] >= 0],
            scores,
            scored,
        )


def _draw(rng: np.random.Generator, count: int, most: int) -> Sequence[int]:
    return range(count) if count <= most else sorted(rng.choice(count, most, replace=False).tolist())
