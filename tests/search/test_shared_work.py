"""Shards that are made, interrupted, joined and removed."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from retrieval_jax.core.unfinished import Shards
from retrieval_jax.search.shared_work import make_in_shards, scratch_folder


def test_what_is_finished_is_made_once(tmp_path: Path):
    folder, made = tmp_path / "squares", []
    scratch = scratch_folder(folder)
    shards = {"train": Shards(scratch / "train", 10, 3), "dev": Shards(scratch / "dev", 4, 3)}
    (tmp_path / "other.unfinished").mkdir()

    def run(recipe: dict, most: int = 99) -> None:
        def make(split: str, numbers: Sequence[int]) -> None:
            for number in numbers:
                if len(made) == most:
                    raise KeyboardInterrupt
                made.append((split, number))
                shards[split].write(number, ([row**2] for row in shards[split].rows(number)))

        def join(tmp: Path) -> dict:
            lines = {split: [*some.read(range(some.count))] for split, some in shards.items()}
            (tmp / "all.json").write_text(json.dumps(lines))
            return {}

        make_in_shards(folder, recipe, shards, make, join, prepare=lambda: made.append("prepared"))

    every = [*(("train", number) for number in range(4)), ("dev", 0), ("dev", 1)]
    with pytest.raises(KeyboardInterrupt):
        run({"n": 1}, most=4)
    assert made == ["prepared", *every[:3]]
    assert not folder.exists()
    run({"n": 1})
    assert made == ["prepared", *every[:3], "prepared", *every[3:]]
    wanted = {split: [[row**2] for row in range(count)] for split, count in (("train", 10), ("dev", 4))}
    assert json.loads((folder / "all.json").read_text()) == wanted
    run({"n": 1})
    assert len(made) == 8
    run({"n": 2})
    assert made[8:] == ["prepared", *every]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "other.unfinished",
        "squares",
    ]
