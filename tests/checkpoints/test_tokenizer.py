"""The exported tokenizer gives SentencePiece's tokens, also of texts that hold the names of its symbols."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_folders import GOLDENS

from retrieval_jax.checkpoints import tokenizer
from retrieval_jax.checkpoints.model_folder import load_model
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.vocabulary import EOS, PAD_SYMBOL, Vocabulary
from retrieval_jax.embeddings.text_encoder import query_encoder
from retrieval_jax.verbs.convert import convert
from retrieval_jax.verbs.export import export

SYMBOLS = ["</s>", "<pad>", "<unk>", "<s>", "<extra_id_3>", "<extra_id_99>", "<", ">", "/s>", "pad"]
OTHERS = [
    *(
        " ",
        "  ",
        "\n",
        "\t",
        "\u00a0",
        "\u2028",
        "\u200b",
        "\ufeff",
        "\x00",
        "\x07",
        "▁",
        "\ue000",
        "０＜",
        "ﬁ",
    ),
    *(
        "The",
        "docid",
        "passage",
        "s",
        "ß",
        "é",
        "e\u0301",
        "İ",
        "😀",
        "👩‍👩‍👧",
        "漢字",
        "ก็",
        "한국",
        "12,345",
    ),
]
TEXTS = st.lists(st.sampled_from(SYMBOLS + OTHERS) | st.text(max_size=3), max_size=6).map("".join)
EXAMPLES = [
    "",
    " ",
    "a </s> docid",
    "<pad>",
    "names<extra_id_3>",
    "</s>passages</s>",
    "a  <unk> <\n>",
    "▁ a▁",
]
PIECES = [Path(__file__).parents[1] / "data/library/sentencepiece.model", GOLDENS / "gtr/spiece.model"]


@pytest.fixture(scope="module", params=PIECES, ids=["learned", "identity"])
def written(request, tmp_path_factory) -> tuple[Vocabulary, Path]:
    """(a vocabulary, the folder of the tokenizer that was written for it)."""
    folder, vocabulary = tmp_path_factory.mktemp("tokenizer"), Vocabulary(request.param)
    tokenizer.write(folder, vocabulary, 1000)
    return vocabulary, folder


@pytest.mark.parametrize(
    "word", ["E\u0301cole", "U\u0308ber", "\u1112\u1161\u11ab\u1100\u116e\u11a8", "e\u0301t"]
)
def test_letters_with_their_accents_apart_are_read_as_composed_ones(written, word):
    library = pytest.importorskip("tokenizers", reason="needs tokenizers")
    vocabulary, folder = written
    theirs = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert theirs.encode(word).ids == [*vocabulary.encode(word), EOS]


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_tokenizers_gives_the_same_tokens(written, text):
    library = pytest.importorskip("tokenizers", reason="needs tokenizers")
    vocabulary, folder = written
    theirs = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert theirs.encode(text).ids == [*vocabulary.encode(text), EOS]


def test_auto_tokenizer_gives_the_same_tokens(written):
    library = pytest.importorskip("transformers", reason="needs transformers")
    vocabulary, folder = written
    (folder / "config.json").write_text((GOLDENS / "gtr/config.json").read_text())
    theirs = library.AutoTokenizer.from_pretrained(str(folder))
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    assert theirs.convert_tokens_to_ids("<extra_id_0>") == vocabulary.model.vocab_size() + 99
    for text in EXAMPLES:
        found = theirs(text)
        assert found["input_ids"] == [*vocabulary.encode(text), EOS]
        assert set(found) == {"input_ids", "attention_mask"}
    found = theirs(EXAMPLES, max_length=4, truncation=True, padding="max_length")["input_ids"]
    assert found == vocabulary.batch(EXAMPLES, 4).tolist()
    tokens = vocabulary.encode("a docid names passages")
    assert theirs.decode([*tokens, EOS, 0], skip_special_tokens=True) == vocabulary.model.decode(tokens)


@given(text=TEXTS)
@settings(deadline=None, max_examples=100)
def test_the_file_alone_gives_the_same_tokens(tmp_path_factory, text):
    """Read by a few lines of Python: normalisation by replacement, then the best path through the pieces."""
    vocabulary = Vocabulary(GOLDENS / "gtr/spiece.model")
    folder = tmp_path_factory.getbasetemp() / "identity"
    if not folder.exists():
        folder.mkdir()
        tokenizer.write(folder, vocabulary, None)
    assert _encode(json.loads((folder / "tokenizer.json").read_text()), text) == vocabulary.encode(text)


def _encode(described: dict, text: str) -> list[int]:
    for step in described["normalizer"]["normalizers"]:
        if step["type"] == "Prepend":
            text = text and step["prepend"] + text
        elif "String" in step["pattern"]:
            text = text.replace(step["pattern"]["String"], step["content"])
        else:
            text = re.sub(step["pattern"]["Regex"].replace(r"\z", r"\Z"), step["content"], text)
    ids = {piece: i for i, (piece, _) in enumerate(described["model"]["vocab"])}
    scores = [score for _, score in described["model"]["vocab"]]
    longest, unknown = max(map(len, ids)), described["model"]["unk_id"]
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for end in range(1, len(text) + 1):
        paths = []
        for start in range(max(end - longest, 0), end):
            score, path = best[start]
            if (number := ids.get(text[start:end])) is not None:
                paths.append((score + scores[number], [*path, number]))
            elif start == end - 1:
                fused = path if path[-1:] == [unknown] else [*path, unknown]
                paths.append((score + min(scores) - 10, fused))
        best.append(max(paths, key=lambda path: path[0]))
    return best[-1][1]


def test_symbols_in_texts_are_symbols_for_a_model_that_came_with_them(tmp_path):
    vocabulary = Vocabulary(GOLDENS / "gtr/spiece.model", tokenizer.symbols(GOLDENS / "gtr/spiece.model"))
    text = vocabulary.model.encode
    found = vocabulary.encode("a </s> docid<pad>names<extra_id_3><unk>")
    assert found == [*text("a"), 1, *text("docid"), PAD_SYMBOL, *text("names"), 48 + 96, 2]
    batch = vocabulary.with_prompt("</s>a ").batch(["<pad>", "", "a"], 5)
    assert batch.tolist() == [[1, 6, PAD_SYMBOL, EOS, 0], [1, 6, EOS, 0, 0], [1, 6, 6, EOS, 0]]
    tokenizer.write(tmp_path, vocabulary, 12)
    assert tokenizer.symbols(tmp_path / "spiece.model") == vocabulary.symbols
    tokenizer.write(tmp_path, Vocabulary(vocabulary.path), 12)
    assert tokenizer.symbols(tmp_path / "spiece.model") == {}


def test_a_converted_model_gives_the_vectors_of_texts_with_symbols(tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    model, output = str(tmp_path / "model"), str(tmp_path / "out")
    convert("unused", str(GOLDENS / "gtr"), model_dir=model)
    export("unused", model_dir=model, format="sentence_transformers", output=output)
    # transformers makes spaces of line ends and ▁, which the pieces here (without normalisation) do not.
    texts = [text.replace("\n", " ") for text in EXAMPLES if "▁" not in text]
    found = query_encoder(load_model(model))(texts)
    for folder in (str(GOLDENS / "gtr"), output):
        expected = library.SentenceTransformer(folder).encode_query(texts)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_tokens_that_were_added_to_imported_pieces_are_refused(tmp_path):
    folder = tmp_path / "gtr"
    shutil.copytree(GOLDENS / "gtr", folder)
    added = {"added_tokens.json": {"<emb>": 148}}
    added["tokenizer_config.json"] = {"added_tokens_decoder": {"148": {"content": "<emb>"}}}
    added["tokenizer.json"] = {"added_tokens": [{"id": 148, "content": "<emb>"}]}
    for name, content in added.items():
        shutil.rmtree(folder)
        shutil.copytree(GOLDENS / "gtr", folder)
        there = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(there | content))
        with pytest.raises(UserError, match=f"{name}: adds '<emb>' to the pieces of spiece.model"):
            convert("unused", str(folder), model_dir=str(tmp_path / "refused"))
        pieces = str(folder / "spiece.model")
        convert("unused", str(folder), model_dir=str(tmp_path / f"named_{name}"), vocabulary=pieces)


def test_pieces_that_are_no_unigram_model_are_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a docid names a passage"] * 9), model_prefix=str(tmp_path / "bpe"),
        vocab_size=25, model_type="bpe", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"bpe\.model: not a unigram model"):
        tokenizer.write(tmp_path, Vocabulary(tmp_path / "bpe.model"), None)
