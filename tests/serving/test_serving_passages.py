"""Texts by id: those of the collection, read once."""

import json
import shutil

from retrieval_jax.data.collection import Collection
from retrieval_jax.serving.passages import PassageTexts


def test_texts_are_those_of_the_collection_in_any_order(collection):
    texts = PassageTexts(collection, 1 << 20)
    wanted = [*collection.passages()]
    ids = [passage.id for passage in wanted]
    for passage_id in ("", "zzz", ids[0] + "x", ids[0][:-1], "\U0010ffff", "\0", "\ud83d"):
        assert texts.json([passage_id]) == [b"null"]
    asked = [ids[5], "nowhere", ids[0], ids[5]]
    for _ in range(2):  # the second time of the cache
        found = [json.loads(text) for text in texts.json(asked)]
        assert found == [
            None if row is None else {"title": wanted[row].title, "text": wanted[row].text}
            for row in (5, None, 0, 5)
        ]
    assert texts.json([]) == []


def test_when_the_collection_is_replaced_what_was_opened_is_read_on(collection, tmp_path):
    folder = shutil.copytree(collection.folder, tmp_path / "collection")
    texts = PassageTexts(Collection(folder), 1 << 20)
    wanted, passage = collection.queries("test"), collection.passage(3)
    folder.rename(tmp_path / "old")
    shutil.rmtree(tmp_path / "old")
    assert texts.queries("test", 2, 3) == wanted[2:5]
    assert texts.queries("test", 0, 1000) == wanted
    assert json.loads(texts.json([passage.id])[0]) == {"title": passage.title, "text": passage.text}
