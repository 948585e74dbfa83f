"""Texts to vectors, the vectors of a collection's passages, and vectors from files."""
