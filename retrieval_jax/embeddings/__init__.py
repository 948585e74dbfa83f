"""Vectors of texts: encoding by dual encoders, and the vectors of a collection's passages from any source.

encoding.py computes vectors and keeps those of a collection; sources.py takes them from files, model folders,
the Hugging Face hub or the library sentence-transformers. Clustering and search of vectors are elsewhere
(docids, search).
"""
