"""The verb `convert`: weights of other programs become a model folder, to search with or to train on."""

import dataclasses
import math
from pathlib import Path

import gin

from retrieval_jax.checkpoints import hub, model_folder, tokenizer
from retrieval_jax.checkpoints.initial import InitialCheckpoint
from retrieval_jax.checkpoints.pretrained import Pretrained, fingerprint, open_pretrained
from retrieval_jax.checkpoints.weights import write_safetensors
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.training.run import docid_softmax

LENGTHS = {"input_length": 64, "passage_length": 256}  # tokens, where nothing says how many


@gin.configurable
def convert(
    source: str,
    checkpoint: str | None = None,
    work_dir: str | None = None,
    model_dir: str | None = None,
    retriever: type | None = None,
    docids: str | None = None,
    vocabulary: str | None = None,
    input_length: int | None = None,
    passage_length: int | None = None,
) -> dict:
    """Makes a model folder of weights of T5X's, Hugging Face's or sentence-transformers.

    Sizes are read off the weights. Nothing may be missing: to begin training with a part of some weights,
    give them to `train` by --gin.INITIAL_CHECKPOINT.

    Args:
      source: the collection whose docids a generative retriever writes.
      checkpoint: the weights (--INITIAL_CHECKPOINT): a path (also gs://…), or hf:ORG/NAME or
        hf:ORG/NAME@REVISION on the Hugging Face hub.
      work_dir: the collection's work folder; None is `work/NAME`.
      model_dir: the folder to make; None is models/ and the weights' own name in the work folder.
      retriever: what they are: @DualEncoder, @GenerativeRetriever or @QueryGenerator; None: a dual encoder,
        where there is no decoder.
      docids: kind of docids that they write (a generative retriever).
      vocabulary: the SentencePiece model, or hf:ORG/NAME; None: the one that lies with the weights.
      input_length: the maximal number of tokens of a query; None: as the weights' folder says, else 64.
      passage_length: the same for passages; None: as the weights' folder says, else 256.
    """
    if checkpoint is None:
        raise UserError("convert: no weights are named: --INITIAL_CHECKPOINT=path or hf:ORG/NAME")
    weights = hub.locate(checkpoint, "INITIAL_CHECKPOINT")
    pretrained = open_pretrained(weights.path)
    work = Workspace.for_source(source, work_dir)
    retriever = retriever or _retriever(pretrained)
    table = DocidTable.open(work.docids(docids)) if retriever.writes_docids else None
    pieces = hub.locate_vocabulary(vocabulary).path if vocabulary else pretrained.vocabulary
    check_vocabulary(pretrained, pieces)
    symbols = {} if vocabulary else dict(pretrained.symbols)
    if vocabulary is None and pretrained.format in ("Hugging Face", "sentence-transformers"):
        symbols = tokenizer.symbols(pieces)
    network = pretrained.network | (docid_softmax(table) if table else {})
    settings = pretrained.settings if retriever is DualEncoder else {}
    model = retriever(T5Config(**network), None, **settings)
    unused = ("decoder",) if retriever is DualEncoder else ()
    # The outputs are what the person says they are.
    pretrained = dataclasses.replace(pretrained, network=network)
    match = InitialCheckpoint(missing_ok=(), unexpected_ok=unused, resize_vocab=()).match(pretrained, model)
    if mismatch := match.mismatch(pretrained.path, trains=False):
        raise UserError(mismatch)

    known = pretrained.length
    lengths = {
        "input_length": input_length or known or LENGTHS["input_length"],
        "passage_length": passage_length or known or LENGTHS["passage_length"],
    }
    description = model_folder.describe(
        model,
        **lengths,
        collection_name=None,
        collection=table.collection if table else None,
        docids=docids if table else None,
        docids_fingerprint=table.fingerprint() if table else None,
        initial_checkpoint=weights.name,
        step=pretrained.step,
        **({"symbols": symbols} if symbols else {}),
    )

    def make(tmp: Path) -> dict:
        write_safetensors(tmp, model_folder.WEIGHTS, match.arrays)
        paths.copy(pieces, tmp / model_folder.VOCABULARY)
        storage.write_json(tmp / model_folder.DESCRIPTION, description)
        return {"parameters": sum(math.prod(array.shape) for array in match.arrays.values())}

    folder = paths.as_path(model_dir) if model_dir else work.model(weights.label)
    recipe = {
        "checkpoint": weights.name if weights.commit else str(paths.absolute(weights.path)),
        "fingerprint": weights.commit or fingerprint(pretrained),
        "vocabulary": Vocabulary(pieces).checksum,
    }
    made = storage.build_once(folder, recipe | description, make)
    return {
        "model": str(folder),
        "format": pretrained.format,
        "retriever": retriever.__name__,
        "parameters": made["parameters"],
        "not used": len(match.unused),
    }


def _retriever(pretrained: Pretrained) -> type:
    if pretrained.network["num_decoder_layers"]:
        raise UserError(
            f"{pretrained.path}: has a decoder: say what it is by --gin.convert.retriever=@QueryGenerator, "
            "@GenerativeRetriever or (the encoder alone) @DualEncoder"
        )
    return DualEncoder


def check_vocabulary(pretrained: Pretrained, pieces: Path | None) -> None:
    """Raises UserError where there is no vocabulary, or one that is not of the embedding's rows."""
    if pieces is None:
        raise UserError(f"{pretrained.path}: no vocabulary lies with it: --VOCABULARY=…/sentencepiece.model")
    if mismatch := tokenizer.difference(pretrained.path, pretrained.vocabulary, pieces):
        raise UserError(f"VOCABULARY: {pieces} {mismatch}: leave it out, to take the weights' own")
    count, rows = Vocabulary(pieces).model.vocab_size(), pretrained.network["vocab_size"]
    if count > rows:
        raise UserError(
            f"{pieces}: has {count} pieces, and the weights' embedding {rows} rows: name their own VOCABULARY"
        )
