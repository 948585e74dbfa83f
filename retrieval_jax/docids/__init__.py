"""Docids: the kinds, the clusterings that some kinds are made by, and the docid table on disk.

Importing the package registers its kinds. A kind may know collections, vectors, tries and models; examples,
searchers and trainers come after it, and know docids only as a DocidTable.
"""

from retrieval_jax.docids import (  # noqa: F401 (they register their kinds)
    from_file,
    identifiers,
    residual,
    semantic,
)
