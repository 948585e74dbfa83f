"""Devices: the mesh, the rules by which arrays are divided over it, several processes, and facts about chips.

Nothing here knows of models, collections or docids. A library function is given a mesh as an argument; only
verbs ask gin for one (`partitioning.make_mesh`).
"""
