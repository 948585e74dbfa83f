"""Weights on disk: Orbax checkpoints, model folders, and the formats of other programs.

A model folder (model_folder.py) is what training, conversion and export write, and what every searcher opens.
Beside it lie readers and writers of T5X's, Hugging Face's and sentence-transformers' formats, which need none
of these programs, and names of the Hugging Face hub (hub.py). No module here trains, searches or reads gin's
values: the network is built from what was saved with the weights.
"""
