"""Hugging Face folders: safetensors, config.json."""
