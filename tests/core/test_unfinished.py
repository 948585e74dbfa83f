"""Folders of unfinished work: the same recipe goes on with them, another one begins anew."""

from pathlib import Path

from retrieval_jax.core import unfinished


def test_the_parts_of_a_recipe_are_kept_and_those_of_another_are_not(tmp_path: Path, capsys):
    folder, recipe = tmp_path / "thing.unfinished", {"a": (1,)}
    parts = [folder / f"{number}.json" for number in range(3)]
    assert not unfinished.has_begun(folder, recipe)
    unfinished.begin(folder, recipe, parts)
    assert unfinished.has_begun(folder, recipe)
    assert not unfinished.has_begun(folder, {"a": (2,)})
    for part in parts[:2]:
        part.write_text("1")
    assert capsys.readouterr().err == ""
    unfinished.begin(folder, recipe, parts, "shards")
    assert "going on, 2 of 3 shards are finished" in " ".join(capsys.readouterr().err.split())
    assert [part.exists() for part in parts] == [True, True, False]
    unfinished.begin(folder, {"a": (2,)}, parts)
    assert not any(part.exists() for part in parts)
