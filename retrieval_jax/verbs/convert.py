"""The verb `convert`: weights of other programs become a model folder, to search with or to train on."""

import gin

from retrieval_jax.checkpoints import hub, model_folder
from retrieval_jax.checkpoints.conversion import convert_weights
from retrieval_jax.checkpoints.pretrained import Pretrained, fingerprint, open_pretrained
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.retriever import Retriever
from retrieval_jax.training.run import docid_softmax

INPUT_LENGTH, PASSAGE_LENGTH = 64, 256  # tokens, where nothing says how many


@gin.configurable
def convert(
    source: str,
    checkpoint: str | None = None,
    work_dir: str | None = None,
    model_dir: str | None = None,
    retriever: type[Retriever] | None = None,
    docids: str | None = None,
    vocabulary: str | None = None,
    input_length: int | None = None,
    passage_length: int | None = None,
) -> dict:
    """Turns weights of T5X, Hugging Face or sentence-transformers into a model folder.

    Sizes are read from the weights. Nothing may be missing: to begin training with only a part of them, name
    them to `train` by --INITIAL_CHECKPOINT.

    Args:
      source: the collection whose docids a generative retriever writes.
      checkpoint: the weights (--INITIAL_CHECKPOINT): a path (also gs://…), or hf:ORG/NAME or
        hf:ORG/NAME@REVISION on the Hugging Face hub.
      work_dir: the collection's work folder; None is `work/NAME`.
      model_dir: the folder to make; None is models/ and the weights' own name in the work folder.
      retriever: the class of the model: @DualEncoder, @GenerativeRetriever or @QueryGenerator; None: a dual
        encoder, if there is no decoder.
      docids: the kind of docids that the weights write (a generative retriever).
      vocabulary: the SentencePiece model, or hf:ORG/NAME; None: the one beside the weights.
      input_length: the maximal number of tokens of a query; None: as the weights' folder says, else 64.
      passage_length: the same for passages; None: as the weights' folder says, else 256.

    Returns:
      The model's folder, the format of the weights, the class and size of the model, and how many arrays of
      the weights are not used.

    Raises:
      UserError: no weights are named, or they have a decoder and no `retriever` says what it is.
    """
    if checkpoint is None:
        raise UserError("convert: no weights are named: --INITIAL_CHECKPOINT=path or hf:ORG/NAME")
    weights = hub.locate(checkpoint, "INITIAL_CHECKPOINT")
    pretrained = open_pretrained(weights.path)
    work = Workspace.for_source(source, work_dir)
    retriever = retriever or _retriever(pretrained)
    table = DocidTable.open(work.docids(docids)) if retriever.writes_docids else None
    pieces = hub.locate_vocabulary(vocabulary).path if vocabulary else None
    converted = convert_weights(pretrained, retriever, pieces, docid_softmax(table) if table else None)
    description = model_folder.describe(
        converted.model,
        input_length=input_length or pretrained.length or INPUT_LENGTH,
        passage_length=passage_length or pretrained.passage_length or pretrained.length or PASSAGE_LENGTH,
        collection_name=None,
        collection=table.collection if table else None,
        docids=docids if table else None,
        docids_fingerprint=table.fingerprint() if table else None,
        initial_checkpoint=weights.name,
        step=pretrained.step,
        **({"symbols": converted.symbols} if converted.symbols else {}),
    )
    recipe = {
        "checkpoint": weights.name if weights.commit else str(paths.absolute(weights.path)),
        "fingerprint": weights.commit or fingerprint(pretrained),
        "vocabulary": Vocabulary(converted.vocabulary).checksum,
    }
    folder = paths.as_path(model_dir) if model_dir else work.model(weights.label)
    made = storage.build_once(folder, recipe | description, lambda tmp: converted.write(tmp, description))
    return {
        "model": str(folder),
        "format": pretrained.format,
        "retriever": retriever.__name__,
        "parameters": made["parameters"],
        "not used": len(converted.unused),
    }


def _retriever(pretrained: Pretrained) -> type[Retriever]:
    if pretrained.network["num_decoder_layers"]:
        raise UserError(
            f"{pretrained.path}: has a decoder: say what it is by --gin.convert.retriever=@QueryGenerator, "
            "@GenerativeRetriever or (the encoder alone) @DualEncoder"
        )
    return DualEncoder
