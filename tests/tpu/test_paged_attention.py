"""A layer's write to its pages and attention to them, compiled for TPUs by their compiler on a machine without one."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from sharded_llama.attention.paged_tpu import paged_attn_tpu, supports
from sharded_llama.kv_cache import KVPages
from sharded_llama.mesh import make_mesh
from sharded_llama.sharding import DATA, MODEL

pytestmark = pytest.mark.tpu_compiler

MIB = 2**20
TOPOLOGIES = ["v5e:2x4", "v6e:2x4", "v5p:2x2x2"]
PAGE_SIZE = 16
SMALL = 4 * MIB  # the queries of a chunk in another order; the pages of the tests have 32 and more
HEADS, ROWS = PartitionSpec(DATA, None, MODEL), PartitionSpec(DATA)
ROW_MAJOR = Layout((0, 1, 2, 3))


def step(pages, q_BLHK, k_BLGK, v_BLGK, at_T, tables_BW, start_B):
    pages = pages.write(*(x.reshape(-1, *x.shape[2:]) for x in (k_BLGK, v_BLGK)), at_T)
    return pages, paged_attn_tpu(q_BLHK, pages, tables_BW, start_B)


def compiled(topology, *, kv_heads, width, group=4, dtype=jnp.bfloat16, n_pages=4096, batch=16, length=1, n_tables=256):
    """The step on 2 x 4 chips. All sizes are those of one chip; pages are row-major."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(2, len(devices) // 2, devices=devices)
    data, model = mesh.shape[DATA], mesh.shape[MODEL]
    heads = kv_heads * group
    assert supports(dtype, dtype, heads, kv_heads, width, PAGE_SIZE, batch, n_tables) is None

    def array(*shape, dtype=dtype, spec=HEADS):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    pages_format = Format(ROW_MAJOR, NamedSharding(mesh, HEADS))
    pages_shape = (data * n_pages, PAGE_SIZE, 2 * model * kv_heads, width)
    new = array(data * batch, length, model * kv_heads, width)
    args = (
        KVPages(jax.ShapeDtypeStruct(pages_shape, dtype, sharding=pages_format)),
        array(data * batch, length, model * heads, width),
        new,
        new,
        array(data * batch * length, dtype=jnp.int32, spec=ROWS),
        array(data * batch, n_tables, dtype=jnp.int32, spec=ROWS),
        array(data * batch, dtype=jnp.int32, spec=ROWS),
    )
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(HEADS, HEADS, HEADS, HEADS, ROWS, ROWS, ROWS),
        out_specs=(HEADS, HEADS),
        check_vma=False,
    )
    out_shardings = (KVPages(pages_format), NamedSharding(mesh, HEADS))
    return jax.jit(sharded, donate_argnums=0, out_shardings=out_shardings).lower(*args).compile()


def pages_bytes(kv_heads, width, dtype, n_pages=4096):
    """Bytes of one chip's pages: on a TPU rows are padded to 128 numbers."""
    return n_pages * PAGE_SIZE * 2 * kv_heads * max(width, 128) * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("length", [1, 128], ids=["decode", "chunk"])
@pytest.mark.parametrize(("kv_heads", "width"), [(1, 128), (2, 128), (8, 128), (1, 64), (2, 64)], ids=str)
def test_pages_are_written_in_place_and_never_copied(topology, kv_heads, width, length):
    memory = compiled(topology, kv_heads=kv_heads, width=width, length=length, batch=4).memory_analysis()
    assert memory.alias_size_in_bytes == pages_bytes(kv_heads, width, jnp.bfloat16)
    assert memory.temp_size_in_bytes < SMALL


@pytest.mark.parametrize("width", [64, 128])
def test_float32(width):
    memory = compiled("v5e:2x4", kv_heads=2, width=width, dtype=jnp.float32).memory_analysis()
    assert memory.alias_size_in_bytes == pages_bytes(2, width, jnp.float32)
    assert memory.temp_size_in_bytes < SMALL


@pytest.mark.parametrize("width", [64, 128])
def test_temporaries_do_not_grow_with_the_pages(width):
    few, many = (
        compiled("v5p:2x2x2", kv_heads=1, width=width, n_pages=n).memory_analysis().temp_size_in_bytes
        for n in (1024, 65536)
    )
    assert many <= few + 4096


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("batch", "n_tables"), [(62, 4096), (1024, 192), (7, 32768)], ids=str)
def test_the_largest_tables(width, batch, n_tables):
    """Those that `supports` still accepts fit into scalar memory."""
    compiled("v6e:2x4", kv_heads=1, width=width, batch=batch, n_tables=n_tables)


@pytest.mark.parametrize(("kv_heads", "group"), [(3, 4), (1, 7), (1, 16), (8, 8)], ids=str)
def test_other_numbers_of_heads(kv_heads, group):
    memory = compiled("v5e:2x4", kv_heads=kv_heads, width=128, group=group).memory_analysis()
    assert memory.temp_size_in_bytes < SMALL
