"""Answers as JSON: any JSON reader gives back what was found, whatever the ids, scores and vectors hold."""

import base64
import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retrieval_jax.serving.answers import candidates_json, vector_json


@given(
    found=st.lists(
        st.tuples(st.text(), st.floats(width=32) | st.floats(width=32).map(np.float32)),
        min_size=1,
        max_size=4,
    )
)
def test_candidates_come_back_by_any_json_reader(found):
    docs = [json.dumps({"text": passage}).encode() for passage, _ in found]
    read = json.loads(b"[" + b"".join(candidates_json(found, docs)) + b"}]")
    assert [one["docid"] for one in read] == [passage for passage, _ in found]
    assert [one["rank"] for one in read] == [*range(1, len(found) + 1)]
    assert [one["doc"]["text"] for one in read] == [passage for passage, _ in found]
    for one, (_, score) in zip(read, found, strict=True):
        assert one["score"] == float(score) if np.isfinite(score) else one["score"] is None


def test_no_candidates_are_nothing():
    assert [*candidates_json([], [])] == []


@given(vector=st.lists(st.floats(-1e6, 1e6, width=32), max_size=5))
def test_vectors_come_back_in_both_forms(vector):
    given_vector = np.array(vector, np.float32)
    np.testing.assert_array_equal(np.float32(json.loads(vector_json(given_vector, "float"))), given_vector)
    coded = base64.b64decode(json.loads(vector_json(given_vector, "base64")))
    np.testing.assert_array_equal(np.frombuffer(coded, "<f4"), given_vector)
