"""Training examples: tasks, mixtures, what a text is answered with, batches, packing, and the cache."""
