"""Names of the Hugging Face hub: `hf:ORG/NAME` or `hf:ORG/NAME@REVISION` becomes a folder on this machine.

The verbs call `locate` on the values of INITIAL_CHECKPOINT, VOCABULARY and EMBEDDINGS before anything opens
them. The library huggingface_hub does the rest, so its cache (HF_HOME, HF_HUB_CACHE), its server
(HF_ENDPOINT), the token (HF_TOKEN or `hf auth login`) and HF_HUB_OFFLINE work as everywhere else.

The hub is asked for the commit of the revision each time, and recipes record that commit: a branch that has
moved gives another recipe, never stale results. Only files that are read here are downloaded.
"""

import contextlib
import dataclasses
import glob
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from retrieval_jax.checkpoints.hugging_face import FLAX
from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError, first_line
from retrieval_jax.core.progress import log

SCHEME = "hf:"
_NAME = re.compile(r"hf:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>\S+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# At the top of a repository, or in the folder of a sentence-transformers module, such as 1_Pooling/.
_MODULE = r"(?:\d+_\w+/)?"
_PIECES = re.compile(rf"{_MODULE}(?:spiece|sentencepiece)\.model")
_DESCRIPTIONS = re.compile(
    rf"{_MODULE}(?:model|modules|config|sentence_bert_config|config_sentence_transformers"
    r"|tokenizer|tokenizer_config|added_tokens)\.json"
)
_WEIGHTS = re.compile(rf"{_MODULE}(?:model|weights)(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?")
_IN_PARTS = re.compile(r"-\d+-of-\d+\.safetensors|\.index\.json")
_PICKLES = re.compile(r".*\.(?:bin|pt|pth|ckpt)")


_Needed = Callable[[Sequence[str], str], list[str]]
"""(Names of a repository's files, the setting and its value for errors) -> the files to download."""


@dataclasses.dataclass(frozen=True)
class Located:
    """Where something that was named lies.

    Attributes:
      path: the file or folder, on a disk or in a bucket.
      name: the name for recipes and manifests: of the hub with the commit, `hf:ORG/NAME@COMMIT`.
      label: a short name, for folders that are made of it.
      commit: the commit of a repository of the hub; None for a path.
    """

    path: Path
    name: str
    label: str
    commit: str | None = None


class NoRepository(UserError):
    """There is no such repository; offline, the cache has nothing of it."""


def is_hub_name(text: object) -> bool:
    """Whether a value names a repository of the hub."""
    return str(text).startswith(SCHEME)


def locate(text: str | Path, setting: str) -> Located:
    """Locates weights: a path stays as it is, and of a repository of the hub the needed files are downloaded.

    Args:
      text: a path (also gs://…), `hf:ORG/NAME`, or `hf:ORG/NAME@REVISION` with a branch, tag or commit.
      setting: the macro that has this value, for errors.

    Raises:
      UserError: the repository, the revision or readable weights are not there, access is denied, the
        download broke off, or huggingface_hub is not installed.
    """
    found = _located(text, setting, _needed_weights)
    if found.commit and not _has_weights(found.path):  # offline, where the cache holds another part of it
        raise UserError(f"{setting}: {text}: the cache has no weights of it: unset HF_HUB_OFFLINE")
    return found


def locate_vocabulary(text: str | Path) -> Located:
    """`locate` for a SentencePiece model: the path of the file.

    Raises:
      UserError: as `locate` does, or the repository has no SentencePiece model.
    """
    found = _located(text, "VOCABULARY", _needed_vocabulary)
    if not is_hub_name(text):
        return found
    files = (path for path in found.path.rglob("*.model") if _PIECES.fullmatch(_relative(path, found.path)))
    file = next(files, None)
    if file is None:  # offline, where the cache holds another part of the repository
        raise UserError(f"VOCABULARY: {text}: the cache has no spiece.model of it: unset HF_HUB_OFFLINE")
    return dataclasses.replace(found, path=file)


def name_with_commit(text: str, setting: str) -> str:
    """Returns the `name` that `locate` would give, without a download; a commit's own name as it is.

    Args:
      text: as `locate` takes it.
      setting: the macro that has this value, for errors.

    Raises:
      UserError: as `locate` does.
    """
    if not is_hub_name(text):
        return text
    repo, revision = _parse(text, f"{setting}: {text}")
    if revision and _COMMIT.fullmatch(revision):
        return text  # even if the hub cannot be reached
    return f"{SCHEME}{repo}@{resolve_commit(repo, revision, f'{setting}: {text}')}"


def same_name(one: str | None, other: str | None) -> bool:
    """Whether two names of weights are of the same ones, as two spellings of a path are."""
    if one is None or other is None or is_hub_name(one) or is_hub_name(other):
        return one == other
    return paths.absolute(one) == paths.absolute(other)


def resolve_commit(repo: str, revision: str | None, where: str) -> str:
    """Asks for the commit of a repository's revision.

    Args:
      repo: ORG/NAME.
      revision: a branch, tag or commit; None: the main branch.
      where: the setting and its value, for errors.

    Raises:
      UserError: as `locate` does.
    """
    folder, _ = _fetch(repo, revision, where, lambda names, _: [n for n in names if n == "modules.json"])
    return folder.name


def _located(text: str | Path, setting: str, needed: _Needed) -> Located:
    if not is_hub_name(text):
        path = paths.as_path(text)
        return Located(path, str(text), paths.absolute(path).name)
    where = f"{setting}: {text}"
    repo, revision = _parse(text, where)
    folder, offline = _fetch(repo, revision, where, needed)
    log(f"{text}: commit {folder.name}" + (" of the cache, as HF_HUB_OFFLINE says" if offline else ""))
    return Located(folder, f"{SCHEME}{repo}@{folder.name}", repo.rpartition("/")[2], folder.name)


def _parse(text: str, where: str) -> tuple[str, str | None]:
    """Splits a name of the hub into ORG/NAME and the revision."""
    if (match := _NAME.fullmatch(text)) is None:
        raise UserError(f"{where}: not a name of the hub: write hf:ORG/NAME or hf:ORG/NAME@REVISION")
    return match["repo"], match["revision"]


def _fetch(repo: str, revision: str | None, where: str, needed: _Needed) -> tuple[Path, bool]:
    """Downloads the needed files of a revision into the cache.

    Returns:
      The folder of the commit, whose name is the commit; and whether HF_HUB_OFFLINE kept it from the network.
    """
    info = _model_info(repo, revision, where)
    files = needed([file.rfilename for file in info.siblings], where) if info else []
    folder = _download(repo, revision, files, where, offline=info is None)
    if info and folder.name != info.sha:
        raise UserError(f"{where}: its branch moved while it was read: the same command again")
    return folder, info is None


def _needed_weights(names: Sequence[str], where: str) -> list[str]:
    """The files of weights, what describes them, and the vocabulary that lies with them."""
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    weights = weights or [name for name in names if name == FLAX]
    if not weights:
        if any(_PICKLES.fullmatch(name) for name in names):
            raise UserError(
                f"{where}: has no safetensors, and pickled weights are never read: name a revision that has "
                "them (often @refs/pr/1), or open it with transformers and save_pretrained"
            )
        raise UserError(f"{where}: no weights are in it (model.safetensors): check the name")
    # Of weights that are there both in one file and in several, transformers reads the one file.
    whole = {_stem(name) for name in weights if not _IN_PARTS.search(name)}
    weights = [name for name in weights if not _IN_PARTS.search(name) or _stem(name) not in whole]
    return weights + [name for name in names if _DESCRIPTIONS.fullmatch(name) or _PIECES.fullmatch(name)]


def _has_weights(folder: Path) -> bool:
    names = (_relative(path, folder) for path in folder.rglob("*") if path.is_file())
    return any(name == FLAX or (_WEIGHTS.fullmatch(name) and not name.endswith(".json")) for name in names)


def _stem(name: str) -> str:
    """The name of a file of weights without the number of a part and without suffixes."""
    return re.sub(r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?$", "", name)


def _needed_vocabulary(names: Sequence[str], where: str) -> list[str]:
    pieces = [name for name in names if _PIECES.fullmatch(name)]
    if not pieces:
        raise UserError(f"{where}: no SentencePiece model is in it (spiece.model): name a T5's repository")
    return pieces[:1]


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _model_info(repo: str, revision: str | None, where: str):
    """What the hub says of a repository; None where HF_HUB_OFFLINE forbids to ask."""
    library = _library(where)
    with _one_line(repo, revision, where):
        try:
            return library.HfApi(endpoint=_endpoint()).model_info(repo, revision=revision)
        except library.errors.OfflineModeIsEnabled:
            return None


def _download(repo: str, revision: str | None, files: list[str], where: str, offline: bool) -> Path:
    """The folder with these files of a repository, from the cache or through it."""
    library = _library(where)
    patterns = [glob.escape(name) for name in files]
    with _one_line(repo, revision, where), _quiet():
        return Path(
            library.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                local_files_only=offline,
                endpoint=_endpoint(),
            )
        )


def _endpoint() -> str | None:
    """The hub's address, if the environment has another than the public one: as it is now, not at import."""
    return os.environ.get("HF_ENDPOINT") or None


def _library(where: str):
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError(
            f"{where}: needs a package that is not installed: pip install 'retrieval_jax[hf]'"
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _one_line(repo: str, revision: str | None, where: str) -> Iterator[None]:
    """Turns the library's errors into UserErrors that say what to do."""
    from huggingface_hub import constants, errors

    endpoint = _endpoint() or constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{where}: its owner gives access on request: ask for it at {endpoint}/{repo}, then set HF_TOKEN "
            "(or `hf auth login`)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise NoRepository(
            f"{where}: no such repository at {endpoint}, or a private one: check the name, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{where}: has no revision {revision or 'main'!r}: name a branch, tag or commit that "
            f"{endpoint}/{repo} has"
        ) from None
    except errors.EntryNotFoundError as error:
        offline = isinstance(error, FileNotFoundError)
        hint = "unset HF_HUB_OFFLINE" if offline else "the same command again"
        raise (NoRepository if offline else UserError)(
            f"{where}: a file of it is neither there nor in the cache: {hint}"
        ) from None
    except errors.HFValidationError:
        raise UserError(
            f"{where}: not a name of the hub: write hf:ORG/NAME or hf:ORG/NAME@REVISION"
        ) from None
    except Exception as error:  # the library's own, or those of its HTTP client, which its versions change
        raise UserError(
            f"{where}: cannot be fetched ({first_line(error)}): the same command goes on with what has "
            "arrived; without a network, HF_HUB_OFFLINE=1 takes what the cache has"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Shows no bars where nobody watches them, and none of the library's own lines on repeated attempts."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as library_log

    level, shown = library_log.get_verbosity(), not are_progress_bars_disabled()
    library_log.set_verbosity_error()
    if shown and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        library_log.set_verbosity(level)
        if shown:
            enable_progress_bars()
