"""A file of each split: which there are, and what is stale or damaged."""

from pathlib import Path

import pytest

from retrieval_jax.core import storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.query_folder import QueryFolder, merge


class Notes(QueryFolder):
    """Whatever a verb writes."""

    verb, file = "note", "notes.{split}.txt"


def written(folder: Path, recipe: dict, splits: list[str]) -> Notes:
    def make(tmp: Path) -> dict:
        facts = {}
        for split in splits:
            path = tmp / Notes.file_name(split)
            path.write_text(split)
            facts[split] = {"fingerprint": storage.checksum(path), "split": split}
        return merge(facts)

    storage.build_once(folder, recipe, make)
    return Notes(folder)


def test_files_are_those_that_were_written(collection: Collection, tmp_path: Path):
    notes = written(tmp_path / "both", collection.recipe("train", "dev"), ["train", "dev"])
    assert storage.read_manifest(notes.folder, "note")["split"] == "train"
    for split in ("train", "dev"):
        path = notes.local_file(collection, split)
        assert path == notes.folder / f"notes.{split}.txt"
        assert notes.fingerprint_of(split) == storage.checksum(path)
    alone = written(tmp_path / "train", collection.recipe("train", "dev"), ["train"])
    assert alone.fingerprint == notes.fingerprint
    assert alone.fingerprint_of("dev") is alone.local_file(collection, "dev") is None

    path.write_text("altered")
    assert notes.local_file(collection, "train").read_text() == "train"
    for _ in range(2):
        with pytest.raises(UserError, match=r"notes.dev.txt: missing or altered: .* `retrieval-jax note`"):
            notes.local_file(collection, "dev")
        path.unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"other: of another collection .*: .* `retrieval-jax note`"):
        written(tmp_path / "other", {"collection": "another"}, ["train"]).local_file(collection, "train")
    then = collection.recipe() | {"queries": {**collection.query_fingerprints, "dev": "then"}}
    for name, earlier in {"then": then, "without": collection.recipe("train")}.items():
        notes = written(tmp_path / name, earlier, ["train"])
        assert notes.local_file(collection, "train").read_text() == "train"
        with pytest.raises(UserError, match=rf"{name}: of other dev queries than .*: .*`retrieval-jax note`"):
            notes.local_file(collection, "dev")
    with pytest.raises(UserError, match="nothing finished here: make it with `retrieval-jax note`"):
        Notes(tmp_path / "nothing")
