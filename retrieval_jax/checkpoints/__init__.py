"""Weights on disk: Orbax, safetensors and model folders; reading those of T5X and of Hugging Face."""
