"""The docid trie, constrained beam search, top-k and sampling: pure functions on arrays.

Nothing here knows a network: a search is given the step by which one writes tokens.
"""
