"""Building a searcher's folder: the choice of its kind, its recipe and what every kind has in common."""

import dataclasses
from pathlib import Path

from retrieval_jax.checkpoints.model_folder import RETRIEVERS, LoadedModel, model_recipe, read_description
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.mesh import multihost
from retrieval_jax.search.index_inputs import IndexInputs, IndexSettings
from retrieval_jax.search.searcher import Searcher, searcher_class, searcher_kinds

DEFAULT_KIND = "bm25"  # without a model


def choose_searcher(kind: str | None, model_dir: str | Path | None) -> type[Searcher]:
    """Returns the class of the searcher to build. The model's weights are not read.

    Args:
      kind: the kind that was asked for; None for the default of the model's family.
      model_dir: the model's folder; None without a model.

    Raises:
      UserError: there is no such kind, or it does not search with such a model.
    """
    family = None
    if model_dir is not None:
        family = RETRIEVERS[read_description(paths.as_path(model_dir))["retriever"]].family
    if kind is None:
        kind = DEFAULT_KIND if family is None else _default_kind(family, model_dir)
    try:
        searcher = searcher_class(kind)
    except UserError as error:
        raise UserError(f"make_index.kind: {error}") from None
    if family not in (searcher.model_family, *searcher.other_model_families):
        if family is None:
            raise UserError(f"MODEL_DIR: the searcher {kind} needs a model: --MODEL_DIR=work/…")
        if searcher.model_family is None:
            raise UserError(f"MODEL_DIR: the searcher {kind} has no model: --MODEL_DIR=None")
        raise UserError(f"{model_dir}: holds a {family} model, not one for the searcher {kind}")
    return searcher


def _default_kind(family: str, model_dir: str | Path) -> str:
    """Returns the first kind that searches with models of a family and whose packages are installed."""
    kinds = searcher_kinds(family)
    kind = next((known for known in kinds if searcher_class(known).is_installed()), None)
    if kind is None:
        raise UserError(f"{model_dir}: holds a {family}, which finds no passages: name a retriever's folder")
    if kind != kinds[0]:
        log(f"{kinds[0]}: not installed: the searcher is of the kind {kind}")
    return kind


def default_name(searcher: type[Searcher], model: LoadedModel | None, settings: IndexSettings) -> str:
    """Returns a searcher's name where the user gives none.

    It is the kind of docids that the model writes, if it writes docids (and the kind of the searcher, if that
    is not the one that such models have by default); otherwise it is the kind of the searcher, followed by
    the name of the expansion if there is one.
    """
    docids = model.description["docids"] if model else None
    if docids and searcher.kind != searcher_kinds(model.model.family)[0]:
        return f"{docids}_{searcher.kind}"
    return docids or "_".join(filter(None, (searcher.kind, settings.expansion)))


def build_searcher(searcher: type[Searcher], inputs: IndexInputs) -> dict:
    """Builds a searcher in `inputs.folder`, unless that folder holds one of the same recipe.

    All processes of a run must call this. Together they encode the passages, where the searcher reads
    embeddings, and do what else the searcher's `prepare` shares out; the first process writes the folder.

    Args:
      searcher: the class, from `choose_searcher`.
      inputs: what to build it from, without `embeddings`.

    Returns:
      The folder's manifest.

    Raises:
      UserError: the inputs do not fit each other, or the folder cannot be written.
    """
    own = searcher.recipe(inputs)
    recipe = {"kind": searcher.kind, **inputs.collection.recipe(), **own}
    facts = {"kind": searcher.kind, "family": searcher.family, "parameters": None, **own}
    if inputs.expansion:
        recipe["expansion"] = inputs.expansion.fingerprint
    if inputs.model:
        recipe |= model_recipe(inputs.model_dir, inputs.model.step, inputs.model.description)
        # Paths in a manifest are relative to where its folder will lie.
        model = paths.relative(inputs.model_dir, inputs.folder)
        facts |= {"parameters": inputs.model.parameter_count, "model": model, "step": inputs.model.step}
    if multihost.broadcast_from_process_0(storage.is_up_to_date(inputs.folder, recipe)):
        multihost.on_process_0(lambda: searcher.tidy(inputs, recipe))
    else:
        if searcher.reads_embeddings:
            inputs = dataclasses.replace(inputs, embeddings=searcher.make_embeddings(inputs))

        with searcher.prepare(inputs, recipe) as prepared:
            inputs = dataclasses.replace(inputs, prepared=prepared)

            def write(folder: Path) -> dict:
                return facts | (searcher.write(folder, inputs) or {})

            multihost.on_process_0(lambda: storage.build_once(inputs.folder, recipe, write))
    return storage.read_manifest(inputs.folder, "index")
