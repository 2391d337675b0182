"""Attention over the paged cache on TPUs. Pages stay in HBM as they are; the kernels fetch those that a row needs.

Two kernels with one result. JAX's ragged paged attention serves head widths of whole vector registers. Ours serves the
rest: heads 64 wide, odd numbers of kv heads, larger tables. JAX's cannot be run by an interpreter; ours can.

The pages must stand row-major in HBM, last axis innermost. That is the compiler's own choice for heads 128 wide whose
number per device is a power of two. For others it prefers an order that saves padding, and then copies the whole pool
in every layer, whatever reads it: pin `jax.experimental.layout.Format(Layout((0, 1, 2, 3)), sharding)` on the pages of
every compiled step. Heads 64 wide then take twice their size.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from ..kv_cache import EIGHT_BIT, KVPages

KEYS = 512  # positions of a block of pages, where pages and memory allow
ROWS, ROWS_DECODING = 128, 32  # queries times query heads of one kv head that are worked on at a time
BUFFER_BYTES = 8 << 20  # of two blocks of pages on chip
VMEM_BYTES = 48 << 20  # what a kernel may ask for; the compiler's default of 16 MiB is less than wide models need
SMEM_BYTES = 1000 << 10  # for block tables and starts, of 1 MiB of scalar memory; the kernels need some themselves
LANES, TILE_BYTES = 128, 32  # on chip the last axis comes in lanes, the one before in tiles of so many bytes


def supports(
    dtype: jnp.dtype,
    kv_dtype: jnp.dtype,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    page_size: int,
    batch: int,
    n_tables: int,
) -> str | None:
    """Why no kernel can serve these shapes of one device, or None if one can.

    Args:
      dtype, kv_dtype: of the queries and of the pages.
      n_heads, n_kv_heads: of one device.
      batch, n_tables: rows and pages per row, the block tables' shape.
    """
    dtype, kv_dtype = jnp.dtype(dtype), jnp.dtype(kv_dtype)
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernels take bfloat16 and float32, not {dtype}"
    if kv_dtype.name in EIGHT_BIT:
        return f"the TPU kernels know no scales of single heads, which a cache of {kv_dtype} has"
    if kv_dtype != dtype:
        return f"the TPU kernels want queries and cache of one type, not {dtype} and {kv_dtype}"
    if head_dim % 64:
        return f"the TPU kernels take heads that are a multiple of 64 wide, not {head_dim}"
    if n_heads % n_kv_heads:
        return f"{n_heads} query heads cannot share {n_kv_heads} kv heads equally"
    if page_size % 8:
        return f"the TPU kernels take pages of a multiple of 8 positions, not {page_size}"
    if _page_bytes(page_size, 2 * n_kv_heads, head_dim, dtype) > BUFFER_BYTES // 2:
        return (
            f"a page of {page_size} positions of {n_kv_heads} kv heads has more than {BUFFER_BYTES // 2} bytes on chip"
        )
    if 4 * batch * (n_tables + 1) > SMEM_BYTES:
        return f"block tables of {batch} x {n_tables} pages are more than the {SMEM_BYTES} bytes of scalar memory"
    return None


def paged_attn_tpu(
    q_BLHK: jax.Array, pages: KVPages, tables_BW: jax.Array, start_B: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`paged_attn_reference` of shapes that `supports` accepts. Returns (B, L, H, K) in q's dtype.

    Float32 products are full precision. `interpret` runs our kernel on the CPU, for shapes of JAX's kernel too.
    """
    if not interpret and _ragged_serves(pages.kv_NPGK, tables_BW.shape):
        return _by_jax(q_BLHK, pages.kv_NPGK, tables_BW, start_B)
    return _by_ours(q_BLHK, pages.kv_NPGK, tables_BW, start_B, interpret)


def _page_bytes(page_size: int, n_combined: int, width: int, dtype: jnp.dtype) -> int:
    """Bytes of a page on chip, padding included; keys and values are `n_combined` heads."""
    rows = math.ceil(n_combined * jnp.dtype(dtype).itemsize / TILE_BYTES) * TILE_BYTES
    return page_size * rows * math.ceil(width / LANES) * LANES


def _blocks(q_BLHK: jax.Array, kv_NPGK: jax.Array, n_tables: int) -> tuple[int, int]:
    """How many pages and how many queries are worked on at a time."""
    _, page_size, n_combined, width = kv_NPGK.shape
    fitting = BUFFER_BYTES // (2 * _page_bytes(page_size, n_combined, width, kv_NPGK.dtype))
    group = q_BLHK.shape[2] // (n_combined // 2)
    queries = max(1, ROWS_DECODING // group) if q_BLHK.shape[1] == 1 else max(8, ROWS // group // 8 * 8)
    return max(1, min(KEYS // page_size, fitting, n_tables)), queries


def _ragged_serves(kv_NPGK: jax.Array, tables_shape: tuple[int, int]) -> bool:
    """Whether JAX's kernel takes these pages and tables; it pads tables to 8 rows of 128."""
    n_kv_heads, width = kv_NPGK.shape[2] // 2, kv_NPGK.shape[3]
    table_bytes = 4 * math.ceil(tables_shape[0] / 8) * 8 * math.ceil(tables_shape[1] / LANES) * LANES
    tiled = n_kv_heads in (1, 2, 4) or n_kv_heads % 8 == 0
    return tiled and width % LANES == 0 and table_bytes + 8 * (tables_shape[0] + 1) <= SMEM_BYTES


def _by_jax(q_BLHK: jax.Array, kv_NPGK: jax.Array, tables_BW: jax.Array, start_B: jax.Array) -> jax.Array:
    per_block, queries = _blocks(q_BLHK, kv_NPGK, tables_BW.shape[1])
    args = ragged_arguments(q_BLHK, kv_NPGK, tables_BW, start_B)
    with jax.default_matmul_precision("highest" if q_BLHK.dtype == jnp.float32 else "default"):
        out_THK = ragged_paged_attention(
            *args,
            sm_scale=q_BLHK.shape[-1] ** -0.5,
            num_kv_pages_per_block=per_block,
            num_queries_per_block=min(queries, args[0].shape[0]),
            vmem_limit_bytes=VMEM_BYTES,
        )
    return out_THK.reshape(q_BLHK.shape)


def ragged_arguments(
    q_BLHK: jax.Array, kv_NPGK: jax.Array, tables_BW: jax.Array, start_B: jax.Array
) -> tuple[jax.Array, ...]:
    """What `ragged_paged_attention` takes by place: queries of all rows (T, H, K), pages, the length of each row with
    its queries, its pages, where its queries start, and the number of rows."""
    batch, length = q_BLHK.shape[:2]
    return (
        q_BLHK.reshape(-1, *q_BLHK.shape[2:]),
        kv_NPGK,
        (start_B + length).astype(jnp.int32),
        jnp.clip(tables_BW, 0, kv_NPGK.shape[0] - 1).astype(jnp.int32),
        length * jnp.arange(batch + 1, dtype=jnp.int32),
        jnp.full((1,), batch, jnp.int32),
    )


def _by_ours(
    q_BLHK: jax.Array, kv_NPGK: jax.Array, tables_BW: jax.Array, start_B: jax.Array, interpret: bool
) -> jax.Array:
    batch, length, n_heads, width = q_BLHK.shape
    n_pages, page_size, n_combined, _ = kv_NPGK.shape
    n_kv_heads = n_combined // 2
    group = n_heads // n_kv_heads
    per_block, queries = _blocks(q_BLHK, kv_NPGK, tables_BW.shape[1])
    queries = min(queries, length)
    n_query_blocks = -(-length // queries)
    q_BLGRK = q_BLHK.reshape(batch, length, n_kv_heads, group, width)
    q_BLGRK = jnp.pad(q_BLGRK, [(0, 0), (0, n_query_blocks * queries - length), (0, 0), (0, 0), (0, 0)])
    # Q: the queries of all heads that share a kv head, query by query.
    q_BGQK = jnp.moveaxis(q_BLGRK, 1, 2).reshape(batch, n_kv_heads, -1, width)
    rows = queries * group
    block = pl.BlockSpec((1, n_kv_heads, rows, width), lambda b, i, *_: (b, 0, i, 0))
    out_BGQK = pl.pallas_call(
        functools.partial(_kernel, n_tables=tables_BW.shape[1], length=length, group=group, interpret=interpret),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, n_query_blocks),
            in_specs=[block, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=block,
            scratch_shapes=[
                pltpu.VMEM((2, per_block, page_size, n_combined, width), kv_NPGK.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((n_kv_heads, rows, 1), jnp.float32),
                pltpu.VMEM((n_kv_heads, rows, 1), jnp.float32),
                pltpu.VMEM((n_kv_heads, rows, width), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BGQK.shape, q_BGQK.dtype),
        # Programs run one after the other: each starts the copies of the next one's first block.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="paged_attention",
    )(
        start_B.astype(jnp.int32),
        jnp.clip(tables_BW, 0, n_pages - 1).astype(jnp.int32).reshape(-1),  # flat: scalar memory pads rows to 128
        q_BGQK,
        kv_NPGK,
    )
    out_BGLRK = out_BGQK.reshape(batch, n_kv_heads, -1, group, width)[:, :, :length]
    return jnp.moveaxis(out_BGLRK, 2, 1).reshape(q_BLHK.shape)


def _kernel(
    start_B, tables, q_ref, kv_hbm, out_ref, buffers, arrived, first_slot, peak_ref, denominator_ref, weighted_ref,
    *, n_tables: int, length: int, group: int, interpret: bool,
):  # fmt: skip
    """One row's block of queries against all pages that it sees, by an online softmax (Milakov and Gimelshein, 2018).

    Two blocks of pages are on chip: one is worked on while the next is on its way, be it the next program's first.
    """
    _, per_block, page_size, n_combined, width = buffers.shape
    block = per_block * page_size
    queries = q_ref.shape[2] // group
    n_query_blocks = pl.num_programs(1)
    program = pl.program_id(0) * n_query_blocks + pl.program_id(1)
    n_programs = pl.num_programs(0) * n_query_blocks

    def last_seen(of):
        """The position of a program's last query, or the last of the table."""
        last_query = jnp.minimum((of % n_query_blocks + 1) * queries, length) - 1
        return jnp.minimum(start_B[of // n_query_blocks] + last_query, n_tables * page_size - 1)

    def for_pages(of, i, slot, act):
        """Does something to the copy of each page in block `i` of a program that it sees."""
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
    precision = jax.lax.Precision.HIGHEST if buffers.dtype == jnp.float32 else None
    dot = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def attend(i, _):
        slot = (slot_0 + i) % 2
        ends = i + 1 == n_blocks
        after, after_i = jnp.where(ends, program + 1, program), jnp.where(ends, 0, i + 1)

        @pl.when(after < n_programs)
        def _():
            for_pages(after, after_i, 1 - slot, lambda copy: copy.start())

        for_pages(program, i, slot, lambda copy: copy.wait())
        query = first_query + jax.lax.broadcasted_iota(jnp.int32, (queries * group, block), 0) // group
        visible = i * block + jax.lax.broadcasted_iota(jnp.int32, (queries * group, block), 1) <= query
        # The rest of a block may be anything, and zero times NaN would be NaN.
        seen = i * block + jax.lax.broadcasted_iota(jnp.int32, (block, width), 0) <= last
        for g in range(n_combined // 2):
            k, v = (x.reshape(block, width) for x in _key_and_value(buffers.at[slot], g, interpret))
            v = jnp.where(seen, v, jnp.zeros_like(v))
            scores = dot(q_ref[0, g], k, (((1,), (1,)), ((), ()))) * width**-0.5
            scores = jnp.where(visible, scores, -jnp.inf)
            # The first block holds position 0, which every query sees: the peak is finite.
            peak = jnp.maximum(peak_ref[g], jnp.max(scores, axis=1, keepdims=True))
            probs, shrink = jnp.exp(scores - peak), jnp.exp(peak_ref[g] - peak)
            peak_ref[g] = peak
            denominator_ref[g] = denominator_ref[g] * shrink + jnp.sum(probs, axis=1, keepdims=True)
            weighted_ref[g] = weighted_ref[g] * shrink + dot(probs.astype(v.dtype), v, (((1,), (0,)), ((), ())))

    jax.lax.fori_loop(0, n_blocks, attend, None)
    first_slot[0] = (slot_0 + n_blocks) % 2
    out_ref[0] = (weighted_ref[...] / denominator_ref[...]).astype(out_ref.dtype)


def _key_and_value(kv_ref, g: int, interpret: bool):
    """Keys and values (.., K) of one head of pages (.., 2G, K) on chip."""
    if kv_ref.dtype == jnp.float32 or interpret:  # the interpreter cannot see a reference as another type
        return kv_ref[:, :, 2 * g, :], kv_ref[:, :, 2 * g + 1, :]
    # Words of 32 bits can be read with a stride: the key's number is the lower half, the value's the upper.
    both = kv_ref.bitcast(jnp.uint32)[:, :, g, :]
    halves = both << 16, both & jnp.uint32(0xFFFF0000)
    return tuple(jax.lax.bitcast_convert_type(x, jnp.float32).astype(jnp.bfloat16) for x in halves)
