"""Errors, paths and storage, progress, gin configuration, and the workspace.

Every other package stands on this one, which knows nothing of retrieval.
"""
