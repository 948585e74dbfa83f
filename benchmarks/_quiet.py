"""Imported before what imports TensorFlow and JAX: hides what they say; with --quick XLA compiles quickly.

Most of the time of a --quick run is the compiler's, which takes half of it where LLVM does not optimize.
"""

import os
import sys

from retrieval_jax.core.progress import quiet_libraries

quiet_libraries()
if "--quick" in sys.argv:
    quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ.setdefault("XLA_FLAGS", quickly)
