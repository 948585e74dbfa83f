"""The collection: sources in every format, records, vocabulary, subsets, synthetic queries, judgements.

Nothing here imports JAX, or knows how passages are encoded, numbered or searched.
"""
