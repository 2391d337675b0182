"""Whether a workload fits the engine and the memory, known before anything is loaded or compiled."""

import os
from typing import NamedTuple

from jax.sharding import Mesh

from ..config import LlamaConfig
from ..engine import runner
from ..engine.memory import CPU_BYTES, allowed_bytes
from ..engine.options import EngineOptions, Sizes, pages_per_sequence, sizes_of
from ..errors import ConfigError
from ..kv_cache import page_bytes
from ..sharding import DATA
from ..weights import abstract_weights


class Room(NamedTuple):
    """What an engine of these options has room for."""

    sizes: Sizes
    slots: int  # sequences over the mesh that run at the same time
    max_model_len: int  # tokens; the memory may hold fewer
    weight_bytes: int  # of one device
    page_bytes: int  # of one page on one device
    cache_bytes: int | None  # of one device; None: not known before
    origin: str  # of cache_bytes, in words


def room_of(config: LlamaConfig, mesh: Mesh, options: EngineOptions) -> Room:
    """Raises ConfigError when the weights alone do not fit the devices."""
    sizes = sizes_of(options, mesh)
    weights = runner.device_bytes(abstract_weights(config, mesh))
    memory = device_bytes(mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if memory is not None and weights > memory:
        raise ConfigError(
            f"the weights take {weights / 1e9:.1f} GB of each device, which has {memory / 1e9:.1f} GB: use a larger "
            "mesh or a smaller model."
        )
    if on_cpu or options.kv_cache_bytes is not None:
        cache = (options.kv_cache_bytes or CPU_BYTES) // mesh.size
        origin = f"kv_cache_bytes={options.kv_cache_bytes or CPU_BYTES} over {mesh.size} devices"
    elif memory is not None:
        cache = min(memory, allowed_bytes(mesh, options, memory)) - weights
        origin = f"{memory / 1e9:.1f} GB of a device, of which weights take {weights / 1e9:.1f}"
    else:
        cache, origin = None, ""
    return Room(
        sizes,
        sizes.slots * mesh.shape[DATA],
        options.max_model_len or config.max_seq_len,
        weights,
        page_bytes(config, mesh, options.kv_cache_dtype),
        cache,
        origin,
    )


def check_length(room: Room, tokens: int, what: str, advice: str) -> None:
    """Raises ConfigError for sequences of more tokens than the engine serves."""
    if tokens > room.max_model_len:
        raise ConfigError(
            f"{what} needs sequences of {tokens} tokens, beyond max_model_len={room.max_model_len}: {advice}."
        )


def check_batch(room: Room, batch: int, what: str) -> None:
    """Raises ConfigError for more sequences at a time than the engine runs."""
    if batch > room.slots:
        raise ConfigError(
            f"{what}: {batch} sequences at a time do not fit max_num_seqs={room.slots}: give --max_num_seqs={batch} "
            "or a smaller batch."
        )


def check_cache(room: Room, mesh: Mesh, batch: int, tokens: int, what: str) -> None:
    """Raises ConfigError where `batch` sequences of `tokens` tokens need more cache than there can be."""
    if room.cache_bytes is None:
        return
    needed = -(-batch // mesh.shape[DATA]) * pages_per_sequence(tokens) * room.page_bytes
    if needed > room.cache_bytes:
        raise ConfigError(
            f"{what}: the cache of {batch} sequences of {tokens} tokens takes {needed / 1e9:.2f} GB of each device, "
            f"but there are {max(0, room.cache_bytes) / 1e9:.2f} ({room.origin}): lower the batch or the lengths, use "
            "a larger mesh, an 8-bit --kv_cache_dtype, or more --kv_cache_bytes."
        )


def device_bytes(mesh: Mesh) -> int | None:
    """Memory of one device; on CPU its share of the machine's; None where it is not known."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // mesh.size
        except (AttributeError, OSError, ValueError):
            return None
    return (device.memory_stats() or {}).get("bytes_limit")
