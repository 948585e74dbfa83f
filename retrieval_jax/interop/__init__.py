"""Writing for others: StableHLO programs, model cards, and this project's models under T5X's trainer.

The formats of weights themselves lie in checkpoints/. Only t5x.py needs T5X; nothing imports it but gin files
and `python -m retrieval_jax.interop.t5x`.
"""
