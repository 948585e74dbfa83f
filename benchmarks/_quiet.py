"""Imported before what imports TensorFlow: hides what it says when it is."""

from retrieval_jax.core.progress import quiet_libraries

quiet_libraries()
