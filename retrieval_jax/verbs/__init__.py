"""What `retrieval-jax VERB` runs: one module per verb.

Verbs alone bring gin's values, the workspace and the mesh together, and pass them on.
No other package imports one.
"""
