"""The model card of an exported folder: README.md with the YAML header that the Hugging Face hub reads.

It says what the model is, how it was trained, what was measured and how it is loaded, as far as the model's
folder and the reports tell. People may edit it: it does not count among the files that the manifest seals.
An export that makes the folder again writes it again.
"""

from collections.abc import Mapping
from pathlib import Path

from retrieval_jax.checkpoints.hub import SCHEME
from retrieval_jax.checkpoints.learning_curve import POOL_DIGEST, curve_points, split_dev_metrics
from retrieval_jax.core import paths

CARD = "README.md"
ABOUT = {
    "GenerativeRetriever": "A generative retriever: a T5 that reads a query and writes the docid of a "
    "passage that answers it. Search is constrained, so that only docids of the collection can be written.",
    "DualEncoder": "A dual encoder: a T5 encoder that turns queries and passages into vectors. The dot "
    "product of a query's and a passage's vector is the passage's score.",
    "QueryGenerator": "A query generator: a T5 that reads a passage and writes a query that it answers.",
    "bm25": "A BM25 index: passages are scored by the words that they share with a query.",
    "fused": "A searcher made of others, which are in the folder parts: their results are fused.",
}
TAGS = {
    "GenerativeRetriever": "generative-retrieval",
    "DualEncoder": "dense-retrieval",
    "QueryGenerator": "query-generation",
    "bm25": "bm25",
}
LIBRARIES = {
    "searcher": "retrieval_jax",
    "huggingface": "transformers",
    "sentence_transformers": "sentence-transformers",
    "t5x": "t5x",
    "stablehlo": "jax",
    "parquet": "pyarrow",
}
_QUERY = "smooth a noisy signal"


def write(
    folder: Path, name: str, format: str, description: Mapping, facts: Mapping, metrics: Mapping[str, Mapping]
) -> None:
    """Writes the card into an exported folder.

    Args:
      folder: the exported folder, with all other files in it.
      name: the model's or the searcher's name, the card's title.
      format: the export's format, one of LIBRARIES.
      description: what model.json says; empty where there is no model.
      facts: what the searcher's manifest says, and `step` of the model, where there is one.
      metrics: split -> {metric: value}.
    """
    kind = description.get("retriever") or facts.get("kind", "")
    parts = [
        _header(kind, format, description),
        f"# {name}",
        ABOUT.get(kind, f"A {kind} of retrieval_jax."),
        _table(("", ""), _training(description, facts)),
        *([f"## Metrics\n\n{_metrics(metrics)}"] if any(metrics.values()) else []),
        f"## How to load it\n\n{_loading(folder, format, kind, description)}",
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n")


def dev_metrics(model_dir: Path, step: int | None) -> dict[str, dict[str, float]]:
    """Reads the dev metrics of a model's checkpoint from its learning curve.

    Args:
      model_dir: the model's folder.
      step: the checkpoint's.

    Returns:
      What was searched for them -> {metric: value}; {} where the checkpoint was not evaluated.
    """
    found = [dev for p in curve_points(model_dir) if p.get("step") == step if (dev := split_dev_metrics(p))]
    if not found:
        return {}
    _, metrics = found[-1]
    pool, _ = metrics.pop("passages", None), metrics.pop(POOL_DIGEST, None)
    return {"dev" if pool is None else f"dev, in a pool of {int(pool):,} passages": metrics}


def _header(kind: str, format: str, description: Mapping) -> str:
    lines = [f"library_name: {LIBRARIES[format]}"]
    initial = str(description.get("initial_checkpoint") or "")
    if initial.startswith(SCHEME):
        lines.append(f"base_model: {initial.removeprefix(SCHEME).partition('@')[0]}")
    if format == "sentence_transformers":
        lines.append("pipeline_tag: sentence-similarity")
    tags = ["retrieval_jax", "information-retrieval", *([TAGS[kind]] if kind in TAGS else [])]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _training(description: Mapping, facts: Mapping) -> dict[str, object]:
    """What is known of how the model was made."""
    network = description.get("network", {})
    layers = (network.get("num_encoder_layers"), network.get("num_decoder_layers"))
    texts = {"queries": description.get("input_length"), "passages": description.get("passage_length")}
    known = {
        "collection": description.get("collection_name"),
        "collection's fingerprint": description.get("collection") or facts.get("collection"),
        "docids": description.get("docids"),
        "training steps": facts.get("step"),
        "initial weights": _public(description.get("initial_checkpoint")) if description else None,
        "network": network
        and f"T5, width {network['emb_dim']}, {layers[0]} encoder and {layers[1]} decoder layers",
        "tokens at most": ", ".join(f"{length} of {what}" for what, length in texts.items() if length),
        "searched by": facts.get("kind"),
        "parts": ", ".join(part["name"] for part in facts.get("parts", ())),
    }
    return {key: value for key, value in known.items() if value not in (None, "", {})}


def _public(initial: str | None) -> str:
    """The name of initial weights that others can make use of: of a path on this machine its last part."""
    if initial is None or initial.startswith((SCHEME, "gs://")):
        return initial or "random"
    return paths.absolute(initial).name


def _metrics(metrics: Mapping[str, Mapping]) -> str:
    """A row for each metric, a column for each split on which something was measured."""
    splits = [split for split, found in metrics.items() if found]
    names = dict.fromkeys(name for split in splits for name in metrics[split])
    rows = {
        name: " | ".join(f"{metrics[split][name]:.3f}" if name in metrics[split] else "" for split in splits)
        for name in names
    }
    return _table(("metric", *splits), rows)


def _table(head: tuple[str, ...], rows: Mapping[str, object]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])


def _loading(folder: Path, format: str, kind: str, description: Mapping) -> str:
    """Code that runs where the folder is the working directory, and what must be installed for it."""
    code, needs = {
        "searcher": _searcher,
        "huggingface": _hugging_face,
        "sentence_transformers": _sentence_transformers,
        "t5x": _t5x,
        "stablehlo": _stablehlo,
        "parquet": _parquet,
    }[format](folder, kind, description)
    loading = f"In this folder, with {needs}:\n\n```python\n{code}\n```"
    return f"{loading}\n\n{_pgvector(description)}" if format == "parquet" else loading


def _searcher(*_) -> tuple[str, str]:
    code = f"""\
from retrieval_jax.search.searcher import Searcher

searcher = Searcher.open(".")
for passage_id, score in searcher.search(["{_QUERY}"], k=10)[0]:
    print(passage_id, score)"""
    return code, "retrieval_jax installed"


def _hugging_face(folder: Path, kind: str, _) -> tuple[str, str]:
    code = f"""\
from transformers import AutoTokenizer, T5ForConditionalGeneration

tokenizer = AutoTokenizer.from_pretrained(".")
model = T5ForConditionalGeneration.from_pretrained(".")
inputs = tokenizer(["{_QUERY}"], return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=16)"""
    if kind == "GenerativeRetriever":
        code += "\nprint(outputs)  # tokens of a docid, which need not be a real one: nothing constrains them"
    else:
        code += "\nprint(tokenizer.batch_decode(outputs, skip_special_tokens=True))"
    return code, "transformers and torch installed"


def _sentence_transformers(folder: Path, _, description: Mapping) -> tuple[str, str]:
    separate = (folder / "queries").is_dir()
    sides = ("queries", "passages") if separate else (".", ".")
    code = f"""\
from sentence_transformers import SentenceTransformer

{_shortening(description)}queries = SentenceTransformer("{sides[0]}").encode_query(["{_QUERY}"])
passages = SentenceTransformer("{sides[1]}").encode_document(["a filter", "a kettle"])
print(queries @ passages.T)"""
    return code, "sentence-transformers (5 or later) installed"


def _shortening(description: Mapping) -> str:
    """A comment about the sizes of shorter vectors that a model was trained for; "" where there are none."""
    settings = description.get("settings", {})
    sizes = settings.get("matryoshka")
    if not sizes:
        return ""
    again = ", normalize_embeddings=True" if settings["normalize"] else ""
    either = " or ".join(map(str, sizes))
    return (
        f"# Their first {either} dimensions can be used alone: encode_…(…, truncate_dim={sizes[0]}{again})\n"
    )


def _t5x(folder: Path, *_) -> tuple[str, str]:
    (checkpoint,) = (path.name for path in folder.glob("checkpoint_*"))
    code = f"""\
from retrieval_jax.checkpoints.pretrained import open_pretrained

for name, array in open_pretrained("{checkpoint}").arrays.items():
    print(name, array.shape)"""
    return code, f"retrieval_jax installed; T5X's gin takes {checkpoint} as INITIAL_CHECKPOINT_PATH"


def _parquet(*_) -> tuple[str, str]:
    code = """\
import glob

import pyarrow.dataset

passages = pyarrow.dataset.dataset(sorted(glob.glob("*.parquet")))
print(passages.schema, passages.count_rows())"""
    return code, "pyarrow installed"


def _pgvector(description: Mapping) -> str:
    """How PostgreSQL's extension pgvector loads the vectors."""
    dimensions = description["settings"]["vector_dim"]
    return f"""\
Into PostgreSQL with pgvector (psycopg 3 finds the server by PGHOST, PGDATABASE and so on):

```sql
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE passages (id text PRIMARY KEY, title text, text text, vector vector({dimensions}));
```

```python
import psycopg

with psycopg.connect() as db, db.cursor().copy("COPY passages (id, title, text, vector) FROM STDIN") as copy:
    for row in (row for batch in passages.to_batches(batch_size=1024) for row in batch.to_pylist()):
        texts = (row[name].replace("\\0", "") for name in ("id", "title", "text"))  # PostgreSQL refuses NUL
        copy.write_row((*texts, str(row["vector"])))
```

`SELECT id FROM passages ORDER BY vector <#> '[…]' LIMIT 10` then finds the passages with the largest dot
products with a query's vector; `CREATE INDEX ON passages USING hnsw (vector vector_ip_ops)` makes it fast."""


def _stablehlo(folder: Path, _, description: Mapping) -> tuple[str, str]:
    if (folder / "search.stablehlo").is_file():
        program, arrays = "search", 'load_file("weights.safetensors"), load_file("docids.safetensors")'
        results = "rows, scores"
    else:
        program, arrays, results = "encode_queries", 'load_file("weights.safetensors")', "vectors"
    length, prompt = description["input_length"], description["settings"].get("query_prompt")
    query = f'{prompt!r} + "{_QUERY}"' if prompt else f'"{_QUERY}"'
    code = f"""\
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file
from sentencepiece import SentencePieceProcessor

program = jax.export.deserialize(bytearray(Path("{program}.stablehlo").read_bytes()))
tokens = SentencePieceProcessor(model_file="sentencepiece.model").encode({query})[:{length - 1}]
tokens_BxS = np.zeros((1, {length}), np.int32)
tokens_BxS[0, : len(tokens) + 1] = [*tokens, 1]  # 1 ends a text, and 0 follows it
{results} = program.call({arrays}, tokens_BxS)
print({results})"""
    return code, "jax, safetensors and sentencepiece installed"
