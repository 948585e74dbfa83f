"""The T5 network, the families of retrievers with T5X's model interface, and their objectives.

Nothing here reads files; parameters are arguments.
"""
