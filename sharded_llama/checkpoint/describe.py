"""Says what a checkpoint is, and what each device of a mesh would hold of it."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable

import jax

from ..config import LlamaConfig
from ..sharding import DATA, MODEL, check_model_size
from ..weights import WeightSpec, count_parameters, weight_specs
from .source import CheckpointSource

Row = tuple[str, tuple[int, ...], str, int]  # name, with {i} for the layer; shape; dtype; bytes


def describe(source: CheckpointSource, config: LlamaConfig) -> str:
    """Format, config and tensors of a checkpoint."""
    rows = [(_any_layer(name), t.shape, t.dtype.name, t.nbytes) for name, t in source.tensors.items()]
    dtypes = Counter(row[2] for row in rows)
    lines = [
        f"{source.location}: {source.format}",
        f"{len(rows)} tensors ({', '.join(f'{n} {dtype}' for dtype, n in dtypes.items())}), "
        f"{sum(row[3] for row in rows):,} bytes, {count_parameters(config):,} parameters",
        "",
        *(f"  {field.name:<15}{getattr(config, field.name)}" for field in dataclasses.fields(config)),
        "",
        *_table(rows),
    ]
    return "\n".join(lines)


def describe_mesh(config: LlamaConfig, mesh: dict[str, int]) -> str:
    """What each device of a mesh, given as {"data": 2, "model": 4}, would hold. Needs no devices.

    Raises MeshError when the mesh does not fit the heads.
    """
    check_model_size(config, mesh[MODEL])
    rows = []
    specs = weight_specs(config, mesh[MODEL])
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, WeightSpec)):
        shape = tuple(
            n // (mesh[MODEL] if i < len(spec.spec) and spec.spec[i] == MODEL else 1) for i, n in enumerate(spec.shape)
        )
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rows.append((_any_layer(name), shape, spec.dtype.name, math.prod(shape) * spec.dtype.itemsize))
    total = sum(row[3] for row in rows)
    title = f"Each of {mesh[DATA] * mesh[MODEL]} devices of data:{mesh[DATA]},model:{mesh[MODEL]} holds {total:,} bytes"
    if mesh[MODEL] > config.n_kv_heads:
        title += f"; {mesh[MODEL] // config.n_kv_heads} devices share a kv head, of which each has a copy"
    return "\n".join([f"{title}:", *_table(rows)])


def _any_layer(name: str) -> str:
    return re.sub(r"(?<=layers\.)[0-9]+(?=\.)", "{i}", name)


def _table(rows: Iterable[Row]) -> list[str]:
    counted = Counter(rows)
    cells = [
        (name, " x ".join(map(str, shape)), dtype, f"{size * n:,} bytes", f"in {n} tensors" if n > 1 else "")
        for (name, shape, dtype, size), n in counted.items()
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    return [
        f"  {name:<{widths[0]}}  {shape:>{widths[1]}}  {dtype:<{widths[2]}}  {size:>{widths[3]}}  {many}".rstrip()
        for name, shape, dtype, size, many in cells
    ]
