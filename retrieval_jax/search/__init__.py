"""Searchers: each finds the passages that answer a query, behind the one interface `Searcher`.

Here are the interface and the registry of kinds (`searcher.py`), the generative searcher, exact search and
ScaNN over a dual encoder's vectors, BM25, and what builds their folders (`indexing.py`). A searcher does not
know judgements: runs are scored in `evaluation`.
"""
