"""The cache: what it keeps, what makes room, and how much it takes."""

import sys

from retrieval_jax.serving.cache import ENTRY, Cache, size_of


def test_what_was_used_longest_ago_makes_room():
    cache = Cache(3 * (ENTRY + size_of("a") + size_of((bytes(100),))))
    for key in "abc":
        cache.put(key, (bytes(100),))
    assert len(cache) == 3
    assert cache.bytes == cache.max_bytes
    assert cache.get("a") == (bytes(100),)
    cache.put("d", (bytes(100),))
    assert [cache.get(key) is None for key in "abcd"] == [False, True, False, False]
    cache.put("a", (b"another",))
    assert cache.get("a") == (b"another",)
    cache.put("b", (bytes(9000),))  # larger than the cache
    assert cache.get("b") is None
    assert len(cache) == 3
    for number in range(1000):
        cache.put(number, (bytes(number % 90),))
        assert cache.bytes <= cache.max_bytes


def test_without_room_it_keeps_nothing():
    cache = Cache(0)
    cache.put("a", (b"",))
    assert cache.get("a") is None


def test_a_key_counts_as_the_memory_that_it_takes():
    text = "\U0001f600" * 1000  # four bytes a character
    cache = Cache(1 << 20)
    cache.put((text, (10, True)), (b"",))
    assert 4000 + ENTRY < cache.bytes < 5000
    assert size_of((text,)) == sys.getsizeof((text,)) + sys.getsizeof(text)
