"""Training examples: tasks, mixtures, targets, batches, packing, the cache, and seqio's tasks.

Nothing here knows a model: targets say what is learned, and `seqio_tasks` alone imports TensorFlow.
"""
