"""StableHLO, and running under T5X's own train, eval and infer."""
