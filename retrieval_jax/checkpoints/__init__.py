"""Weights on disk: Orbax, safetensors and model folders; reading and writing those of others."""
