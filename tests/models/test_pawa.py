"""The PAWA adaptor against its definition, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from small_t5 import (
    CONFIG,
)

from retrieval_jax.models.pawa import PawaAdaptor


def test_pawa_adapts_each_position_by_its_own_matrix():
    config = dataclasses.replace(CONFIG, emb_dim=6)
    rng = np.random.default_rng(0)
    for B, T in ((2, 3), (1500, 2)):  # at once, and a few positions at a time
        x, adapting = rng.normal(size=(2, B, T, 6))
        kernel = rng.normal(size=(6, 6, 6))
        variables = {"params": {"kernel": jnp.array(kernel, jnp.float32)}}
        found = jax.jit(PawaAdaptor(config).apply)(
            variables, *(jnp.array(a, jnp.float32) for a in (x, adapting))
        )
        for b in (0, B - 1):
            for t in range(T):
                matrix = sum(adapting[b, t, a] * kernel[a] for a in range(6))
                np.testing.assert_allclose(found[b, t], x[b, t] @ matrix, atol=1e-4)
