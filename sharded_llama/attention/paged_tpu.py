"""Attention over the paged cache on TPUs: a Pallas kernel that fetches each row's pages from HBM as they are.

The grid runs over rows and blocks of queries, one after the other. For each, the pages it needs are fetched in blocks,
two in flight: while one is worked on, the next is on its way, the first block of the next row included. The sums are
those of an online softmax (Milakov and Gimelshein, 2018), in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..kv_cache import EIGHT_BIT, KVPages

KEYS = 512  # positions of a block of pages, where pages and memory allow
QUERY_ROWS = 256  # queries times heads of one kv head that are worked on at a time
BUFFER_BYTES = 4 << 20  # of the two blocks of pages on chip
TABLE_BYTES = 768 << 10  # of block tables and starts; every generation since v4 has 1 MiB of scalar memory
VMEM_BYTES = 64 << 20  # what the kernel may ask for at most; far more than it uses
LANES = 128


def supports(
    dtype: jnp.dtype, kv_dtype: jnp.dtype, head_dim: int, n_heads: int, n_kv_heads: int, page_size: int, table_size: int
) -> str | None:
    """Why the kernel cannot serve these shapes of one device, or None if it can. `table_size` is B * W."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernel takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    if jnp.dtype(kv_dtype).name in EIGHT_BIT:
        return f"the TPU kernel has no scales for a cache of {jnp.dtype(kv_dtype).name}"
    if jnp.dtype(kv_dtype) != jnp.dtype(dtype):
        return f"the TPU kernel wants queries and cache of one type, not {dtype} and {kv_dtype}"
    return None


def paged_attn_tpu(
    q_BLHK: jax.Array, pages: KVPages, tables_BW: jax.Array, start_B: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`paged_attn_reference` by the kernel; see there."""
    batch, length, n_heads, width = q_BLHK.shape
    n_pages, page_size, n_combined, _ = pages.kv_NPGK.shape
    n_kv_heads = n_combined // 2
    group = n_heads // n_kv_heads
    per_block, queries = _block_sizes(length, group, n_combined, pages, tables_BW.shape[1])
    n_query_blocks = -(-length // queries)
    q_BLGRK = q_BLHK.reshape(batch, length, n_kv_heads, group, width)
    q_BLGRK = jnp.pad(q_BLGRK, [(0, 0), (0, n_query_blocks * queries - length), (0, 0), (0, 0), (0, 0)])
    q_BGQK = jnp.moveaxis(q_BLGRK, 1, 2).reshape(batch, n_kv_heads, -1, width)
    rows = queries * group
    block = pl.BlockSpec((1, n_kv_heads, rows, width), lambda b, i, *_: (b, 0, i, 0))
    out_BGQK = pl.pallas_call(
        functools.partial(_kernel, n_tables=tables_BW.shape[1], length=length, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, n_query_blocks),
            in_specs=[block, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=block,
            scratch_shapes=[
                pltpu.VMEM((2, per_block, page_size, n_combined, width), pages.kv_NPGK.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((n_kv_heads, rows, 1), jnp.float32),
                pltpu.VMEM((n_kv_heads, rows, 1), jnp.float32),
                pltpu.VMEM((n_kv_heads, rows, width), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BGQK.shape, q_BGQK.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="paged_attention",
    )(start_B.astype(jnp.int32), jnp.clip(tables_BW, 0, n_pages - 1).reshape(-1), q_BGQK, pages.kv_NPGK)
    out_BGLRK = out_BGQK.reshape(batch, n_kv_heads, -1, group, width)[:, :, :length]
    return jnp.moveaxis(out_BGLRK, 2, 1).reshape(q_BLHK.shape)


def _block_sizes(length: int, group: int, n_combined: int, pages: KVPages, n_tables: int) -> tuple[int, int]:
    """Pages and queries that are worked on at a time."""
    _, page_size, _, width = pages.kv_NPGK.shape
    # On chip, the last two axes come in tiles of 32 bytes by 128 numbers.
    itemsize = pages.kv_NPGK.dtype.itemsize
    page_bytes = page_size * math.ceil(n_combined * itemsize / 32) * 32 * math.ceil(width / LANES) * LANES
    per_block = max(1, min(KEYS // page_size, BUFFER_BYTES // (2 * page_bytes), n_tables))
    queries = max(8, QUERY_ROWS // group // 8 * 8)
    return per_block, min(length, queries)


def _kernel(
    start_B, tables, q_ref, kv_hbm, out_ref, buffers, arrived, first_slot, peak_ref, denominator_ref, weighted_ref,
    *, n_tables: int, length: int, group: int,
):  # fmt: skip
    _, per_block, page_size, n_combined, width = buffers.shape
    block = per_block * page_size
    queries = q_ref.shape[2] // group
    n_query_blocks = pl.num_programs(1)
    program, n_programs = pl.program_id(0) * n_query_blocks + pl.program_id(1), pl.num_programs(0) * n_query_blocks

    def last_seen(of):
        """The position that the last query of a program sees."""
        last_query = jnp.minimum((of % n_query_blocks + 1) * queries, length) - 1
        return jnp.minimum(start_B[of // n_query_blocks] + last_query, n_tables * page_size - 1)

    def for_pages(of, i, slot, act):
        for j in range(per_block):
            place = i * per_block + j

            @pl.when(place * page_size <= last_seen(of))
            def _(j=j, place=place):
                page = tables[of // n_query_blocks * n_tables + place]
                act(pltpu.make_async_copy(kv_hbm.at[page], buffers.at[slot, j], arrived.at[slot]))

    @pl.when(program == 0)
    def _():
        first_slot[0] = 0
        for_pages(program, 0, 0, lambda copy: copy.start())

    peak_ref[...] = jnp.full_like(peak_ref, -jnp.inf)
    denominator_ref[...] = jnp.zeros_like(denominator_ref)
    weighted_ref[...] = jnp.zeros_like(weighted_ref)
    last = last_seen(program)
    n_blocks = last // block + 1
    slot_0 = first_slot[0]
    first_query = start_B[pl.program_id(0)] + pl.program_id(1) * queries

    def attend(i, _):
        slot = (slot_0 + i) % 2
        ends = i + 1 == n_blocks
        after, after_i = jnp.where(ends, program + 1, program), jnp.where(ends, 0, i + 1)

        @pl.when(after < n_programs)
        def _():
            for_pages(after, after_i, 1 - slot, lambda copy: copy.start())

        for_pages(program, i, slot, lambda copy: copy.wait())
        row_position = first_query + jax.lax.broadcasted_iota(jnp.int32, (queries * group, block), 0) // group
        visible = i * block + jax.lax.broadcasted_iota(jnp.int32, (queries * group, block), 1) <= row_position
        fetched = i * block + jax.lax.broadcasted_iota(jnp.int32, (block, width), 0) <= last
        for g in range(n_combined // 2):
            k = buffers[slot, :, :, 2 * g, :].reshape(block, width)
            v = buffers[slot, :, :, 2 * g + 1, :].reshape(block, width)
            v = jnp.where(fetched, v, jnp.zeros_like(v))
            precision = jax.lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
            dot = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
            scores = dot(q_ref[0, g], k, (((1,), (1,)), ((), ()))) * width**-0.5
            scores = jnp.where(visible, scores, -jnp.inf)
            peak = jnp.maximum(peak_ref[g], jnp.max(scores, axis=1, keepdims=True))
            probs = jnp.exp(scores - peak)
            shrink = jnp.exp(peak_ref[g] - peak)
            peak_ref[g] = peak
            denominator_ref[g] = denominator_ref[g] * shrink + jnp.sum(probs, axis=1, keepdims=True)
            weighted_ref[g] = weighted_ref[g] * shrink + dot(probs.astype(v.dtype), v, (((1,), (0,)), ((), ())))

    jax.lax.fori_loop(0, n_blocks, attend, None)
    first_slot[0] = (slot_0 + n_blocks) % 2
    out_ref[0] = (weighted_ref[...] / denominator_ref[...]).astype(out_ref.dtype)
