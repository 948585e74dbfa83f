"""Searchers: each finds the passages that answer a query, behind the one interface `Searcher`.

Here are the interface and the registry of kinds (`searcher.py`), what a searcher is built from
(`index_inputs.py`) and what builds its folder (`indexing.py`), the manifest that says what it was made of
(`manifest.py`), and a module for each kind. A searcher does not know judgements: runs are scored in
`evaluation`.
"""
