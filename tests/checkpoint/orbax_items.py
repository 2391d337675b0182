"""Orbax items made by orbax itself, in every layout that it has, for tests of reading them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

# name -> (OCDBT database, zarr 3)
LAYOUTS = {"ocdbt": (True, False), "files": (False, False), "ocdbt-zarr3": (True, True), "files-zarr3": (False, True)}

Tensors = dict[str, np.ndarray]  # canonical name -> tensor


def random_tensors(dtype: Any = ml_dtypes.bfloat16) -> Tensors:
    """Tensors of several chunks, with one of a single row, in one dtype and the norms in others."""
    rng = np.random.default_rng(0)
    return {
        "tok_embeddings": rng.standard_normal((130, 32)).astype(dtype),
        "layers.0.attention_norm": rng.standard_normal(32).astype(np.float32),
        "layers.0.wq": rng.standard_normal((48, 32)).astype(dtype),
        "layers.0.w2": rng.standard_normal((32, 92)).astype(dtype),
        "layers.1.wq": rng.standard_normal((1, 32)).astype(dtype),
        "norm": np.zeros(32, np.float16),  # equal to the fill value
    }


def nested(tensors: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in tensors.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def save_item(item: Path, tensors: Tensors, layout: str, chunk_bytes: int = 2048, compress: bool = True) -> None:
    ocdbt, zarr3 = LAYOUTS[layout]
    tree = nested(tensors)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), tree)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3, use_compression=compress)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(item, args=ocp.args.PyTreeSave(tree, save_args))


def change_json(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    content = change(content) or content
    file.write_text(json.dumps(content))


def crc32c(data: bytes) -> int:
    """RFC 3720, B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
