"""Writes Meta's layout: consolidated.NN.pth for each model-parallel rank, params.json, and the sidecar beside it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from ... import meta_config
from ...config import LlamaConfig
from ...errors import CheckpointError
from ...json_file import write_json
from ..layout import canonical_shapes
from ..names import META_NAMES, to_stored
from ..source import TensorInfo
from .pth import PthWriter
from .source import MAX_FILES, ROTATED, SPLIT_AXES, consolidated


class MetaWriter:
    """Takes the tensors in the order of `canonical_shapes`, each in blocks of rows, and deals them out to the ranks."""

    def __init__(self, config: LlamaConfig, axes: dict[str, int | None], ranks: list[PthWriter]) -> None:
        self._config = config
        self._axes = axes
        self._ranks = ranks
        self._rows = {name: shape[0] // len(ranks) for name, shape in canonical_shapes(config).items()}
        self._done: tuple[str, int] = "", 0  # the tensor under way, and its rows so far

    def write(self, name: str, block: np.ndarray) -> None:
        """Appends rows to canonical tensor `name`; of wq and wk, rows of whole heads."""
        stored, axis = to_stored(name, META_NAMES), self._axes[name]
        if name.rpartition(".")[2] in ROTATED:
            block = _interleave(block, self._config.head_dim)
        if axis is None:
            for rank in self._ranks:
                rank.write(stored, block)
        elif axis == 1:
            for rank, columns in zip(self._ranks, np.split(block, len(self._ranks), axis=1), strict=True):
                rank.write(stored, np.ascontiguousarray(columns))
        else:
            start = self._done[1] if self._done[0] == name else 0
            size, end = self._rows[name], start + len(block)
            for i in range(start // size, -(-end // size)):
                self._ranks[i].write(stored, block[max(0, i * size - start) : (i + 1) * size - start])
            self._done = name, end


def _interleave(block: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of whole heads from the half-split order to Meta's, in which rotary embeddings turn neighbours."""
    heads = block.reshape(-1, 2, head_dim // 2, block.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(block.shape)


@contextmanager
def meta_writer(folder: Path, config: LlamaConfig, files: int = 1) -> Iterator[MetaWriter]:
    """A writer of the tensors of `config` into `files` files; params.json is written when all of them are there.

    The embeddings are split by vocabulary, as in Llama 3, or by width, as in Llama 2, for models that have its size of
    vocabulary. Raises CheckpointError, before anything is written, when `files` ranks cannot hold whole heads, or
    rows and columns in equal parts, and ConfigError when params.json cannot say the model.
    """
    params = meta_config.to_params(config)
    _check_files(config, files)
    llama2 = config.vocab_size < meta_config.LLAMA3_VOCAB and not config.tie_embeddings
    axes = {name: SPLIT_AXES.get(name.rpartition(".")[2]) for name in canonical_shapes(config)}
    axes["tok_embeddings"] = 1 if llama2 else 0
    infos = {
        to_stored(name, META_NAMES): TensorInfo(
            tuple(n // files if i == axes[name] else n for i, n in enumerate(shape)), config.jnp_dtype
        )
        for name, shape in canonical_shapes(config).items()
    }
    # Meta's code has no tied embeddings: it reads both names, which share one storage.
    output, embeddings = (to_stored(name, META_NAMES) for name in ("output", "tok_embeddings"))
    aliases = {output: embeddings} if config.tie_embeddings else {}
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(PthWriter(folder / consolidated(rank), infos, aliases=aliases)) for rank in range(files)
        ]
        yield MetaWriter(config, axes, ranks)
    write_json(folder / meta_config.SIDECAR, meta_config.to_sidecar(config))
    write_json(folder / meta_config.PARAMS, params)


def _check_files(config: LlamaConfig, files: int) -> None:
    def fits(count: int) -> bool:
        sizes = [config.n_heads, config.n_kv_heads, config.ffn_dim, config.vocab_size]
        return config.dim % count == 0 and all(size % count == 0 for size in sizes)

    if not 1 <= files <= MAX_FILES or not fits(files):
        possible = ", ".join(str(n) for n in range(1, MAX_FILES + 1) if fits(n))
        raise CheckpointError(
            f"{files} files cannot hold {config.n_heads} heads, {config.n_kv_heads} kv heads, dim {config.dim}, "
            f"ffn_dim {config.ffn_dim} and vocab_size {config.vocab_size} in equal parts. Numbers that can: {possible}."
        )
