"""The parts of an answer as JSON, ready to be sent."""

import base64
import json
import math
from collections.abc import Iterator, Sequence

import numpy as np

from retrieval_jax.search.searcher import RankedList
from retrieval_jax.serving.passages import quoted


def vector_json(vector: np.ndarray, form: str) -> bytes:
    """Returns a vector as a JSON list ("float"), or as base64 of float32, little-endian ("base64")."""
    if form == "base64":
        return b'"%b"' % base64.b64encode(vector.astype("<f4").tobytes())
    return json.dumps(vector.tolist()).encode()


def candidates_json(ranked_list: RankedList, docs: Sequence[bytes]) -> Iterator[bytes]:
    """Yields the passages that were found as JSON, in two pieces each, without the last one's closing brace.

    So the texts, most of an answer, are copied once: into the response.
    """
    opening = "{"
    for rank, ((passage_id, score), doc) in enumerate(zip(ranked_list, docs, strict=True), start=1):
        # NumPy writes its numbers otherwise, and JSON has no infinite ones.
        number = repr(float(score)) if math.isfinite(score) else "null"
        yield f'{opening}"docid":{quoted(passage_id)},"score":{number},"rank":{rank},"doc":'.encode()
        yield doc
        opening = "},{"
