"""Each refusal has the status that HTTP has for it."""

import pytest

from retrieval_jax.serving import errors


@pytest.mark.parametrize(
    ("refusal", "status", "retry_after"),
    [
        (errors.NotFound, 404, None),
        (errors.Invalid, 422, None),
        (errors.Overloaded, 429, 1),
        (errors.NotReady, 503, 1),
    ],
)
def test_refusals(refusal, status, retry_after):
    error = refusal("bm25: why: the remedy")
    assert (error.status, error.retry_after, str(error)) == (status, retry_after, "bm25: why: the remedy")
