"""The compiled steps of one engine and the state that they work on: what every process of a run executes alike."""

import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from ..config import LlamaConfig
from ..kv_cache import KVPages, pages_layout
from ..sampling import Mode, Sampled
from ..sampling.slots import KNOWN_TOKENS, SlotSampling, abstract_slots, new_slots, pack_slot
from ..sharding import DATA, named_sharding, put
from ..weights import XfmrWeights, abstract_weights
from .compilation import COMPILE_THREADS, tell
from .options import Sizes
from .programs import lower, programs_folder
from .steps import (
    Column,
    DeviceState,
    Forwarded,
    StepShape,
    change_slots,
    choose,
    copy_pages,
    count_known,
    decode_several,
    forward,
    set_tables,
)

TABLE_CHANGES, PAGE_COPIES = 256, 16  # entries of each data shard that one call changes
SLOT_CHANGES = 8  # slots of each data shard that one call sets; or all of them
WITHOUT_PAGES = {"choose", "change_slots", "count_known", "new_slots"}  # what knows nothing of pages and layers
# XLA's loops ask the host after every round unless they are part of a CUDA graph, which they are not by default.
LOOPS_ON_DEVICE = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,WHILE"}
# From so many rows on products by cuBLAS are faster than those that XLA generates, and sooner compiled. What cuBLAS
# chooses for them itself is as fast as what measuring its kernels finds.
MANY_TOKENS = 64
CUBLAS_UNTUNED = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}

Executables = dict[tuple, Any]  # by what they do, in which shape and mode
Job = tuple[Any, ...]  # a Runner's method that compiles, and what it is called with


class Work(NamedTuple):
    """What the device is to do next, as host arrays: the same in every process.

    Global arrays, the data shards' parts one after the other. Changes come first, then rows. Without rows there are
    only changes, and `chooses` ends a step whose rows came with chooses=False: what they allow was not known yet.
    """

    shape: StepShape | None = None
    n_steps: int = 0
    mode: Mode = Mode.GREEDY
    rows_RX: np.ndarray | None = None  # int32, (data * R, Column.COUNT)
    tokens_CQ: np.ndarray | None = None  # int32, (data * C, Q)
    tables_U3: np.ndarray | None = None  # int32, (data * TABLE_CHANGES, 3)
    copies_C2: np.ndarray | None = None  # int32, (data * PAGE_COPIES, 2)
    slots_UX: np.ndarray | None = None  # int32, (data * U, 1 + pack_slot's), U one of `Runner.slot_changes`
    known_UX: np.ndarray | None = None  # int32, (data, 2 + KNOWN_TOKENS)
    chooses: bool = False
    for_draft: bool = False  # of the model that guesses


class Runner:
    """Executables by shape, compiled ahead or on first use, and the device state that they replace step by step."""

    def __init__(
        self,
        config: LlamaConfig,
        mesh: Mesh,
        weights: XfmrWeights | None,
        *,
        backend: str,
        sizes: Sizes,
        n_pages: int,
        table_width: int,
        kv_dtype: str,
        modes: Sequence[Mode] = (Mode.GREEDY, Mode.SAMPLE, Mode.LOGPROBS),
        executables: Executables | None = None,
    ):
        """weights: None if they are set later, before anything is executed. executables: that are compiled already."""
        self.config, self.mesh, self.weights, self.backend, self.sizes = config, mesh, weights, backend, sizes
        self.n_pages, self.table_width, self.kv_dtype = n_pages, table_width, kv_dtype
        self.modes = modes  # that may be asked for
        self._compiled: Executables = dict(executables or {})
        self.compile_s = 0.0  # of all executables, one after the other
        self._abstract_weights = abstract_weights(config, mesh)
        self._abstract_pages = KVPages.abstract(config, mesh, n_pages, kv_dtype)
        padded_size = self._abstract_weights.tok_embeddings.shape[0]
        self._abstract_sampling = abstract_slots(mesh, sizes.slots, config.vocab_size, padded_size)
        self.slot_changes = sorted({min(SLOT_CHANGES, sizes.slots), sizes.slots})
        self.state: DeviceState | None = None
        self._forwarded: tuple | None = None  # logits that wait to be chosen from
        self._tracing = threading.Lock()
        self._tuning: list[Future] = []  # what is being compiled and measured on the GPU meanwhile
        self._programs = programs_folder(mesh)
        kinds = tuple(device.device_kind for device in mesh.devices.flat)
        # All that the steps are made of beside their shapes and modes.
        self._identity = (config, tuple(mesh.shape.items()), kinds, backend, sizes, n_pages, table_width, kv_dtype)

    def compile_all(self, progress: bool = True, drafts: int = 0, check: Callable[[], None] = lambda: None) -> None:
        """Compiles every step that can be asked for, several at a time.

        drafts: of a model that only guesses: how many tokens at once. check: called after each; what it raises ends the
        compiling.
        """
        start = time.perf_counter()
        jobs = self._drafting_jobs(drafts) if drafts else self._all_jobs()
        of_shapes = (self._forward, self._decode_several)
        tuned = [job for job in jobs if job[0] in of_shapes and self._is_tuned(job[1])]
        others = [job for job in jobs if job not in tuned]
        bar = tqdm(total=len(jobs), desc="compiling", unit="step", disable=None if progress else True)
        with _compiling() as pool, bar:
            self._tuning = [pool.submit(_call, job) for job in tuned]
            under_way = [*self._tuning, *(pool.submit(_call, job) for job in others)]
            try:
                for future in under_way:
                    future.result()
                    bar.update()
                    check()
            finally:
                for future in under_way:
                    future.cancel()
        tell("compiled %d executables: %.1f s", len(jobs), time.perf_counter() - start)

    def compile_largest(self, ahead: bool = False) -> int:
        """Compiles the forward pass and the sampler of the largest step, and with `ahead` all that takes no pages.

        Returns the most bytes that the former take on a device beside weights and pages, and what is kept of slots.
        """
        shape = max(self.sizes.shapes, key=lambda s: s.n_tokens)
        most = max(self.modes)
        n_logits = max(s.n_logits for s in self.sizes.shapes)
        jobs: list[Job] = [(self._forward, shape, most == Mode.ENTROPY), (self._choose, n_logits, most)]
        if self.sizes.decode_steps > 1:
            single = max((s for s in self.sizes.shapes if not s.n_blocks), key=lambda s: s.n_tokens)
            jobs.append((self._decode_several, single, self.sizes.decode_steps, most))
        others = [job for job in [*self._jobs_without_pages(), (self._new_slots,)] if job not in jobs]
        with _compiling() as pool:
            compiled = list(pool.map(_call, [*jobs, *(others if ahead else ())]))[: len(jobs)]
        temporaries = (_beside(j[0] == self._choose, x.memory_analysis()) for j, x in zip(jobs, compiled, strict=True))
        return max(temporaries) + device_bytes(self._abstract_sampling)

    def without_pages(self) -> Executables:
        """What is compiled already of all that takes no pages; it serves models of any number of layers."""
        return {key: x for key, x in self._compiled.items() if key[0] in WITHOUT_PAGES}

    def start(self) -> None:
        """Makes the pages and what else stays on the device."""
        data = self.mesh.shape[DATA]
        self.state = DeviceState(
            KVPages.new(self.config, self.mesh, self.n_pages, self.kv_dtype),
            self.put(np.full((data * self.sizes.slots, self.table_width), self.n_pages, np.int32)),
            self.put(np.zeros(data * self.sizes.slots, np.int32)),
            self._new_slots()(),
        )

    def execute(self, work: Work) -> Sampled | None:
        """Queues the work on the device; returns what it will have sampled, already on its way to the host."""
        pages, tables, tokens, slots = self.state
        if work.tables_U3 is not None:
            tables = self._set_tables()(tables, self.put(work.tables_U3))
        if work.copies_C2 is not None:
            pages = self._copy_pages()(pages, self.put(work.copies_C2))
        if work.slots_UX is not None:
            n_changes = len(work.slots_UX) // self.mesh.shape[DATA]
            slots = self._change_slots(n_changes)(slots, self.put(work.slots_UX))
        if work.known_UX is not None:
            slots = slots._replace(counts_SV=self._count_known()(slots.counts_SV, self.put(work.known_UX)))
        sampled = None
        if work.shape is not None:
            rows = self.put(work.rows_RX)
            if work.n_steps > 1:
                run = self._decode_several(work.shape, work.n_steps, work.mode)
                given = None if work.mode == Mode.GREEDY else slots
                sampled, pages, tokens, given = run(self.weights, pages, tables, tokens, given, rows)
                slots = slots if given is None else given
            else:
                run = self._forward(work.shape, work.mode == Mode.ENTROPY)
                chunks = self.put(work.tokens_CQ) if work.shape.n_blocks else None
                forwarded, pages, rows = run(self.weights, pages, tables, tokens, rows, chunks)
                # A model that guesses computes prompts for their keys and values alone.
                self._forwarded = None if work.for_draft else (work.shape.n_logits, work.mode, forwarded, rows)
        if work.chooses and work.n_steps <= 1:
            (n_rows, mode, forwarded, rows), self._forwarded = self._forwarded, None
            given = None if mode == Mode.GREEDY else slots
            sampled, tokens, given = self._choose(n_rows, mode)(forwarded, tokens, given, rows)
            slots = slots if given is None else given
        self.state = DeviceState(pages, tables, tokens, slots)
        for x in jax.tree.leaves(sampled):
            x.copy_to_host_async()
        return sampled

    @property
    def n_compiled(self) -> int:
        """Number of executables made so far."""
        return len(self._compiled)

    def put(self, array: np.ndarray) -> jax.Array:
        """A host array, the same in every process, split over `data`."""
        return put(self.mesh, "tokens", array)

    def _all_jobs(self) -> list[Job]:
        sizes = self.sizes
        jobs: list[Job] = [(self._forward, s) for s in sizes.shapes]
        if Mode.ENTROPY in self.modes:
            jobs += [(self._forward, s, True) for s in sizes.shapes]
        if sizes.decode_steps > 1:
            single = [s for s in sizes.shapes if not s.n_blocks]
            jobs += [(self._decode_several, s, sizes.decode_steps, mode) for mode in self.modes for s in single]
        return [*jobs, *self._jobs_without_pages(), (self._set_tables,), (self._copy_pages,)]

    def _jobs_without_pages(self) -> list[Job]:
        n_logits = sorted({s.n_logits for s in self.sizes.shapes}, reverse=True)
        jobs: list[Job] = [(self._choose, n, mode) for mode in self.modes for n in n_logits]
        return [*jobs, *((self._change_slots, n) for n in self.slot_changes), (self._count_known,)]

    def _drafting_jobs(self, n_steps: int) -> list[Job]:
        """What a model needs that computes prompts and guesses `n_steps` tokens at once."""
        shapes = self.sizes.shapes
        jobs: list[Job] = [(self._forward, s) for s in shapes]
        singles = [s for s in shapes if not s.n_blocks]
        modes = (Mode.GREEDY, Mode.SAMPLE)
        jobs += [(self._decode_several, s, n_steps, mode) for s in singles for mode in modes]
        return [*jobs, (self._set_tables,), (self._copy_pages,)]

    def _forward(self, shape: StepShape, with_metrics: bool = False) -> Any:
        def run(weights: XfmrWeights, pages: Any, tables: Any, tokens: Any, rows: Any, chunks: Any) -> tuple:
            state = DeviceState(pages, tables, tokens, None)
            static = {"run_length": self.sizes.run_length, "n_chosen": shape.n_chosen, "with_metrics": with_metrics}
            return forward(weights, state, rows, chunks, **static, **self._static)

        args = (
            self._abstract_weights,
            self._abstract_pages,
            *self._abstract_slots(),
            self._rows(shape.n_rows),
            self._array((shape.n_blocks, shape.block)) if shape.n_blocks else None,
        )
        forwarded = self._abstract_forwarded(shape.n_logits, with_metrics)
        out = (_shardings(forwarded), pages_layout(self._abstract_pages), self._sharding("tokens"))
        key = ("forward", shape, with_metrics)
        options = LOOPS_ON_DEVICE if with_metrics else {}
        return self._compile(key, run, args, donate=(1,), out=out, gpu_options=options, shape=shape)

    def _choose(self, n_rows: int, mode: Mode) -> Any:
        forwarded = self._abstract_forwarded(n_rows, mode == Mode.ENTROPY)
        slots = self._sampling_of(mode)
        args = (forwarded, self._abstract_slots()[1], slots, self._rows(n_rows))
        run = functools.partial(choose, config=self.config, mesh=self.mesh, mode=mode)
        out = (self._sharding("replicated"), self._sharding("tokens"), _shardings(slots))
        return self._compile(("choose", n_rows, mode), run, args, donate=(1, 2), out=out, gpu_options=LOOPS_ON_DEVICE)

    def _abstract_forwarded(self, n_rows: int, with_metrics: bool) -> Forwarded:
        vocab, data = self._abstract_weights.tok_embeddings.shape[0], self.mesh.shape[DATA]
        acc = jnp.promote_types(self.config.jnp_dtype, jnp.float32)
        logits = jax.ShapeDtypeStruct((data * n_rows, vocab), acc, sharding=self._sharding("last_logits"))
        metrics = (self._array((n_rows, 4), jnp.float32), self._array((n_rows,))) if with_metrics else ()
        return Forwarded(logits, self._array((n_rows,), acc), *metrics)

    def _decode_several(self, shape: StepShape, n_steps: int, mode: Mode) -> Any:
        def run(weights: XfmrWeights, pages: Any, tables: Any, tokens: Any, slots: Any, rows: Any) -> tuple:
            state = DeviceState(pages, tables, tokens, slots)
            sampled, state = decode_several(weights, state, rows, n_steps=n_steps, mode=mode, **self._static)
            return sampled, state.pages, state.tokens_S, state.slots

        slots = self._sampling_of(mode)
        args = (self._abstract_weights, self._abstract_pages, *self._abstract_slots(), slots, self._rows(shape.n_rows))
        of_pages = pages_layout(self._abstract_pages)
        out = (self._sharding("replicated"), of_pages, self._sharding("tokens"), _shardings(slots))
        key = ("decode_several", shape, n_steps, mode)
        return self._compile(key, run, args, donate=(1, 3, 4), out=out, shape=shape)

    def _is_tuned(self, shape: StepShape) -> bool:
        """Whether XLA measures on the GPU which products are fastest in a step."""
        return self._on_gpu and shape.n_tokens < MANY_TOKENS

    @property
    def _on_gpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "gpu"

    def _sampling_of(self, mode: Mode) -> SlotSampling | None:
        """What the sampler of a mode is given of the slots: a greedy one nothing."""
        return None if mode == Mode.GREEDY else self._abstract_sampling

    def _new_slots(self) -> Any:
        run = functools.partial(new_slots, self._abstract_sampling)
        return self._compile(("new_slots",), run, (), donate=(), out=_shardings(self._abstract_sampling))

    def _change_slots(self, n_changes: int) -> Any:
        width = 1 + len(pack_slot(self.config.vocab_size))
        args = (self._abstract_sampling, self._array((n_changes, width)))
        run = functools.partial(change_slots, mesh=self.mesh)
        return self._compile(("change_slots", n_changes), run, args, donate=(0,), out=_shardings(args[0]))

    def _count_known(self) -> Any:
        counts = self._abstract_sampling.counts_SV
        args = (counts, self._array((1, 2 + KNOWN_TOKENS)))
        run = functools.partial(count_known, mesh=self.mesh)
        return self._compile(("count_known",), run, args, donate=(0,), out=counts.sharding)

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

    def _compile(
        self,
        key: tuple,
        run: Callable,
        args: tuple,
        *,
        donate: tuple[int, ...],
        out: Any,
        gpu_options: dict[str, Any] | None = None,
        shape: StepShape | None = None,
    ) -> Any:
        """The executable of what `key` names. shape: of a step, which has products."""
        if key not in self._compiled:
            tuned = shape is not None and self._is_tuned(shape)
            options = (gpu_options or {}) | (CUBLAS_UNTUNED if shape is not None and not tuned else {})
            with self._tracing:  # Python's own work: more threads at a time would only hinder one another, and others
                start = time.perf_counter()
                # Outputs keep the layout of the inputs they replace; what is donated is updated in place.
                identity = (key, *self._identity)
                lowered = lower(run, args, donate=donate, out=out, folder=self._programs, identity=identity)
                traced = time.perf_counter()
            if not tuned:  # loading a program and measuring another one hold each other up
                wait(self._tuning)
            waited = time.perf_counter()
            self._compiled[key] = lowered.compile(compiler_options=options if self._on_gpu else None)
            seconds = traced - start + time.perf_counter() - waited
            self.compile_s += seconds
            logging.vlog(1, "compiled %s: %.1f s", key, seconds)
        return self._compiled[key]


def _shardings(arrays: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, arrays)


def device_bytes(arrays: Any) -> int:
    """Bytes that a tree of arrays, real or abstract, takes on each of its devices."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def _compiling() -> ThreadPoolExecutor:
    """More threads than compile at a time: many wait, for those that are tuned."""
    return ThreadPoolExecutor(max_workers=32, thread_name_prefix=COMPILE_THREADS)


def _call(job: Job) -> Any:
    method, *arguments = job
    return method(*arguments)


def _beside(is_choice: bool, memory: Any) -> int:
    """Bytes of an executable's temporaries and of logits: those that it makes or takes, and those of another step."""
    logits = memory.argument_size_in_bytes - memory.alias_size_in_bytes if is_choice else 0
    return memory.temp_size_in_bytes + 2 * (logits + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes))
