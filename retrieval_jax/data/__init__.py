"""The collection: sources in every format, records on disk, vocabulary, subsets and synthetic queries.

Nothing here imports JAX, or knows how passages are encoded, numbered or searched. Writing and reading a
collection takes memory for the passages' ids, never for their texts.
"""
