"""A SentencePiece vocabulary as transformers and sentence-transformers read it: the same tokens of any text.

Their T5Tokenizer reads `</s>`, `<pad>` or `<extra_id_3>` in a text as the symbol of that name; SentencePiece
(and so T5X, seqio and this project) reads them as text. tokenizer.json therefore says in full what
SentencePiece does:

- The normalisation is SentencePiece's own table, then its treatment of spaces.
- `split_special_tokens` (tokenizer_config.json) keeps the library from looking for symbols in texts. It does
  not keep the unigram model from finding the piece of a symbol's name, which SentencePiece never does. So the
  first character of these names, `<`, is another one (a private one of Unicode) in texts and in all pieces
  that texts are made of, and no symbol's name is ever found.

A model that came from there keeps their reading: its vocabulary has `symbols`.
"""

import base64
import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

from retrieval_jax.checkpoints.hugging_face import PIECES
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import EOS, PAD, SENTINELS, Vocabulary

PRIVATE = range(0xE000, 0xF8FF)  # characters that Unicode gives no meaning
SPACE = "▁"
CONFIG, FAST = "tokenizer_config.json", "tokenizer.json"
# The files that tell the tokens that are added to the pieces, and how they do.
_ADDED = {
    CONFIG: lambda config: [token["content"] for token in config.get("added_tokens_decoder", {}).values()],
    FAST: lambda fast: [token["content"] for token in fast.get("added_tokens", [])],
    "added_tokens.json": list,
}
_Type = sentencepiece_model_pb2.ModelProto.SentencePiece
_OF_TEXT = (_Type.NORMAL, _Type.USER_DEFINED)
_UNIGRAM = sentencepiece_model_pb2.TrainerSpec.UNIGRAM


def write(folder: Path, vocabulary: Vocabulary, length: int | None) -> None:
    """Writes the files that AutoTokenizer opens.

    Args:
      folder: an existing folder.
      vocabulary: the vocabulary.
      length: the maximal number of tokens of a text, or None.

    Raises:
      UserError: the vocabulary is of a kind that transformers cannot reproduce.
    """
    model = _model(vocabulary.path)
    if model.trainer_spec.model_type != _UNIGRAM or model.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(
            f"{vocabulary.path}: not a unigram model with spaces before words, as T5's is: "
            "export.format: export a searcher or StableHLO"
        )
    paths.copy(vocabulary.path, folder / PIECES)
    names = {
        name: model.pieces[i].piece for name, i in (("pad", PAD), ("eos", EOS), ("unk", _unknown(model)))
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": piece for name, piece in names.items()},
        "split_special_tokens": not vocabulary.symbols,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    for name, value in {CONFIG: config, FAST: _fast(model)}.items():
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False))


def symbols(pieces: Path) -> dict[str, int]:
    """Reads which symbols the tokenizer beside a SentencePiece model finds in texts; see Vocabulary.

    Args:
      pieces: the path of the SentencePiece model.

    Returns:
      {symbol: id}; empty where symbols in texts are text.

    Raises:
      UserError: the tokenizer has other tokens than the pieces and T5's sentinels.
    """
    folder, model = pieces.parent, _model(pieces)
    own = _symbols(model)
    known = own.keys() | {piece.piece for piece in model.pieces}
    for name, contents in _ADDED.items():
        path = folder / name
        described = storage.read_json(path, "fetch it again") if path.is_file() else {}
        if added := [content for content in contents(described) if content not in known]:
            raise UserError(
                f"{path}: adds {', '.join(map(repr, added[:3]))} to the pieces of {PIECES}, which alone are "
                "read here: to do without them, name the pieces by --gin.VOCABULARY"
            )
        if name == CONFIG and described.get("split_special_tokens") is True:
            own = {}
    return own


def _model(pieces: Path):
    return sentencepiece_model_pb2.ModelProto.FromString(pieces.read_bytes())


def _symbols(model) -> dict[str, int]:
    """Returns {name: id} of the symbols of T5's tokenizer: control pieces, the unknown one, the sentinels."""
    found = {p.piece: i for i, p in enumerate(model.pieces) if p.type in (_Type.CONTROL, _Type.UNKNOWN)}
    return found | {name: len(model.pieces) + i for i, name in enumerate(_sentinels(model))}


def _sentinels(model) -> list[str]:
    """Names the sentinels, which follow the pieces; none where the pieces contain them."""
    if any("<extra_id_" in piece.piece for piece in model.pieces):
        return []
    return [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]


def difference(folder: Path, theirs: Path | None, ours: Path, extended: bool = False) -> str | None:
    """Compares the vocabulary that lies with weights with the one whose tokens the weights would get.

    T5's sentinels may be among the pieces or not, since no text has them.

    Args:
      folder: the folder of the weights.
      theirs: the SentencePiece model in it; None reads tokenizer.json, if there is one.
      ours: the other SentencePiece model.
      extended: whether one of the two may have additional pieces at its end.

    Returns:
      The difference, in words; None where there is none, or no vocabulary lies with the weights.
    """
    a, b = (_pieces(path) if path else [] for path in (theirs, ours))
    if theirs is None and (folder / FAST).is_file():
        model = storage.read_json(folder / FAST, "fetch it again").get("model", {})
        a = [(piece, None) for piece, _ in model["vocab"]] if model.get("type") == "Unigram" else []
        b = [(piece, None) for piece, _ in b]
    elif theirs is None or theirs.read_bytes() == ours.read_bytes():
        return None
    a, b = ([one for one in pieces if "<extra_id_" not in str(one[0])] for pieces in (a, b))
    if not a:
        return None
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return f"is another vocabulary than that of {folder}, whose piece {i} is {x[0]!r}, not {y[0]!r}"
    if len(a) != len(b) and not extended:
        return f"is another vocabulary than that of {folder}, which has {len(a):,} pieces, not {len(b):,}"
    return None


def _pieces(path: Path) -> list[tuple[str, object]]:
    """Reads (piece, everything else that decides where it is a token) of a SentencePiece model, by id."""
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    normalised = model.normalizer_spec.SerializeToString()
    return [(piece.piece, (piece.score, piece.type, normalised)) for piece in model.pieces]


def _unknown(model) -> int:
    return next(i for i, piece in enumerate(model.pieces) if piece.type == _Type.UNKNOWN)


def _fast(model) -> dict:
    """tokenizer.json of a SentencePiece unigram model."""
    unread = [piece.piece for piece in model.pieces if piece.type not in _OF_TEXT] + _sentinels(model)
    used = {character for piece in model.pieces for character in piece.piece}
    free = (chr(code) for code in PRIVATE if chr(code) not in used)
    stand_ins = dict(zip(sorted({name[0] for name in unread}), free, strict=False))
    end = model.pieces[EOS].piece
    return {
        "version": "1.0",
        "added_tokens": [_added(i, content) for content, i in _symbols(model).items()],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model, stand_ins, next(free))},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}],
            "pair": [
                {part: {"id": name, "type_id": 0}}
                for part, name in (
                    ("Sequence", "A"),
                    ("SpecialToken", end),
                    ("Sequence", "B"),
                    ("SpecialToken", end),
                )
            ],
            "special_tokens": {end: {"id": end, "ids": [EOS], "tokens": [end]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                *(_replace(theirs, symbol) for symbol, theirs in stand_ins.items()),
                {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": False},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": _unknown(model),
            "vocab": [
                *_scored(model, str.maketrans(stand_ins)),
                *((sentinel, 0.0) for sentinel in _sentinels(model)),
            ],
            "byte_fallback": model.trainer_spec.byte_fallback,
        },
    }


def _added(number: int, content: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": True}


def _replace(pattern: str, content: str, kind: str = "String") -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _normalizers(model, stand_ins: dict[str, str], unknown: str) -> list[dict]:
    """SentencePiece's normalisation; `unknown` is a character that no piece has."""
    spec = model.normalizer_spec
    steps = []
    if spec.precompiled_charsmap:
        table = base64.b64encode(spec.precompiled_charsmap).decode()
        # SentencePiece reads the longest entry of the table, and this step one of a letter before that of the
        # letter with its accent. Composed first, both are one character.
        steps += [{"type": "NFC"}, {"type": "Precompiled", "precompiled_charsmap": table}]
    if spec.remove_extra_whitespaces:
        steps += [_replace(r"\A +", "", "Regex"), _replace(" {2,}", " ", "Regex")]
    steps.append(_replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(_replace(rf"{SPACE}+\z", "", "Regex"))
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps += [_replace(stand_in, unknown) for stand_in in stand_ins.values()]
    return steps + [_replace(character, stand_in) for character, stand_in in stand_ins.items()]


def _scored(model, stand_ins: dict[int, str]) -> list[tuple[str, float]]:
    """(piece, log-probability) of all pieces, those of texts with the stand-ins.

    A user-defined piece is always taken: by a score that SentencePiece (EncodeOptimized) gives it, too.
    """
    best = max(piece.score for piece in model.pieces if piece.type == _Type.NORMAL)
    scored = []
    for piece in model.pieces:
        content, score = piece.piece, piece.score
        if piece.type == _Type.USER_DEFINED:
            score = len(content.encode()) * best - 0.1
        if piece.type in _OF_TEXT:
            content = content.translate(stand_ins)
        scored.append((content, score))
    return scored
