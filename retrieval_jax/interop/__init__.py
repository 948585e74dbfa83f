"""Writing for others: T5X, Hugging Face, sentence-transformers, StableHLO; running under T5X's train."""
