"""Devices: the mesh, the rules by which arrays are sharded on it, several hosts, and facts about hardware."""
