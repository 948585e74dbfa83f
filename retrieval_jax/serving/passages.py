"""The texts of a collection's passages by id, as JSON, ready to be sent."""

import json
from json.encoder import encode_basestring_ascii  # what json.dumps calls in the end

from retrieval_jax.core.arrow_ids import RowFinder
from retrieval_jax.data.collection import Collection, Query
from retrieval_jax.serving.cache import Cache

NO_TEXT = b"null"


class PassageTexts:
    """Reads passages by id, and keeps those that were read last. Any thread may use it.

    Everything that is read later is opened here, so that the collection's folder may be replaced meanwhile.

    Args:
      collection: the collection.
      cache_bytes: the most memory for passages that were read.
    """

    def __init__(self, collection: Collection, cache_bytes: int):
        self.collection = collection
        self._cache = Cache(cache_bytes)
        self.find_rows = RowFinder(collection.ids)
        self.find_rows([""])  # sorts the ids
        collection.open_all()

    def json(self, passage_ids: list[str]) -> list[bytes]:
        """Returns `{"title": …, "text": …}` of each passage as JSON; `null` for an id that is unknown."""
        found = {passage_id: self._cache.get(passage_id) for passage_id in passage_ids}
        if missing := [passage_id for passage_id, known in found.items() if known is None]:
            found |= self._read(missing)
        return [found[passage_id] for passage_id in passage_ids]

    def _read(self, passage_ids: list[str]) -> dict[str, bytes]:
        rows = zip(passage_ids, self.find_rows(passage_ids), strict=True)
        there = {passage_id: row for passage_id, row in rows if row >= 0}
        passages = self.collection.get([*there.values()]) if there else []
        read = dict.fromkeys(passage_ids, NO_TEXT)
        for passage_id, passage in zip(there, passages, strict=True):
            text = json.dumps({"title": passage.title, "text": passage.text}, ensure_ascii=False).encode()
            self._cache.put(passage_id, text)
            read[passage_id] = text
        return read

    def queries(self, split: str, offset: int, limit: int) -> list[Query]:
        """Reads judged queries of a split."""
        count = self.collection.query_counts[split]
        return self.collection.queries(split, range(min(offset, count), min(offset + limit, count)))


def quoted(text: str) -> str:
    """Returns a text as JSON, in ASCII."""
    return encode_basestring_ascii(text)
