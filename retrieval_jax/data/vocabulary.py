"""The text vocabulary: a SentencePiece model with T5's special ids (0 padding, 1 end, 2 unknown).

Nothing here imports TensorFlow: searchers tokenise with this, and seqio reads the same file for training.
"""

import collections
import copy
import functools
import io
import itertools
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.stopwatch import tokenizing

PAD, EOS, UNK = 0, 1, 2
PAD_SYMBOL = -1  # the padding symbol within a text: models read it as PAD, and do not mask it
SENTINELS = 100  # ids that T5 keeps after the pieces
NORMALIZATION = "nmt_nfkc_cf"  # NFKC, folded case, and white space as one space
MAX_TEXTS = 1_000_000  # texts that a vocabulary is learned on
MAX_TEXT_BYTES = 1 << 16  # bytes of such a text: SentencePiece leaves out longer ones in silence


class Prompts(NamedTuple):
    """The texts that a dual encoder reads before every query and before every passage.

    Attributes:
      query: before queries.
      passage: before passages.
    """

    query: str = ""
    passage: str = ""


NO_PROMPTS = Prompts()


class Vocabulary:
    """A SentencePiece model that was read from a file.

    Args:
      path: the file, local or remote.
      symbols: names in a text that stand for ids, as transformers reads `</s>` or `<extra_id_3>`. None, as
        SentencePiece, seqio and T5X read texts: there are no such names.

    Attributes:
      prompt: a text that is put before every text that is encoded; see `with_prompt`.
      threads: the threads that encode several texts; -1 is one for each core. Where each core has a process
        of its own, 1.

    Raises:
      UserError: the file is no SentencePiece model, or its padding and end are not the ids 0 and 1.
    """

    def __init__(self, path: str | Path, symbols: Mapping[str, int] | None = None):
        self.path, self.prompt, self.symbols = paths.as_path(path), "", symbols or {}
        self.threads = -1
        self._names = re.compile(f"({'|'.join(map(re.escape, self.symbols))})")
        try:
            proto = self.path.read_bytes()
            self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
            if not proto:  # which the library takes
                raise RuntimeError
        except (OSError, RuntimeError):
            raise UserError(f"{path}: not a SentencePiece model: check VOCABULARY, or import again") from None
        if (self.model.pad_id(), self.model.eos_id()) != (PAD, EOS):
            raise UserError(f"{path}: padding and end must be ids 0 and 1, as in T5: train it so")

    def with_prompt(self, prompt: str) -> "Vocabulary":
        """Returns the same vocabulary with a text that is put before every text that it encodes."""
        other = copy.copy(self)
        other.prompt = prompt
        return other

    @property
    def checksum(self) -> str:
        """A fingerprint of the file, since another file may replace it under its name."""
        return storage.digest([self.path.read_bytes()])

    @property
    def size(self) -> int:
        """The number of rows of an embedding: the pieces and T5's sentinels, rounded up to a multiple of 128.

        Public checkpoints fit this: T5's have 32,128 rows for 32,000 pieces, and mT5's 250,112 for 250,000.
        Some files have the sentinels among their pieces.
        """
        last = self.model.id_to_piece(self.model.vocab_size() - 1)
        return round_up(self.model.vocab_size() + (0 if "<extra_id_" in last else SENTINELS), 128)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of the prompt and a text, without the end."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of the prompt and each text, without the ends."""
        return self._encode([self.prompt + text for text in texts])

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        with tokenizing:
            texts = list(map(valid_text, texts))
            if self.symbols:
                return [list(itertools.chain.from_iterable(self._runs(text))) for text in texts]
            if len(texts) == 1:  # to start threads takes ten times as long as to encode a query
                return [self.model.encode(texts[0])]
            return self.model.encode(texts, num_threads=self.threads)

    def _runs(self, text: str) -> Iterator[list[int]]:
        """Yields the tokens of each text between symbols and of each symbol, split as transformers does."""
        for part in self._names.split(text):
            number = self.symbols.get(part)
            yield self.model.encode(part) if number is None else [PAD_SYMBOL if number == PAD else number]

    def encode_chunks(self, texts: Sequence[str], length: int, starts: Sequence[float]) -> list[list[int]]:
        """Returns for each text the token ids of the prompt and of a run of consecutive tokens of the text.

        Args:
          texts: the texts that the runs are cut from; the prompt is not a part of them.
          length: the most tokens of a run.
          starts: for each text a number in [0, 1), which chooses where the run begins among all possible
            positions; 0 is the first.
        """
        prompt = self.encode("") if self.prompt else []

        def chunk(tokens: list[int], start: float) -> list[int]:
            first = int(start * (max(len(tokens) - length, 0) + 1))
            return [*prompt, *tokens[first : first + length]]

        return list(map(chunk, self._encode(texts), starts))

    def decode(self, tokens_NxT: np.ndarray) -> list[str]:
        """Converts token ids N×T to N texts, without special pieces and ids that only round the size up."""
        pieces = range(self.model.unk_id() + 1, self.model.vocab_size())
        return self.model.decode([[t for t in some if t in pieces] for some in tokens_NxT.tolist()])

    def batch(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Encodes texts, each with the prompt before it, as seqio does.

        Args:
          texts: N texts.
          length: the number of columns.

        Returns:
          int32 tokens, N × length: truncated, ended by EOS, padded with 0.
        """
        tokens = np.zeros((len(texts), length), np.int32)
        for row, ids in zip(tokens, self.tokens(texts, length), strict=True):
            row[: len(ids)] = ids
        return tokens

    def tokens(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Returns the token ids of each text as `batch` has them, up to the end and without padding."""
        return [[*ids[: length - 1], EOS] for ids in self.encode_all(texts)]

    def exceeds(self, text: str, length: int) -> bool:
        """Returns whether `batch` would truncate a text."""
        if len(self.prompt) + len(text) < length // 4:  # few characters are several pieces
            return False
        return len(self.encode(text)) >= length


def valid_text(text: str) -> str:
    """Returns the text with U+FFFD for each half of a surrogate pair, which UTF-8 cannot encode."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not text.isascii() else text


def round_up(n: int, multiple: int) -> int:
    """Returns the smallest multiple that is at least `n`, for sizes of arrays that divide over a mesh."""
    return -(-n // multiple) * multiple


def split_long(text: str) -> Iterator[str]:
    """Yields the text in parts of at most MAX_TEXT_BYTES, cut between words if there is white space."""
    start = 0
    # Of a rest that is longer in characters, the bytes need not be counted: that would take a square of time.
    while len(text) - start > MAX_TEXT_BYTES or len(text[start:].encode()) > MAX_TEXT_BYTES:
        head = text[start : start + MAX_TEXT_BYTES // 4]  # a character has at most four bytes
        end = start + (max(map(head.rfind, " \n\t")) + 1 or len(head))
        yield text[start:end]
        start = end
    yield text[start:]


def learn(texts: Iterable[str], size: int, path: Path, required: Iterable[str] = ()) -> None:
    """Learns a unigram vocabulary and writes it.

    It reads texts much as BERT's uncased vocabulary does (Devlin et al. 2019): case is folded, and
    punctuation and symbols have a space on both sides; accents stay. So "When" and "when" are the same
    pieces, and a word is the same ones after a hyphen, a bracket or a dot as after a space, which counts
    where training begins from scratch on little text.

    Args:
      texts: the texts, of which the first MAX_TEXTS are used.
      size: the most pieces.
      path: the file to write, on a local disk.
      required: texts whose characters have pieces however rare they are, unless they are so many that they
        would be more than half of the pieces: then the most frequent ones. Of all other characters the
        rarest, one in 10,000, have none.

    Raises:
      UserError: no vocabulary of this size can be learned.
    """
    model, rules = io.BytesIO(), path.with_suffix(".rules")
    rules.write_text(_normalization_rules())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.islice(
                itertools.chain.from_iterable(map(split_long, texts)), MAX_TEXTS
            ),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            normalization_rule_tsv=str(rules),
            character_coverage=0.9999,
            required_chars=_most_frequent_characters(required, size // 2),
            max_sentence_length=MAX_TEXT_BYTES,
            hard_vocab_limit=False,  # a small collection has fewer pieces
            num_threads=2,  # fixed: the sums, and so the pieces, depend on it
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"{path}: no vocabulary of {size} pieces could be learned ({reason}): "
            "set another --gin.import_collection.vocab_size, or give one by --gin.VOCABULARY"
        ) from None
    finally:
        rules.unlink(missing_ok=True)
    path.write_bytes(model.getvalue())


def _most_frequent_characters(texts: Iterable[str], most: int) -> str:
    """Returns at most so many characters of texts, as a vocabulary reads these, in the order of Unicode."""
    normalizer, counts = sentencepiece.SentencePieceNormalizer(rule_name=NORMALIZATION), collections.Counter()
    for text in texts:
        counts.update(normalizer.normalize(text))
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    characters = [character for character, _ in by_count if character not in " ▁"]
    return "".join(sorted(characters[:most]))


@functools.cache
def _normalization_rules() -> str:
    """Returns NORMALIZATION with spaces around punctuation and symbols, as a TSV of SentencePiece's.

    A character that Unicode composes of others has a rule for these, too.
    """
    normalizer = sentencepiece.SentencePieceNormalizer(
        rule_name=NORMALIZATION,
        add_dummy_prefix=False,
        escape_whitespaces=False,
        remove_extra_whitespaces=False,
    )
    rules = {}
    for character in map(chr, range(1, sys.maxunicode + 1)):
        if unicodedata.category(character) in ("Cn", "Co", "Cs"):
            continue
        target = "".join(
            f" {c} " if unicodedata.category(c)[0] in "PS" else c for c in normalizer.normalize(character)
        )
        for form in (character, unicodedata.normalize("NFD", character)):
            if form != target:
                rules[form] = target
    points = (tuple(" ".join(f"{ord(c):X}" for c in text) for text in rule) for rule in rules.items())
    return "".join(f"{source}\t{target}\n" for source, target in points)
