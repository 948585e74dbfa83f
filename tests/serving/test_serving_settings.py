"""The depths of searches."""

from retrieval_jax.serving.settings import ServeSettings


def test_the_smallest_depth_that_holds_what_is_asked_for():
    settings = ServeSettings(max_hits=1000)
    assert settings.depths == [10, 100, 1000]
    assert [settings.depth(hits) for hits in (1, 10, 11, 100, 101, 1000)] == [10, 10, 100, 100, 1000, 1000]
    assert ServeSettings(max_hits=5).depths == [5]
    assert ServeSettings(max_hits=100).depths == [10, 100]
