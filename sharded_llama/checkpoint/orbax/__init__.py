"""Orbax checkpoints of canonical tensors: a tree of zarr arrays."""
