"""The docid trie, constrained beam search, top-k of atomic docids, and sampling: pure functions on arrays.

Nothing here imports a network: a search is given the decode step of one as a function. Nothing here reads
files.
"""
