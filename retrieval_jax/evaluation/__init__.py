"""Evaluation: TREC runs and qrels, metrics, and the report that compares methods.

Nothing here opens a model or a searcher: a run may be another tool's.
"""
