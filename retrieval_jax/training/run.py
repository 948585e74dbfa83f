"""The parts of a training run: the model, its examples, the settings to compare, and the model's folder."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from retrieval_jax.checkpoints import hub, model_folder
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import TRAINING_SPLITS, Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.training_data import DataConfig, TrainDataset, check_table
from retrieval_jax.mesh import multihost
from retrieval_jax.models.encoder_decoder import EncoderDecoder
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.retriever import Retriever, objective_says
from retrieval_jax.training import settings_file
from retrieval_jax.training.families import family_of
from retrieval_jax.training.settings import TrainSettings


def make_model(
    retriever: type[Retriever], optimizer: Callable, vocab_size: int, table: DocidTable | None
) -> Retriever:
    """Makes a model, with the parameters of its class and of T5Config that gin configures.

    Args:
      retriever: the model's class.
      optimizer: makes the optax optimiser.
      vocab_size: the size of the text vocabulary.
      table: the docids that the model writes (a DocidTable, or a DocidShape for preflight); None if it writes
        none.

    Returns:
      The model, without parameters.

    Raises:
      UserError: it writes, and has no decoder.
    """
    config = T5Config(vocab_size, **(docid_softmax(table) if table else {}))
    if issubclass(retriever, EncoderDecoder) and not config.num_decoder_layers:
        raise UserError(f"T5Config.num_decoder_layers: 0: a {retriever.family} model writes with at least 1")
    return retriever(config, optimizer())


def train_dataset(
    config: DataConfig, work: Workspace, collection: Collection, model: Retriever, table: DocidTable | None
) -> TrainDataset:
    """Makes the examples of a collection for a model.

    Args:
      config: which examples.
      work: the collection's work folder.
      collection: the collection.
      model: the model, whose family chooses the targets, and whose prompts are read.
      table: the docids that the model writes; None if it writes none.

    Returns:
      The examples.

    Raises:
      UserError: the model's objective would learn nothing from them, or what is wrong.
    """
    target_type = family_of(type(model)).targets_for(config)
    examples = TrainDataset(config, work, collection, target_type, table=table, prompts=model.prompts)
    if model.optimizer_def:
        _check_candidates(model, examples)
    return examples


def _check_candidates(model: Retriever, examples: TrainDataset) -> None:
    """Raises UserError if a query's candidates and their scores are not what the model is to learn from."""
    config = examples.config
    if config.sets and not model.reads_sets:
        raise UserError(
            f"DataConfig.sets: {config.sets}, and this training of a {model.family} retriever reads no sets: "
            "leave SETS away, train @LexicalEncoder, or by --gin.GenerativeRetriever.objective=@joint_ranking"
        )
    distillation = getattr(getattr(model, "vector_loss", None), "distillation", None)
    for macro, name in (("NEGATIVES", config.mined), ("SCORES", config.scores)):
        if name and not config.negatives and not (macro == "SCORES" and distillation):
            learns = "as the model learns one docid a query: " if model.writes_docids else "as "
            log(f"{macro}={name}: not read, {learns}DataConfig.negatives is 0")
    if distillation and config.positives == 1 and not config.negatives:
        raise UserError(
            f"DataConfig.negatives: 0, and {type(model).__name__}.distillation compares a query's passages: "
            "set --gin.DataConfig.negatives=N, above 0"
        )
    if not objective_says(getattr(model, "objective", None), "reads_log_probs"):
        return
    if examples.table and examples.table.has_several:
        raise UserError(
            f"dpo: passages have several docids in docids/{examples.table.kind}, and a reference scores only "
            "the best of them: choose docids with one a passage"
        )
    scored_by = examples.scores and examples.scores.scored_by
    if scored_by and scored_by != {"kind": "generative", "score": "log_prob"}:
        told = ", ".join(scored_by.values())
        raise UserError(
            f"dpo: {examples.scores.folder} is of another searcher ({told}) than one that gives docids' "
            "log-probabilities: `retrieval-jax score` by the reference model's, of score='log_prob'"
        )


def docid_softmax(table: DocidTable) -> dict:
    """Gives the sizes of a T5 that writes docids.

    Args:
      table: the docids (a DocidTable, or a DocidShape for preflight).

    Returns:
      Arguments of T5Config: the width of the softmax, where it is not over texts, and whether the decoder
      embeds docid tokens, which it reads only if docids have several.
    """
    own = table.has_docid_vocab
    return {
        "output_size": table.output_size if own else None,
        "separate_target_embedding": own and table.length > 1,
    }


def run_settings(
    model: Retriever, examples: TrainDataset, settings: TrainSettings, parameters: Mapping[str, str]
) -> dict:
    """Gives the settings that change what a run learns, where model.json does not say so; see settings_file.

    Other random bits are as another seed. The parts of a batch change what is learned where examples
    interact, as with a dual encoder's negatives; other models learn the same from them but for rounding and
    dropout, and may need other parts on another machine.

    Args:
      model: the model.
      examples: the collection's examples.
      settings: of the run.
      parameters: gin parameters as text; see `settings_file.learning_settings`.

    Returns:
      name -> value.
    """
    data = dataclasses.asdict(examples.config)
    # By content, whatever their names are.
    inputs = {"synthetic": examples.synthetic, "mined": examples.mined, "scores": examples.scores}
    data |= {name: made.fingerprint if made else None for name, made in inputs.items()}
    data |= {"sets": examples.sets and examples.sets.fingerprint()}
    fingerprints = examples.collection.query_fingerprints
    return {
        "train.batch_size": settings.batch_size,
        "train.seed": settings.seed,
        "train.random_bits": settings.random_bits,
        **({"train.microbatches": settings.microbatches} if model.examples_interact else {}),
        **{f"queries.{split}": fingerprints.get(split) for split in TRAINING_SPLITS},
        **{f"DataConfig.{name}": value for name, value in data.items()},
        **settings_file.learning_settings(parameters, settings.steps),
    }


def check_inputs(
    folder: Path, retriever: type[Retriever], collection: Collection, table: DocidTable | None
) -> None:
    """Checks that the model's class, the docids and the collection belong together.

    Args:
      folder: the model's, for messages.
      retriever: the model's class.
      collection: the collection.
      table: the docids; None for none.

    Raises:
      UserError: they do not.
    """
    if retriever.writes_docids and table is None:
        raise UserError(f"{folder}: a {retriever.family} retriever needs docids: --DOCIDS=naive")
    if not retriever.writes_docids and table is not None:
        raise UserError(f"{folder}: a {retriever.family} writes no docids: --DOCIDS=None")
    if table:
        check_table(table, collection)


def prepare_folder(folder: Path, description: dict, collection: Collection) -> None:
    """Writes model.json and the vocabulary into a model's folder, unless it has weights already.

    Args:
      folder: the model's folder.
      description: see `model_folder.describe`.
      collection: the collection, whose vocabulary the model reads.

    Raises:
      UserError: the folder holds another model, or one that reads another vocabulary.
    """
    path = folder / model_folder.DESCRIPTION
    # Before the first checkpoint nothing was learned with what it says: it is replaced, by the first process.
    if path.exists() and (model_folder.is_model(folder) or not multihost.is_process_0()):
        there = storage.read_json(path, "delete the folder")
        for key, value in description.items():
            of_weights = key in ("initial_checkpoint", "averaged_with")
            if not (hub.same_name(there.get(key), value) if of_weights else there.get(key) == value):
                if key == "initial_checkpoint" and hub.is_hub_name(there[key]) and hub.is_hub_name(value):
                    raise UserError(
                        f"{path}: began with {there[key]}, and the hub now has {value}: go on with "
                        f"--INITIAL_CHECKPOINT={there[key]}, or name another MODEL_DIR"
                    )
                raise UserError(
                    f"{path}: {key} is {there.get(key)!r} there and {value!r} here: "
                    "another model was trained in this folder; name another MODEL_DIR, or delete it"
                )
        own = paths.ensure_local(folder / model_folder.VOCABULARY)
        if Vocabulary(own).checksum != Vocabulary(collection.vocabulary_path).checksum:
            raise UserError(
                f"{folder}: reads another vocabulary than {collection.vocabulary_path}: import with "
                f"--VOCABULARY={folder / model_folder.VOCABULARY}, or name another MODEL_DIR"
            )
        return
    if not paths.is_remote(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{folder}: cannot be a folder ({error.strerror}): name another one") from None
    paths.copy(collection.vocabulary_path, folder / model_folder.VOCABULARY)
    storage.write_json(path, description)
