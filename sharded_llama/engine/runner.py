"""The compiled steps of one engine and the state that they work on: what every process of a run executes alike."""

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from ..config import LlamaConfig
from ..kv_cache import KVPages, pages_layout
from ..sampling import Sampled
from ..sharding import DATA, named_sharding, put
from ..weights import XfmrWeights, abstract_weights
from .options import Sizes
from .steps import Column, DeviceState, StepShape, choose, copy_pages, decode_several, forward, set_tables

TABLE_CHANGES, PAGE_COPIES = 256, 16  # entries of each data shard that one call changes


class Work(NamedTuple):
    """What the device is to do next, as host arrays: the same in every process.

    Global arrays, the data shards' parts one after the other. Without rows only the tables and pages are changed.
    """

    shape: StepShape | None
    n_steps: int
    greedy: bool  # no row needs more than the most likely token
    rows_RX: np.ndarray  # int32, (data * R, Column.COUNT)
    tokens_CQ: np.ndarray  # int32, (data * C, Q)
    tables_U3: np.ndarray | None = None  # int32, (data * TABLE_CHANGES, 3)
    copies_C2: np.ndarray | None = None  # int32, (data * PAGE_COPIES, 2)


class Runner:
    """Executables by shape, compiled ahead or on first use, and the device state that they replace step by step."""

    def __init__(
        self,
        config: LlamaConfig,
        mesh: Mesh,
        weights: XfmrWeights,
        *,
        backend: str,
        sizes: Sizes,
        n_pages: int,
        table_width: int,
        kv_dtype: str,
    ):
        self.config, self.mesh, self.weights, self.backend, self.sizes = config, mesh, weights, backend, sizes
        self.n_pages, self.table_width, self.kv_dtype = n_pages, table_width, kv_dtype
        self._compiled: dict[tuple, Any] = {}
        self.compile_s = 0.0  # of all executables, one after the other
        self._abstract_weights = abstract_weights(config, mesh)
        self._abstract_pages = KVPages.abstract(config, mesh, n_pages, kv_dtype)
        self.state: DeviceState | None = None

    def compile_all(self, progress: bool = True) -> None:
        """Compiles every step that can be asked for, several at a time."""
        start = time.perf_counter()
        jobs = self._all_jobs()
        bar = tqdm(total=len(jobs), desc="compiling", unit="step", disable=None if progress else True)
        with ThreadPoolExecutor(max_workers=16) as pool, bar:
            for _ in pool.map(lambda job: job(), jobs):
                bar.update()
        logging.info("compiled %d executables: %.1f s", len(self._compiled), time.perf_counter() - start)

    def compile_largest(self) -> None:
        """Compiles the forward pass and the sampler of the largest step alone."""
        shape = max(self.sizes.shapes, key=lambda s: s.n_tokens)
        self._forward(shape)
        self._choose(shape.n_rows, greedy=False)
        if self.sizes.decode_steps > 1:
            single = max((s for s in self.sizes.shapes if not s.n_blocks), key=lambda s: s.n_tokens)
            self._decode_several(single, self.sizes.decode_steps, greedy=False)

    def start(self) -> None:
        """Makes the pages and what else stays on the device."""
        data = self.mesh.shape[DATA]
        self.state = DeviceState(
            KVPages.new(self.config, self.mesh, self.n_pages, self.kv_dtype),
            self.put(np.full((data * self.sizes.slots, self.table_width), self.n_pages, np.int32)),
            self.put(np.zeros(data * self.sizes.slots, np.int32)),
        )

    def execute(self, work: Work) -> Sampled | None:
        """Queues the work on the device; returns what it will have sampled, already on its way to the host."""
        pages, tables, tokens = self.state
        if work.tables_U3 is not None:
            tables = self._set_tables()(tables, self.put(work.tables_U3))
        if work.copies_C2 is not None:
            pages = self._copy_pages()(pages, self.put(work.copies_C2))
        self.state = DeviceState(pages, tables, tokens)
        if work.shape is None:
            return None
        rows = self.put(work.rows_RX)
        if work.n_steps > 1:
            run = self._decode_several(work.shape, work.n_steps, work.greedy)
            sampled, pages, tokens = run(self.weights, pages, tables, tokens, rows)
        else:
            run = self._forward(work.shape)
            chunks = self.put(work.tokens_CQ) if work.shape.n_blocks else None
            logits, normalizer, pages = run(self.weights, pages, tables, tokens, rows, chunks)
            sampled, tokens = self._choose(work.shape.n_rows, work.greedy)(logits, normalizer, tokens, rows)
        self.state = DeviceState(pages, tables, tokens)
        for x in jax.tree.leaves(sampled):
            x.copy_to_host_async()
        return sampled

    @property
    def n_compiled(self) -> int:
        """Number of executables made so far."""
        return len(self._compiled)

    def temporary_bytes(self) -> int:
        """Most bytes that any compiled step takes on a device beside weights and pages."""
        return max(_beside(key, compiled.memory_analysis()) for key, compiled in self._compiled.items())

    def put(self, array: np.ndarray) -> jax.Array:
        """A host array, the same in every process, split over `data`."""
        return put(self.mesh, "tokens", array)

    def _all_jobs(self) -> list[Callable[[], Any]]:
        sizes = self.sizes
        jobs: list[Callable[[], Any]] = [functools.partial(self._forward, s) for s in reversed(sizes.shapes)]
        for greedy in (True, False):
            if sizes.decode_steps > 1:
                single = [s for s in sizes.shapes if not s.n_blocks]
                jobs += [functools.partial(self._decode_several, s, sizes.decode_steps, greedy) for s in single]
            jobs += [functools.partial(self._choose, n, greedy) for n in sorted({s.n_rows for s in sizes.shapes})]
        return [*jobs, self._set_tables, self._copy_pages]

    def _forward(self, shape: StepShape) -> Any:
        def run(weights: XfmrWeights, pages: Any, tables: Any, tokens: Any, rows: Any, chunks: Any) -> tuple:
            state = DeviceState(pages, tables, tokens)
            return forward(weights, state, rows, chunks, run_length=self.sizes.run_length, **self._static)

        args = (
            self._abstract_weights,
            self._abstract_pages,
            *self._abstract_slots(),
            self._rows(shape.n_rows),
            self._array((shape.n_blocks, shape.block)) if shape.n_blocks else None,
        )
        out = (self._sharding("last_logits"), self._sharding("tokens"), pages_layout(self._abstract_pages))
        return self._compile(("forward", shape), run, args, donate=(1,), out=out)

    def _choose(self, n_rows: int, greedy: bool) -> Any:
        vocab = self._abstract_weights.tok_embeddings.shape[0]
        acc = jnp.promote_types(self.config.jnp_dtype, jnp.float32)
        data = self.mesh.shape[DATA]
        logits = jax.ShapeDtypeStruct((data * n_rows, vocab), acc, sharding=self._sharding("last_logits"))
        args = (logits, self._array((n_rows,), acc), self._abstract_slots()[1], self._rows(n_rows))
        run = functools.partial(choose, config=self.config, mesh=self.mesh, greedy=greedy)
        out = (self._sharding("replicated"), self._sharding("tokens"))
        return self._compile(("choose", n_rows, greedy), run, args, donate=(2,), out=out)

    def _decode_several(self, shape: StepShape, n_steps: int, greedy: bool) -> Any:
        def run(weights: XfmrWeights, pages: Any, tables: Any, tokens: Any, rows: Any) -> tuple:
            state = DeviceState(pages, tables, tokens)
            sampled, state = decode_several(weights, state, rows, n_steps=n_steps, greedy=greedy, **self._static)
            return sampled, state.pages, state.tokens_S

        args = (self._abstract_weights, self._abstract_pages, *self._abstract_slots(), self._rows(shape.n_rows))
        out = (self._sharding("replicated"), pages_layout(self._abstract_pages), self._sharding("tokens"))
        return self._compile(("decode_several", shape, n_steps, greedy), run, args, donate=(1, 3), out=out)

    def _set_tables(self) -> Any:
        args = (self._abstract_slots()[0], self._array((TABLE_CHANGES, 3)))
        run = functools.partial(set_tables, mesh=self.mesh)
        return self._compile(("set_tables",), run, args, donate=(0,), out=self._sharding("tokens"))

    def _copy_pages(self) -> Any:
        args = (self._abstract_pages, self._array((PAGE_COPIES, 2)))
        run = functools.partial(copy_pages, mesh=self.mesh)
        return self._compile(("copy_pages",), run, args, donate=(0,), out=pages_layout(self._abstract_pages))

    @property
    def _static(self) -> dict[str, Any]:
        return {"config": self.config, "mesh": self.mesh, "backend": self.backend}

    def _sharding(self, name: str) -> Any:
        return named_sharding(self.mesh, name)

    def _array(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array of this shape on each data shard."""
        shape = (self.mesh.shape[DATA] * shape[0], *shape[1:])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding("tokens"))

    def _rows(self, n_rows: int) -> jax.ShapeDtypeStruct:
        return self._array((n_rows, Column.COUNT))

    def _abstract_slots(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        return self._array((self.sizes.slots, self.table_width)), self._array((self.sizes.slots,))

    def _compile(self, key: tuple, run: Callable, args: tuple, *, donate: tuple[int, ...], out: Any) -> Any:
        if key not in self._compiled:
            # Outputs keep the layout of the inputs they replace; what is donated is updated in place.
            start = time.perf_counter()
            jitted = jax.jit(run, donate_argnums=donate, out_shardings=out)
            self._compiled[key] = jitted.lower(*args).compile()
            seconds = time.perf_counter() - start
            self.compile_s += seconds
            logging.vlog(1, "compiled %s: %.1f s", key, seconds)
        return self._compiled[key]


def _beside(key: tuple, memory: Any) -> int:
    """Bytes of an executable's temporaries and of logits: those that it makes or takes, and those of another step."""
    logits = memory.argument_size_in_bytes if key[0] == "choose" else 0
    return memory.temp_size_in_bytes + 2 * (logits + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes))
