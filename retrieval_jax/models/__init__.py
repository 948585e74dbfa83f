"""The T5 network, the retrievers behind T5X's model interface, and their objectives.

A model is an object without parameters; its functions take them as arguments. Nothing here reads files, makes
a mesh or knows a collection.
"""
