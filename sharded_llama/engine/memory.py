"""How many pages the memory has room for: computed from what the device, the weights and the compiled steps say."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ..attention.paged_gpu import addressable_pages
from ..config import LlamaConfig
from ..errors import ConfigError
from ..kv_cache import PAGE_SIZE, KVPages, page_bytes
from ..sharding import DATA
from ..weights import abstract_weights
from .compilation import tell
from .options import EngineOptions, Sizes, modes_of, pages_per_sequence
from .runner import Executables, Runner, device_bytes

CPU_BYTES = 1 << 30  # of the cache over the whole mesh, where nothing else is said
JAX_FRACTION = 0.75  # share of a GPU that JAX takes when the environment does not say otherwise
FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # its newer and its older name
LOADING_BYTES = 3 << 29  # at most, of parts of weights on their way to their places, and of gaps that they leave
SPARE = 1.1  # temporaries are measured on a model of few layers; the whole one may order its steps a little differently


class PageBudget(NamedTuple):
    """Per data shard: pages, and the longest sequence that is served."""

    n_pages: int
    max_model_len: int


def plan_pages(
    config: LlamaConfig,
    mesh: Mesh,
    backend: str,
    options: EngineOptions,
    sizes: Sizes,
    draft: LlamaConfig | None = None,
    *,
    expected_bytes: int | None = None,
    ahead: bool = False,
    executables: Executables | None = None,
) -> PageBudget:
    """What fits beside the weights. A page has room for both models' keys and values.

    Args:
      config, mesh, backend, options, sizes: of the engine.
      draft: of the model that guesses.
      expected_bytes: that are in use on each device when all weights are there (`expected_in_use`). Counted, they vary
        from start to start, and by how much is read already. None: what is counted.
      ahead: while a step is compiled to see what it takes, compile also all that needs no pages, for the engine.
      executables: where to put of these what the engine's own Runner can use.

    Raises ConfigError, saying what would fit, when the memory cannot hold one sequence of `max_model_len`.
    """
    of_page = sum(page_bytes(c, mesh, options.kv_cache_dtype) for c in (config, draft) if c is not None)
    wanted_len = options.max_model_len or config.max_seq_len
    if options.num_pages:
        n_pages, origin = options.num_pages, f"num_pages={options.num_pages}"
    else:
        device = max(mesh.local_devices, key=_bytes_in_use)
        stats = device.memory_stats()
        on_accelerator = device.platform != "cpu" and stats and "bytes_limit" in stats
        if on_accelerator and options.kv_cache_bytes is None:
            used = stats["bytes_in_use"]
            if expected_bytes is not None:
                used = max(expected_bytes, used - LOADING_BYTES)
            temporaries = _temporary_bytes(config, mesh, backend, options, sizes, ahead, executables)
            if draft is not None:
                temporaries += _temporary_bytes(draft, mesh, backend, options, sizes)
            free, origin = _free_on_accelerator(mesh, options, stats, used, int(SPARE * temporaries))
            free = of_page * rounded_down(free // of_page)
        else:
            total = options.kv_cache_bytes or CPU_BYTES
            default = "" if options.kv_cache_bytes else " (the default)"
            free, origin = total // mesh.size, f"kv_cache_bytes={total}{default}"
        # A pool larger than every slot at its longest holds nothing but old prefixes; on CPU that would only cost.
        most = 2 * sizes.slots * pages_per_sequence(wanted_len)
        n_pages = min(free // of_page, most) if device.platform == "cpu" else free // of_page
        if backend == "gpu":
            for of_model in (c for c in (config, draft) if c is not None):
                (layer,) = KVPages.abstract(of_model.replace(n_layers=1), mesh, 1, options.kv_cache_dtype)
                page_shape = layer.kv_NPGK.sharding.shard_shape(layer.kv_NPGK.shape)[1:]
                n_pages = addressable_pages(page_shape, layer.kv_NPGK.dtype, n_pages)
    if jax.process_count() > 1:  # every process must plan the same
        n_pages = int(np.min(multihost_utils.process_allgather(np.int64(n_pages))))
    fits = n_pages * PAGE_SIZE
    if fits < 2 or (options.max_model_len and fits < options.max_model_len):
        raise ConfigError(
            f"max_model_len={wanted_len} needs {pages_per_sequence(wanted_len)} pages of {PAGE_SIZE} tokens, but "
            f"{origin} holds {max(0, n_pages)}: at most max_model_len={max(0, fits)} would fit. Lower it, use an 8-bit "
            "kv_cache_dtype or a larger mesh, or give the cache more memory."
        )
    max_model_len = min(wanted_len, fits)
    if max_model_len < wanted_len:
        logging.warning("the cache holds sequences of %d tokens, fewer than the model's %d", max_model_len, wanted_len)
    data = mesh.shape[DATA]
    tell(
        "cache: %d tokens (%d full-length sequences of %d) in %.2f GB per device, %s",
        data * fits,
        data * (n_pages // pages_per_sequence(max_model_len)),
        max_model_len,
        n_pages * of_page / 1e9,
        origin,
    )
    return PageBudget(n_pages, max_model_len)


def _free_on_accelerator(
    mesh: Mesh, options: EngineOptions, stats: dict[str, int], used: int, temporaries: int
) -> tuple[int, str]:
    """Bytes of a device that are left for pages, and in words where they come from."""
    limit = stats["bytes_limit"]
    allowed = allowed_bytes(mesh, options, limit)
    if allowed > limit:
        logging.warning(
            "memory_utilization=%.2f asks for %.1f GB of the card, but JAX was started with %.1f GB: set %s before JAX "
            "starts (the launchers do); it is too late for this process.",
            *(options.memory_utilization, allowed / 1e9, limit / 1e9, FRACTION_VARIABLES[1]),
        )
    free = min(allowed, limit) - used - temporaries
    origin = (
        f"of {min(allowed, limit) / 1e9:.1f} GB {used / 1e9:.1f} are in use and {temporaries / 1e9:.2f} kept for "
        "temporaries"
    )
    return max(0, free), origin


def allowed_bytes(mesh: Mesh, options: EngineOptions, limit: int) -> int:
    """Bytes of a device that the engine may take, where JAX has `limit`, which is a part of a GPU's memory."""
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    total = int(limit / (given_fraction() or JAX_FRACTION)) if is_gpu else limit
    return int(options.memory_utilization * total)


def rounded_down(n_pages: int) -> int:
    """A number of pages less at most a 128th: eight binary digits and zeros.

    It is part of the steps' shapes. A few bytes more or less in use must not make them others than those that are
    compiled already, on disk.
    """
    zeros = max(0, n_pages.bit_length() - 8)
    return n_pages >> zeros << zeros


def expected_in_use(mesh: Mesh, configs: Sequence[LlamaConfig]) -> int:
    """Bytes that will be in use on each device when the weights of these models will have been loaded too."""
    weights = sum(device_bytes(abstract_weights(config, mesh)) for config in configs)
    return max(map(_bytes_in_use, mesh.local_devices)) + weights


def _bytes_in_use(device: jax.Device) -> int:
    return (device.memory_stats() or {}).get("bytes_in_use", 0)


def given_fraction() -> float | None:
    """The share of a GPU's memory that the environment gives JAX, None if it does not say."""
    given = next((os.environ[name] for name in FRACTION_VARIABLES if os.environ.get(name)), None)
    return None if given is None else float(given)


def _temporary_bytes(
    config: LlamaConfig,
    mesh: Mesh,
    backend: str,
    options: EngineOptions,
    sizes: Sizes,
    ahead: bool = False,
    executables: Executables | None = None,
) -> int:
    """What the largest step takes beside weights and pages, by compiling it for a model of two layers.

    One layer's temporaries are free again when the next one starts, so that more layers do not need more.
    """
    few = config.replace(n_layers=min(2, config.n_layers))
    max_model_len = options.max_model_len or config.max_seq_len
    trial = Runner(
        few,
        mesh,
        abstract_weights(few, mesh),
        backend=backend,
        sizes=sizes,
        n_pages=pages_per_sequence(max_model_len),
        table_width=pages_per_sequence(max_model_len),
        kv_dtype=options.kv_cache_dtype,
        modes=modes_of(options),
    )
    most = trial.compile_largest(ahead)
    if executables is not None:
        executables |= trial.without_pages()
    return most
