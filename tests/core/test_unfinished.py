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


def test_hosts_share_the_parts(tmp_path: Path):
    shards = unfinished.Shards(tmp_path, 100, 7)
    assert [row for number in range(shards.count) for row in shards.rows(number)] == list(range(100))
    shares = [shards.missing(host, 4) for host in range(4)]
    assert sorted(number for share in shares for number in share) == list(range(15))
    shards.write(5, ({"row": row} for row in shards.rows(5)))
    assert 5 not in shards.missing(1, 4)
    assert [*shards.read([5])] == [{"row": row} for row in range(35, 42)]
