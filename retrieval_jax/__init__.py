"""Generative retrievers and dual encoders in JAX: train, search and compare them on the same collection.

The packages are listed in the order of their imports; each may import only those before it: `core`, `data`,
`mesh`, `decoding`, `models`, `checkpoints`, `embeddings`, `docids`, `examples`, `search`, `evaluation`,
`training`, `interop`, `verbs`. The docstring of a package says what belongs in it and what does not.
"""
