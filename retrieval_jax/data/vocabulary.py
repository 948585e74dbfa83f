"""The text vocabulary: a SentencePiece model with T5's special ids (0 padding, 1 end, 2 unknown).

Nothing here imports TensorFlow: searchers tokenise with this; seqio reads the same file for training.
"""

import copy
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError

PAD, EOS = 0, 1
PAD_SYMBOL = -1  # the padding symbol within a text: models read it as PAD, and do not mask it
SENTINELS = 100  # ids that T5 keeps after the pieces
MOST = 1_000_000  # texts that a vocabulary is learned on
LONGEST = 1 << 16  # bytes of such a text: SentencePiece leaves out longer ones in silence


class Prompts(NamedTuple):
    """The texts that a dual encoder reads before every query and before every passage."""

    query: str = ""
    passage: str = ""


NO_PROMPTS = Prompts()


class Vocabulary:
    """A SentencePiece model read from a file.

    Args:
      path: the file.
      symbols: name -> id of what in a text is no text but a symbol, as transformers reads `</s>` or
        `<extra_id_3>`. None, as SentencePiece, seqio and T5X read texts: there is no such thing.

    Attributes:
      prompt: a text that is put before every text that is encoded; see `with_prompt`.
    """

    def __init__(self, path: str | Path, symbols: Mapping[str, int] | None = None):
        self.path, self.prompt, self.symbols = paths.as_path(path), "", symbols or {}
        self._names = re.compile(f"({'|'.join(map(re.escape, self.symbols))})")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=self.path.read_bytes())
        except (OSError, RuntimeError):
            raise UserError(f"{path}: not a SentencePiece model: check VOCABULARY, or import again") from None
        if (self.model.pad_id(), self.model.eos_id()) != (PAD, EOS):
            raise UserError(f"{path}: padding and end must be ids 0 and 1, as in T5: train it so")

    def with_prompt(self, prompt: str) -> "Vocabulary":
        """The same vocabulary, which puts `prompt` before every text that it encodes."""
        other = copy.copy(self)
        other.prompt = prompt
        return other

    @property
    def checksum(self) -> str:
        """A fingerprint of the file: another file may come to lie under its name."""
        return storage.digest([self.path.read_bytes()])

    @property
    def size(self) -> int:
        """Rows of an embedding for this vocabulary: its pieces and T5's sentinels, to a multiple of 128.

        So public checkpoints fit: T5's have 32,128 for 32,000 pieces, mT5's 250,112 for 250,000. Some files
        have the sentinels among their pieces.
        """
        last = self.model.id_to_piece(self.model.vocab_size() - 1)
        return round_up(self.model.vocab_size() + (0 if "<extra_id_" in last else SENTINELS), 128)

    def encode(self, text: str) -> list[int]:
        """Token ids of the prompt and a text, without the end."""
        return self._encode([self.prompt + text])[0]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        texts = list(map(valid_text, texts))
        if not self.symbols:
            return self.model.encode(texts)
        return [list(itertools.chain.from_iterable(self._runs(text))) for text in texts]

    def _runs(self, text: str) -> Iterator[list[int]]:
        """The tokens of a text between symbols, and of the symbols, as transformers splits it."""
        for part in self._names.split(text):
            number = self.symbols.get(part)
            yield self.model.encode(part) if number is None else [PAD_SYMBOL if number == PAD else number]

    def encode_chunk(self, text: str, length: int, start: float = 0.0) -> list[int]:
        """Token ids of the prompt, then of a run of at most `length` tokens of a text.

        Args:
          text: the text that the run is cut out of; the prompt is not a part of it.
          length: most tokens of the run.
          start: in [0, 1): where among all places for a run it begins; 0 is the first.
        """
        (tokens,) = self._encode([text])
        first = int(start * (max(len(tokens) - length, 0) + 1))
        return [*self.encode(""), *tokens[first : first + length]]

    def decode(self, tokens_NxT: np.ndarray) -> list[str]:
        """N texts, without the special pieces and the ids that only round the size up."""
        pieces = range(self.model.unk_id() + 1, self.model.vocab_size())
        return self.model.decode([[t for t in some if t in pieces] for some in tokens_NxT.tolist()])

    def batch(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Int32 tokens, len(texts) × length: truncated, ended by EOS, padded with 0 (as seqio does it)."""
        tokens = np.zeros((len(texts), length), np.int32)
        whole = self._encode([self.prompt + text for text in texts])
        for row, ids in zip(tokens, whole, strict=True):
            ids = [*ids[: length - 1], EOS]
            row[: len(ids)] = ids
        return tokens


def valid_text(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which UTF-8 cannot write."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not text.isascii() else text


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is at least n: array sizes that divide over a mesh."""
    return -(-n // multiple) * multiple


def split_long(text: str) -> Iterator[str]:
    """The text in parts of at most LONGEST bytes, between words where there is white space."""
    start = 0
    # Of a rest that is longer in characters, the bytes need not be counted: that would take a square of time.
    while len(text) - start > LONGEST or len(text[start:].encode()) > LONGEST:
        head = text[start : start + LONGEST // 4]  # a character has at most four bytes
        end = start + (max(map(head.rfind, " \n\t")) + 1 or len(head))
        yield text[start:end]
        start = end
    yield text[start:]


def learn(texts: Iterable[str], size: int, path: Path) -> None:
    """Learns a unigram vocabulary of at most `size` pieces from the first MOST texts and writes it.

    Case is folded: from scratch and on little text, "When" and "when" had better be one piece.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.islice(itertools.chain.from_iterable(map(split_long, texts)), MOST),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            normalization_rule_name="nmt_nfkc_cf",
            character_coverage=0.9999,
            max_sentence_length=LONGEST,
            hard_vocab_limit=False,  # a small collection has fewer pieces
            num_threads=2,  # fixed: the sums, and so the pieces, depend on it
            pad_id=PAD,
            eos_id=EOS,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"{path}: no vocabulary of {size} pieces could be learned ({reason}): "
            "set another --gin.import_collection.vocab_size, or give one by --gin.VOCABULARY"
        ) from None
    path.write_bytes(model.getvalue())
