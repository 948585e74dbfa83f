"""The protocol `Searcher` and every searcher: generative, exact, ScaNN and BM25."""
