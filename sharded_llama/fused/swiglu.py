"""The gated activation as the end of its product, for NVIDIA GPUs of the Hopper generation: Pallas over Mosaic GPU.

Gate and up of a token are computed by the same program, which writes their activation alone: a fifth of what a product
and an activation after it write and read. One program for each processor walks over its tiles of the result.
A warpgroup of it copies tiles of x and of the weights into a ring of shared memory, ahead of two that multiply; it
goes on to the next tile while these write the last one. Rows beyond the last one are copied as zeros, and not written.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 128  # of a tile
TERMS = 64  # of the sum that a stage of the ring holds: 128 bytes, as wide as shared memory is read
STAGES = 4  # as many as fit beside the widest tiles: with three the product is a quarter slower
COMPUTING = 2  # warpgroups that multiply, and share a tile's rows
# Columns of gate and of up in a tile. Twice that is the most that an instruction multiplies and that the sums of a
# warpgroup leave registers for; which of them leaves the fewest processors idle at the end depends on the shape.
WIDTHS = (128, 112, 96)
BAND = 16  # tiles of rows that are visited before the next columns, while the weights are in the L2 cache
# Registers of a thread: those that copy give theirs to those that multiply.
COPY_REGISTERS, COMPUTE_REGISTERS = 40, 232


class _Sizes(NamedTuple):
    """Everything static that the kernel needs."""

    row_tiles: int
    column_tiles: int
    steps: int  # stages of a tile's sum
    width: int
    processors: int

    @property
    def tiles(self) -> int:
        return self.row_tiles * self.column_tiles


def fits(x_TD: jax.Array, w13_2FD: jax.Array) -> bool:
    """Whether the kernel takes these types and shapes. Few rows are for products that do not fill them up to a tile."""
    (rows, terms), columns = x_TD.shape, w13_2FD.shape[1]
    half = x_TD.dtype == w13_2FD.dtype and x_TD.dtype in (jnp.bfloat16, jnp.float16)
    many = rows > ROWS // 2 and rows % 8 == 0  # bulk copies have eight rows together
    return half and many and terms % TERMS == 0 and any(columns % w == 0 for w in WIDTHS)


def swiglu_gpu(x_TD: jax.Array, w13_2FD: jax.Array, processors: int) -> jax.Array:
    """`layers.swiglu` in one kernel, for what `fits`, on a GPU of so many processors: (T, F)."""
    (rows, terms), columns = x_TD.shape, w13_2FD.shape[1]
    width = tile_width(rows, columns, processors)
    sizes = _Sizes(pl.cdiv(rows, ROWS), columns // width, terms // TERMS, width, processors)
    return plgpu.kernel(
        functools.partial(_swiglu, sizes=sizes),
        out_type=jax.ShapeDtypeStruct((rows, columns), x_TD.dtype),
        grid=(processors,),
        grid_names=("processor",),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),  # 2**-22 or so, before a rounding to 2**-8 or 2**-11
        kernel_name="swiglu",
    )(x_TD, w13_2FD)


def tile_width(rows: int, columns: int, processors: int) -> int:
    """The width with which the busiest processor computes the fewest columns; of several the largest."""

    def in_turn(width: int) -> int:
        return pl.cdiv(pl.cdiv(rows, ROWS) * (columns // width), processors) * width

    return min((w for w in WIDTHS if columns % w == 0), key=in_turn)


def _swiglu(x_ref: jax.Ref, w_ref: jax.Ref, out_ref: jax.Ref, *, sizes: _Sizes) -> None:
    """One program of three warpgroups. References: x (T, D), w13 (2, F, D), the result (T, F)."""
    dtype, width = x_ref.dtype, sizes.width
    pl.run_scoped(
        functools.partial(_run, x_ref, w_ref, out_ref, sizes=sizes),
        plgpu.SMEM((STAGES, ROWS, TERMS), dtype, transforms=_in_atoms(TERMS)),
        plgpu.SMEM((STAGES, 2 * width, TERMS), dtype, transforms=_in_atoms(TERMS)),
        plgpu.SMEM((COMPUTING, ROWS // COMPUTING, width), dtype, transforms=_in_atoms(width)),
        plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),  # of x, gate and up
        plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=STAGES),
        collective_axes="warpgroup",
    )


def _in_atoms(columns: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The order in which matrix units and bulk copies have 16-bit values in shared memory: eight rows of 32 to 128
    bytes together, as wide as divides the columns."""
    width = next(bytes_ for bytes_ in (128, 64, 32) if columns % (bytes_ // 2) == 0)
    return plgpu.TilingTransform((8, width // 2)), plgpu.SwizzleTransform(width)


def _run(
    x_ref: jax.Ref,
    w_ref: jax.Ref,
    out_ref: jax.Ref,
    x_ring: jax.Ref,  # (STAGES, ROWS, TERMS)
    w_ring: jax.Ref,  # (STAGES, 2 * width, TERMS), gate's columns before up's
    out_smem: jax.Ref,  # (COMPUTING, ROWS / COMPUTING, width)
    full: jax.Ref,  # barriers of the ring's stages: what was copied is there
    empty: jax.Ref,  # and what was there has been used
    *,
    sizes: _Sizes,
) -> None:
    warpgroup, processor = lax.axis_index("warpgroup"), lax.axis_index("processor")
    n_tiles = lax.div(sizes.tiles - processor + sizes.processors - 1, sizes.processors)

    def place(tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where this processor's tile begins: its first row and its first column."""
        shape = (sizes.row_tiles, sizes.column_tiles)
        row, column = plgpu.planar_snake(processor + tile * sizes.processors, shape, 0, BAND)
        return row * ROWS, column * sizes.width

    @pl.when(warpgroup == COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        @pl.loop(0, n_tiles)
        def _(tile: jax.Array) -> None:
            row, column = place(tile)

            @pl.loop(0, sizes.steps)
            def _(k: jax.Array) -> None:
                step = tile * sizes.steps + k
                stage = lax.rem(step, STAGES)

                @pl.when(step >= STAGES)
                def _() -> None:
                    plgpu.barrier_wait(empty.at[stage])

                terms = pl.ds(k * TERMS, TERMS)
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, ROWS), terms], x_ring.at[stage], full.at[stage])
                for half in range(2):
                    to = w_ring.at[stage, pl.ds(half * sizes.width, sizes.width)]
                    plgpu.copy_gmem_to_smem(w_ref.at[half, pl.ds(column, sizes.width), terms], to, full.at[stage])

        n_steps = n_tiles * sizes.steps

        @pl.loop(jnp.maximum(n_steps - STAGES, 0), n_steps)
        def _(step: jax.Array) -> None:
            plgpu.barrier_wait(empty.at[lax.rem(step, STAGES)])

    @pl.when(warpgroup < COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        rows = ROWS // COMPUTING

        @pl.loop(0, n_tiles)
        def _(tile: jax.Array) -> None:
            row, column = place(tile)

            def product(sums: jax.Ref) -> jax.Array:
                @pl.loop(0, sizes.steps)
                def _(k: jax.Array) -> None:
                    step = tile * sizes.steps + k
                    stage = lax.rem(step, STAGES)
                    plgpu.barrier_wait(full.at[stage])
                    x = x_ring.at[stage, pl.ds(warpgroup * rows, rows)]
                    plgpu.wgmma(sums, x, w_ring.at[stage].transpose((1, 0)))
                    # While this stage is being multiplied, the one before it is done with.
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(empty.at[lax.rem(step + STAGES - 1, STAGES)])

                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[lax.rem((tile + 1) * sizes.steps - 1, STAGES)])
                return sums[...]

            both = pl.run_scoped(product, plgpu.ACC((rows, 2 * sizes.width), jnp.float32))
            # Rounded like the result of a product, and computed with in float32 again.
            both = both.astype(x_ref.dtype).astype(jnp.float32)
            gate, up = both[:, : sizes.width], both[:, sizes.width :]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # for the last tile, which is long gone
            out_smem[warpgroup] = (gate / (1 + jnp.exp(-gate)) * up).astype(x_ref.dtype)
            plgpu.commit_smem()
            out = out_ref.at[pl.ds(row + warpgroup * rows, rows), pl.ds(column, sizes.width)]
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out)

        plgpu.wait_smem_to_gmem(0)
