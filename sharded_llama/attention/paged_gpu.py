"""Attention over the paged cache on NVIDIA GPUs: a Pallas kernel in the Triton dialect. `paged.py` specifies it.

A program takes the queries of one kv head of one row, so that grouped heads share the keys and values they load, and
walks over the cached positions that these queries see, a block at a time: a gather of the block's page numbers, then of
its keys and values, then the online softmax (Milakov and Gimelshein, 2018). Where rows and heads are too few to fill
the GPU, the positions of a row are split between programs, whose parts another kernel merges in a fixed
order (flash decoding: Dao et al., 2023). What a query gives depends on its row and on static shapes alone, bit for bit.
"""

import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..errors import ConfigError
from ..kv_cache import KVPages

N_PROCESSORS = 132  # of an H100 or H200
PROGRAMS_EACH = 4  # that a processor should have: so many of the smallest run at a time
MAX_SPLITS = 64
MIN_TILE = 16  # the least that the matrix units take, in each direction
NOTHING = float(jnp.finfo(jnp.float32).min)  # peak of no positions: finite, so that no difference of peaks is NaN


class Tuning(NamedTuple):
    """How a program works. Every value changes the speed; `block` and `tile` also the order of sums."""

    block: int  # cached positions of one step, a power of two >= 16
    num_warps: int
    num_stages: int  # depth of the pipeline: how far loads run ahead of the products
    tile: int = 64  # at most so many queries in a program, a power of two >= 16
    two_loops: bool = False  # one without masks over the blocks that every query sees whole, one over the others


# The page numbers, which the loads wait for, take two of the stages: 3 stages have one block under way, 5 have two.
# Few queries: limited by memory. One block of bfloat16 at K = 128 is 39 KB of shared memory and 116 registers, so that
# four programs share a processor, and three of them load while one computes.
FEW_QUERIES = Tuning(block=64, num_warps=4, num_stages=3)
# 8-bit blocks have half the bytes, and casting them takes more registers: more warps, and two blocks under way.
FEW_QUERIES_8_BIT = Tuning(block=128, num_warps=8, num_stages=5)
# Chunks: limited by the products and by L2. 64 queries are what the matrix units of one group of four warps take at a
# time; 128 share what is loaded, and leave room for one block under way.
SOME_QUERIES = Tuning(block=64, num_warps=4, num_stages=5, two_loops=True)
MANY_QUERIES = Tuning(block=64, num_warps=4, num_stages=3, tile=128, two_loops=True)
# float32 has no matrix unit: its operands stand in registers, which only small tiles leave room for.
FULL_PRECISION = Tuning(block=32, num_warps=4, num_stages=2, tile=16)


class _Sizes(NamedTuple):
    """Everything static that the kernel needs."""

    batch: int
    length: int  # L
    heads: int  # H
    kv_heads: int  # G
    width: int  # K
    n_pages: int
    page_size: int
    table: int  # W
    block: int
    tile: int
    n_tiles: int
    n_splits: int
    fixed_splits: bool
    two_loops: bool
    first: int  # token of q that is the first row's first

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def paged_attn_gpu(
    q_BLHK: jax.Array,
    pages: KVPages,
    tables_BW: jax.Array,
    start_B: jax.Array,
    *,
    n_splits: int | None = None,
    fixed_splits: bool = False,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`paged_attn_reference` in one kernel, which reads no position twice and none that is not visible.

    Args:
      q_BLHK: bfloat16, float16 or float32. Query l of row b is at position start_B[b] + l.
      pages: one device's part, of any type. Stored values are cast to q's type, 8-bit ones without loss; their float32
        scales go to the scores and the probabilities.
      tables_BW: int32, the row's pages. Numbers beyond the pool may stand after the last page that is needed.
      start_B: int32. Rows that are not used may have any start.
      n_splits: programs that share the positions of a row, at least 1. By default enough to fill the GPU.
      fixed_splits: splits begin at positions that do not depend on the row's length. Then a query's result does not
        even depend on which others are in its row; short rows leave programs idle.
      tuning: by default what suits the number of queries and the types.
      interpret: runs on any platform, slowly.

    Returns (B, L, H, K) in q's dtype. What stands in pages where no query looks is not touched. Raises ConfigError for
    a pool that the kernel cannot address.
    """
    length, heads, width = q_BLHK.shape[1:]
    _check_addressable(pages)
    tuning = tuning or _choose_tuning(q_BLHK.dtype, pages.kv_NPGK.dtype, length * heads * 2 // pages.kv_NPGK.shape[2])
    settings = {"fixed_splits": fixed_splits, "tuning": tuning, "interpret": interpret}
    q_QK = q_BLHK.reshape(-1, width)
    return _attend_rows(q_QK, pages, tables_BW, start_B, heads, length, n_splits, **settings).reshape(q_BLHK.shape)


def paged_rows_gpu(
    q_THK: jax.Array, pages: KVPages, tables_RW: jax.Array, start_R: jax.Array, n_single: int, interpret: bool = False
) -> jax.Array:
    """`paged_attn_gpu` of `n_single` rows of one token and rows of several, with no result moved: (T, H, K)."""
    _check_addressable(pages)
    heads, width = q_THK.shape[1:]
    q_QK, out_QK = q_THK.reshape(-1, width), None
    for first, last in ((0, n_single), (n_single, start_R.shape[0])):
        if first == last:
            continue
        length = (q_THK.shape[0] - n_single) // (last - first) if first == n_single else 1
        queries = length * heads * 2 // pages.kv_NPGK.shape[2]
        tuning = _choose_tuning(q_THK.dtype, pages.kv_NPGK.dtype, queries)
        rows = tables_RW[first:last], start_R[first:last]
        out_QK = _attend_rows(
            q_QK, pages, *rows, heads, length, tuning=tuning, first=first, into_QK=out_QK, interpret=interpret
        )
    return out_QK.reshape(q_THK.shape)


def _attend_rows(
    q_QK: jax.Array,
    pages: KVPages,
    tables_BW: jax.Array,
    start_B: jax.Array,
    heads: int,
    length: int,
    n_splits: int | None = None,
    *,
    tuning: Tuning,
    fixed_splits: bool = False,
    first: int = 0,
    into_QK: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of B rows of `length` tokens each, of which the first is token `first` of q: an array like q.

    Other tokens' places are left as they are in `into_QK`, which is used up.
    """
    n_pages, page_size = pages.kv_NPGK.shape[:2]
    (batch, table), width, kv_heads = tables_BW.shape, q_QK.shape[-1], pages.kv_NPGK.shape[2] // 2
    queries, capacity = length * heads // kv_heads, table * page_size
    tile = min(tuning.tile, power_of_two(queries))
    n_tiles = pl.cdiv(queries, tile)
    block = min(tuning.block, power_of_two(capacity))
    if n_splits is None:
        n_splits = _choose_splits(batch * kv_heads * n_tiles, pl.cdiv(capacity, block))
    sizes = _Sizes(
        batch=batch,
        length=length,
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        n_pages=n_pages,
        page_size=page_size,
        table=table,
        block=block,
        tile=tile,
        n_tiles=n_tiles,
        n_splits=n_splits,
        fixed_splits=fixed_splits,
        two_loops=tuning.two_loops,
        first=first,
    )

    # Flat views, so that one product makes an offset. They are free: all of this is contiguous.
    out = jax.ShapeDtypeStruct(q_QK.shape, q_QK.dtype)
    given = () if into_QK is None else (into_QK,)
    out_shape, n_parts = (out,), n_splits * batch * length * heads
    if n_splits > 1:
        part = jax.ShapeDtypeStruct((n_parts,), jnp.float32)
        out_shape = (part, part, jax.ShapeDtypeStruct((n_parts, width), jnp.float32))
    in_place = {0: 0} if given else {}
    args = (
        q_QK,
        pages.kv_NPGK.reshape(-1, width),
        None if pages.scale_NPG is None else pages.scale_NPG.reshape(-1),
        tables_BW.reshape(-1),
        start_B,
    )
    parts = pl.pallas_call(
        functools.partial(_attend, sizes=sizes, n_given=len(given) if n_splits == 1 else 0),
        # The kv heads of a row come first: they read neighbouring memory at about the same time.
        grid=(kv_heads, n_tiles * n_splits, batch),
        out_shape=out_shape,
        input_output_aliases=in_place if n_splits == 1 else {},
        compiler_params=plgpu.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        name="paged_attention",
    )(*(given if n_splits == 1 else ()), *args)
    if n_splits == 1:
        return parts[0]
    return pl.pallas_call(
        functools.partial(_merge, sizes=sizes, n_given=len(given)),
        grid=(batch * length * heads,),
        out_shape=out,
        input_output_aliases=in_place,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_attention_merge",
    )(*given, *parts, start_B)


def _attend(*refs: jax.Ref | None, sizes: _Sizes, n_given: int) -> None:
    """One program: kv head x (tile of queries, split of positions) x row.

    References: the result itself where it is given, q (T * H, K), pages (N * P * 2G, K), their scales (N * P * 2G,) or
    None, tables (B * W,), starts (B,); then the result, or peak, denominator and weighted sum of every split, one split
    after the other.
    """
    q_ref, kv_ref, scale_ref, table_ref, start_ref, *out_refs = refs[n_given:]
    # The rows of a chunk come in order: those that see most begin first, so that none is left at the end.
    head, row = pl.program_id(0), sizes.batch - 1 - pl.program_id(2)
    tile, split = lax.div(pl.program_id(1), sizes.n_splits), lax.rem(pl.program_id(1), sizes.n_splits)
    start = start_ref[row]
    end = _end(start, tile, sizes)
    first, last = _blocks(end, split, sizes)

    query_M = tile * sizes.tile + _iota(sizes.tile)  # token by token, the heads of the group side by side
    token_M = lax.div(query_M, sizes.group)
    position_M = start + token_M
    at_M = (row * sizes.length + token_M) * sizes.heads + head * sizes.group + lax.rem(query_M, sizes.group)
    in_q_M = sizes.first * sizes.heads + at_M
    column_K = _iota(power_of_two(sizes.width))
    is_query_M = token_M < sizes.length
    is_query_MK = _mask(is_query_M, column_K, sizes.width)

    @pl.when(first < last)
    def _() -> None:
        q_MK = plgpu.load(q_ref.at[in_q_M[:, None], column_K[None]], mask=is_query_MK, other=0)
        # float32 must not become TF32; half types have one precision.
        precision = lax.Precision.HIGHEST if q_MK.dtype == jnp.float32 else None
        # float16 has few exponents: probability times scale is brought to where they are. The largest scale, that of
        # 65504 as int8, is 516, and 64 times that is still finite.
        lift = 64.0 if scale_ref is not None and q_MK.dtype == jnp.float16 else 1.0
        to_log2 = sizes.width**-0.5 * math.log2(math.e)

        def step(i: jax.Array, carry: tuple, whole: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
            """A block of positions. whole: all of them are seen by every query, so that nothing is masked."""
            peak_M, denominator_M, weighted_MK = carry
            position_S = i * sizes.block + _iota(sizes.block)
            seen_S = None if whole else position_S < end
            is_padded = column_K.shape[0] > sizes.width
            seen_SK = _mask(position_S < end, column_K, sizes.width) if is_padded or not whole else None
            key_S = find_keys(table_ref, row, head, position_S, seen_S, sizes)
            value_S = key_S + 1

            k_SK, v_SK = (_load(kv_ref.at[at_S[:, None], column_K[None]], seen_SK) for at_S in (key_S, value_S))
            k_SK, v_SK = k_SK.astype(q_MK.dtype), v_SK.astype(q_MK.dtype)
            scores_MS = plgpu.dot(q_MK, k_SK, trans_b=True, precision=precision) * to_log2
            if scale_ref is not None:
                scores_MS *= _load(scale_ref.at[key_S], seen_S)[None]
            if not whole:
                scores_MS = jnp.where(position_S[None] <= position_M[:, None], scores_MS, -jnp.inf)

            new_peak_M = jnp.maximum(peak_M, jnp.max(scores_MS, axis=1))
            kept_M = jnp.exp2(peak_M - new_peak_M)
            probs_MS = jnp.exp2(scores_MS - new_peak_M[:, None])
            denominator_M = denominator_M * kept_M + jnp.sum(probs_MS, axis=1)
            if scale_ref is not None:
                probs_MS *= _load(scale_ref.at[value_S], seen_S)[None] * lift
            added_MK = plgpu.dot(probs_MS.astype(v_SK.dtype), v_SK, precision=precision)
            return new_peak_M, denominator_M, weighted_MK * kept_M[:, None] + added_MK

        nothing = (
            jnp.full((sizes.tile,), NOTHING, jnp.float32),
            jnp.zeros((sizes.tile,), jnp.float32),
            jnp.zeros((sizes.tile, column_K.shape[0]), jnp.float32),
        )
        masked_from = first
        if sizes.two_loops:
            first_query = start + lax.div(tile * sizes.tile, sizes.group)
            n_whole = lax.div(jnp.minimum(first_query + 1, end), sizes.block)
            masked_from = jnp.minimum(jnp.maximum(n_whole, first), last)
            nothing = lax.fori_loop(first, masked_from, functools.partial(step, whole=True), nothing)
        peak_M, denominator_M, weighted_MK = lax.fori_loop(masked_from, last, step, nothing)
        weighted_MK = weighted_MK * (1 / lift)
        if sizes.n_splits == 1:
            (out_ref,) = out_refs
            out_MK = (weighted_MK / denominator_M[:, None]).astype(out_ref.dtype)
            plgpu.store(out_ref.at[in_q_M[:, None], column_K[None]], out_MK, mask=is_query_MK)
        else:
            peak_ref, denominator_ref, weighted_ref = out_refs
            part_M = split * (sizes.batch * sizes.length * sizes.heads) + at_M
            plgpu.store(peak_ref.at[part_M], peak_M, mask=is_query_M)
            plgpu.store(denominator_ref.at[part_M], denominator_M, mask=is_query_M)
            plgpu.store(weighted_ref.at[part_M[:, None], column_K[None]], weighted_MK, mask=is_query_MK)


class Pool(Protocol):
    """What `find_keys` needs to know."""

    kv_heads: int
    n_pages: int
    page_size: int
    table: int


def find_keys(
    table_ref: jax.Ref, row: jax.Array, head: jax.Array, position_S: jax.Array, seen_S: jax.Array | None, pool: Pool
) -> jax.Array:
    """Within a kernel: the rows of the flat pages (N * P * 2G, K) with a kv head's keys at a row's positions.

    seen_S: which of them are wanted; None: all of them.
    """
    page_S = _load(table_ref.at[row * pool.table + lax.div(position_S, pool.page_size)], seen_S)
    page_S = jnp.minimum(jnp.maximum(page_S, 0), pool.n_pages - 1)  # rows that are not used hold anything
    place_S = page_S * pool.page_size + lax.rem(position_S, pool.page_size)
    return place_S * (2 * pool.kv_heads) + 2 * head


def _end(start: jax.Array, tile: jax.Array, sizes: _Sizes) -> jax.Array:
    """One past the last position that any query of a tile sees."""
    last_token = jnp.minimum(lax.div((tile + 1) * sizes.tile - 1, sizes.group), sizes.length - 1)
    return jnp.minimum(start + last_token + 1, sizes.table * sizes.page_size)


def _blocks(end: jax.Array, split: jax.Array, sizes: _Sizes) -> tuple[jax.Array, jax.Array]:
    """The blocks [first, last) of a split: as many in each as go, the remainder in the last ones that have any."""
    n_blocks = lax.div(end + sizes.block - 1, sizes.block)
    to_split = pl.cdiv(sizes.table * sizes.page_size, sizes.block) if sizes.fixed_splits else n_blocks
    each = lax.div(to_split + sizes.n_splits - 1, sizes.n_splits)
    return split * each, jnp.minimum((split + 1) * each, n_blocks)


def _load(ref: Any, mask: jax.Array | None) -> jax.Array:
    """What is not in the mask is 0, and not touched."""
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def _mask(row_M: jax.Array, column_K: jax.Array, width: int) -> jax.Array:
    """(M, K) of rows and, where the width is padded, columns that exist."""
    if column_K.shape[0] == width:
        return jnp.broadcast_to(row_M[:, None], (row_M.shape[0], width))
    return row_M[:, None] & (column_K < width)[None]


def _merge(*refs: jax.Ref, sizes: _Sizes, n_given: int) -> None:
    """One program: the splits' parts of one query as its result.

    References: the result where it is given, peaks and denominators (splits * B * L * H,), weighted sums (the same, K),
    starts (B,), the result.
    """
    peak_ref, denominator_ref, weighted_ref, start_ref, out_ref = refs[n_given:]
    at = pl.program_id(0)
    token, head = lax.div(at, sizes.heads), lax.rem(at, sizes.heads)
    row, token = lax.div(token, sizes.length), lax.rem(token, sizes.length)
    # A query's number within its kv head, as the other kernel counts, tells its tile.
    query = token * sizes.group + lax.rem(head, sizes.group)
    split_S = _iota(1 << (sizes.n_splits - 1).bit_length())
    first_S, last_S = _blocks(_end(start_ref[row], lax.div(query, sizes.tile), sizes), split_S, sizes)
    # Splits without a block have written nothing.
    written_S = (first_S < last_S) & (split_S < sizes.n_splits)
    column_K = _iota(power_of_two(sizes.width))
    written_SK = _mask(written_S, column_K, sizes.width)
    at_S = split_S * (sizes.batch * sizes.length * sizes.heads) + at
    peak_S = plgpu.load(peak_ref.at[at_S], mask=written_S, other=NOTHING)
    part_S = jnp.exp2(peak_S - jnp.max(peak_S))
    denominator = jnp.sum(plgpu.load(denominator_ref.at[at_S], mask=written_S, other=0) * part_S)
    weighted_SK = plgpu.load(weighted_ref.at[at_S[:, None], column_K[None]], mask=written_SK, other=0)
    out_K = jnp.sum(weighted_SK * part_S[:, None], axis=0) / denominator
    plgpu.store(
        out_ref.at[sizes.first * sizes.heads + at, column_K], out_K.astype(out_ref.dtype), mask=column_K < sizes.width
    )


def _choose_tuning(dtype: jnp.dtype, kv_dtype: jnp.dtype, queries: int) -> Tuning:
    """What suits queries of this type and number in a kv head, and pages of this type."""
    if dtype == jnp.float32:
        return FULL_PRECISION
    if queries > MIN_TILE:
        return MANY_QUERIES if queries > SOME_QUERIES.tile else SOME_QUERIES
    return FEW_QUERIES_8_BIT if kv_dtype.itemsize == 1 else FEW_QUERIES


def _choose_splits(programs: int, n_blocks: int) -> int:
    """As many as make PROGRAMS_EACH programs for every processor; none has less than a block of the longest row."""
    return max(1, min(N_PROCESSORS * PROGRAMS_EACH // programs, n_blocks, MAX_SPLITS))


def power_of_two(n: int) -> int:
    """The least power of two that is not below n, and large enough for the matrix units."""
    return max(MIN_TILE, 1 << (n - 1).bit_length())


def _iota(n: int) -> jax.Array:
    return jnp.arange(n, dtype=jnp.int32)


def addressable_pages(page_shape: tuple[int, int, int], dtype: jnp.dtype, n_pages: int) -> int:
    """`n_pages`, or as many of them as the kernel can address; a page's shape is (P, 2G, K) on one device."""
    places, elements = math.prod(page_shape[:2]), math.prod(page_shape)
    n_pages = min(n_pages, (2**31 - 1) // places)
    if dtype.itemsize == 1 and 2**31 < n_pages * elements <= 2**32:
        n_pages = 2**31 // elements
    return n_pages


def _check_addressable(pages: KVPages) -> None:
    """Raises ConfigError for pages whose places overflow the kernel's integers.

    Keys and values are counted in int32. The lowering makes offsets of elements from that: int64 for an array of more
    than 2**32 bytes, else int32 taken as signed, which is too small for 8-bit types between 2**31 and 2**32 bytes.
    """
    shape, dtype = pages.kv_NPGK.shape, pages.kv_NPGK.dtype
    if addressable_pages(shape[1:], dtype, shape[0]) < shape[0]:
        raise ConfigError(
            f"A layer's pages of shape {shape} and type {dtype} cannot be addressed by the GPU kernel. It takes fewer "
            "than 2**31 keys and values, and 8-bit pages of at most 2**31 bytes or of more than 2**32."
        )
