"""Texts by id: those of the collection, read once."""

import json

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
