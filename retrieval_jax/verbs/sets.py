"""The verb `sets`: for each passage the tokens of the text vocabulary that stand for it best."""

from pathlib import Path

import gin

from retrieval_jax.checkpoints.model_folder import load_model, model_recipe, read_description_and_step
from retrieval_jax.core import paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import NonNegative, Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.vocabulary import Vocabulary
from retrieval_jax.docids import encoded_sets, term_weights, token_sets
from retrieval_jax.mesh import multihost
from retrieval_jax.mesh.partitioning import make_partitioner
from retrieval_jax.models.lexical_encoder import LexicalEncoder

SUMMARY_KEYS = ("passages", "m", "impacts", "bytes_per_passage")  # of the manifest


@gin.configurable
def make_sets(
    source: str,
    work_dir: str | None = None,
    weights: str = "bm25",
    name: str | None = None,
    m: Positive = 64,
    impacts: bool = True,
    step: NonNegative | None = None,
    force: bool = False,
) -> dict:
    """Makes sets/NAME: the tokens of highest weight of each passage, for lexical search and for planning.

    Sets of an earlier state of the collection are replaced; a model encodes new and changed passages alone.

    Args:
      source: the collection, as `import` takes it.
      work_dir: its work folder; None is `work/NAME`.
      weights: what weighs the tokens: "bm25", "tf_idf", or the folder of a lexical encoder (of
        runs/lexical.gin).
      name: the name of the sets (--SETS); None for that of the weights, or of the model's folder.
      m: the most tokens of a passage.
      impacts: whether a token has an impact, a byte that says how much it counts in its passage (a third of
        the memory); without, a passage's score is the sum of the query's weights of its tokens, as in PAG.
      step: which of the model's checkpoints (--MODEL_STEP); None is the newest.
      force: whether to replace sets that a model of the work folder was trained with.

    Returns:
      The folder of the sets, and facts of its manifest.

    Raises:
      UserError: the weights are neither counted ones nor a lexical encoder's folder, or a model was trained
        with the sets that others would replace.
    """
    work = Workspace.for_source(source, work_dir)
    collection = Collection(work.collection)
    recipe = {"version": token_sets.VERSION, "collection": collection.fingerprint, "m": m, "impacts": impacts}
    counted = weights in term_weights.PARTS
    if counted:
        recipe |= {"weights": weights, "vocabulary": Vocabulary(collection.vocabulary_path).checksum}
    else:
        recipe |= model_recipe(weights, *reversed(_description_and_step(weights, step)))
    folder = work.sets(name or paths.absolute(weights).name)
    up_to_date = multihost.broadcast_from_process_0(storage.is_up_to_date(folder, recipe))
    if not up_to_date and not force:
        multihost.on_process_0(lambda: check_unused(folder, work))
    if up_to_date:
        pass
    elif counted:
        make = lambda tmp: term_weights.write_sets(tmp, collection, weights, m, impacts)  # noqa: E731
        multihost.on_process_0(lambda: storage.build_once(folder, recipe, make))
    else:
        mesh, rules = make_partitioner().local  # each host encodes its share
        opened = load_model(weights, step, mesh, rules)
        encoded = encoded_sets.encode_sets(weights, opened, mesh, work, collection, m)
        make = lambda tmp: encoded_sets.write_encoded_sets(tmp, encoded, opened, impacts)  # noqa: E731
        multihost.on_process_0(lambda: storage.build_once(folder, recipe, make))
    manifest = storage.read_manifest(folder, "sets")
    return {"sets": str(folder), **{key: manifest[key] for key in SUMMARY_KEYS}}


def _description_and_step(model_dir: str, step: int | None) -> tuple[dict, int]:
    """Reads a lexical encoder's model.json, and finds its step. Raises UserError where it is none."""
    names = " or ".join(map(repr, term_weights.PARTS))
    if not paths.as_path(model_dir).is_dir():
        raise UserError(f"make_sets.weights: no folder {model_dir}: name a lexical encoder's, or {names}")
    description, step = read_description_and_step(paths.as_path(model_dir), step)
    if description["retriever"] != LexicalEncoder.__name__:
        raise UserError(
            f"make_sets.weights: {model_dir} holds a {description['retriever']}: name a lexical encoder's "
            f"folder (runs/lexical.gin), or {names}"
        )
    return description, step


def check_unused(folder: Path, work: Workspace) -> None:
    """Raises UserError where a model of the work folder was trained with the sets in a folder."""
    if not storage.finished(folder):
        return
    fingerprint = storage.read_manifest(folder, "sets")["fingerprint"]
    for path in sorted((work.folder / "models").glob("*/settings.json")):
        if storage.read_json(path, "delete the model's folder").get(token_sets.LEARNED) == fingerprint:
            raise UserError(
                f"{folder}: {path.parent} was trained with these sets, and others would replace them: give "
                "them another name (--SETS=NAME), or replace them all the same: --gin.make_sets.force=True"
            )
