"""Every verb of the table is known to gin."""

import gin

from retrieval_jax.core import configuration
from retrieval_jax.verbs.table import DEFAULT_FILES, VERBS, configure_verbs


def test_every_verb_is_configured_whichever_runs():
    configure_verbs([], ["SEED=3"])
    assert gin.query_parameter("%SEED") == 3
    for _, name in VERBS.values():
        gin.get_configurable(name)  # raises ValueError for a name that gin does not know
    for files in DEFAULT_FILES.values():
        configuration.configure(files, [])
