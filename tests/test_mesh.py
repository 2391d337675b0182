"""The mesh, what of it the heads allow, and weights made on it."""

import types

import jax
import numpy as np
import pytest

from sharded_llama.config import LlamaConfig
from sharded_llama.errors import MeshError
from sharded_llama.mesh import check_mesh, default_mesh, hopper_processors, make_mesh, parse_mesh, start_distributed
from sharded_llama.sharding import check_model_size, kv_head_layout, model_sizes, padded
from sharded_llama.weights import abstract_weights, count_parameters, init_weights

CONFIG = LlamaConfig(
    dim=24,
    n_layers=2,
    n_heads=8,
    n_kv_heads=2,
    head_dim=6,
    ffn_dim=50,
    vocab_size=131,
    norm_eps=1e-5,
    rope_theta=1e4,
    dtype="float32",
)


class TestMesh:
    def test_model_groups_are_neighbours(self):
        mesh = make_mesh(2, 4)
        assert mesh.axis_names == ("data", "model")
        assert [d.id for d in mesh.devices[0]] == [0, 1, 2, 3]

    def test_uses_the_first_devices(self):
        assert [d.id for d in make_mesh(1, 2).devices.flat] == [0, 1]

    @pytest.mark.parametrize(
        ("data", "model", "message"), [(3, 3, "needs 9 devices, but there are 8"), (0, 1, "at least 1")]
    )
    def test_impossible(self, data, model, message):
        with pytest.raises(MeshError, match=message):
            make_mesh(data, model)

    def test_default_takes_all_devices_on_model_as_far_as_the_heads_allow(self):
        assert dict(default_mesh(CONFIG).shape) == {"data": 1, "model": 8}
        six = CONFIG.replace(n_heads=6, n_kv_heads=2)
        assert dict(default_mesh(six).shape) == {"data": 4, "model": 2}
        assert dict(default_mesh(CONFIG.replace(n_heads=3, n_kv_heads=1)).shape) == {"data": 8, "model": 1}

    @pytest.mark.parametrize(
        ("text", "sizes"), [("data:2,model:4", (2, 4)), ("model:4", (1, 4)), (" data: 2 ", (2, 1)), ("", (1, 1))]
    )
    def test_parse(self, text, sizes):
        assert tuple(parse_mesh(text).values()) == sizes

    @pytest.mark.parametrize("text", ["2,4", "data:x", "tensor:2", "data:0", "model:-1", "data:2;model:4"])
    def test_parse_refuses(self, text):
        with pytest.raises(MeshError, match="expected sizes such as"):
            parse_mesh(text)

    def test_another_kind_of_mesh_is_refused(self):
        with pytest.raises(MeshError, match="make_mesh"):
            check_mesh(CONFIG, jax.make_mesh((8,), ("x",)))

    @pytest.mark.parametrize("given", [("localhost:1", None, None), ("localhost:1", 2, None), (None, 2, 0)])
    def test_processes_need_all_three_settings(self, given):
        with pytest.raises(MeshError, match="together"):
            start_distributed(*given)

    def test_process_id_in_range(self):
        with pytest.raises(MeshError, match=r"must lie in 0\.\.1"):
            start_distributed("localhost:1", 2, 2)


class TestHeads:
    def test_sizes_that_work(self):
        assert model_sizes(CONFIG) == [1, 2, 4, 8]
        assert model_sizes(CONFIG.replace(n_heads=6, n_kv_heads=3)) == [1, 3, 6]
        assert model_sizes(CONFIG.replace(n_heads=12, n_kv_heads=4)) == [1, 2, 4, 12]

    @pytest.mark.parametrize("model", [3, 5, 6, 16])
    def test_refusal_names_the_sizes_that_work(self, model):
        with pytest.raises(MeshError, match="Sizes that work: 1, 2, 4, 8"):
            check_model_size(CONFIG, model)

    @pytest.mark.parametrize(("model", "layout"), [(1, (2, 4)), (2, (2, 4)), (4, (4, 2)), (8, (8, 1))])
    def test_kv_head_layout(self, model, layout):
        assert kv_head_layout(CONFIG, model) == layout

    def test_padded(self):
        assert [padded(n, 4) for n in (4, 5, 8)] == [4, 8, 8]


class TestWeights:
    def test_random_weights_have_the_described_shapes_and_shards(self):
        mesh = make_mesh(2, 4)
        weights, abstract = init_weights(jax.random.key(0), CONFIG, mesh=mesh), abstract_weights(CONFIG, mesh)
        assert jax.tree.structure(weights) == jax.tree.structure(abstract)
        for made, described in zip(jax.tree.leaves(weights), jax.tree.leaves(abstract), strict=True):
            assert (made.shape, made.dtype) == (described.shape, described.dtype)
            assert made.sharding.is_equivalent_to(described.sharding, made.ndim)
        # One device holds a quarter of a split matrix, not all of it.
        wqkv = weights.layers[0].wqkv
        assert wqkv.addressable_shards[0].data.shape == (1, 4, 6, 24)

    def test_the_same_key_gives_the_same_model_on_every_mesh(self):
        one, many = (init_weights(jax.random.key(3), CONFIG, mesh=make_mesh(*m)) for m in ((1, 1), (1, 8)))
        np.testing.assert_array_equal(many.tok_embeddings[:131], one.tok_embeddings)
        assert not np.any(many.tok_embeddings[131:])
        wqkv, repeated = np.asarray(one.layers[1].wqkv), np.asarray(many.layers[1].wqkv)
        np.testing.assert_array_equal(repeated[:, :1].reshape(2, 4, 6, 24), wqkv[:, :4])  # query heads
        for copy in range(8):  # key and value of each kv head, four times
            np.testing.assert_array_equal(repeated[copy, 1:], wqkv[copy // 4, 4:])
        np.testing.assert_array_equal(many.layers[1].w2[:, :50], one.layers[1].w2)
        assert not np.any(many.layers[1].w2[:, 50:])

    def test_layers_differ(self):
        weights = init_weights(jax.random.key(0), CONFIG, mesh=make_mesh())
        assert not np.allclose(weights.layers[0].w2, weights.layers[1].w2)

    def test_parameter_count(self):
        weights = init_weights(jax.random.key(0), CONFIG, mesh=make_mesh())
        assert count_parameters(CONFIG) == sum(x.size for x in jax.tree.leaves(weights))


@pytest.mark.parametrize(
    ("platform", "fields", "expected"),
    [
        ("gpu", {"compute_capability": "9.0", "core_count": 114}, 114),
        ("gpu", {"compute_capability": "9.0"}, 132),
        ("gpu", {"compute_capability": "8.0", "core_count": 108}, 0),
        ("gpu", {"compute_capability": "10.0", "core_count": 148}, 0),
        ("gpu", {"compute_capability": "gfx942"}, 0),
        ("cpu", {}, 0),
    ],
)
def test_hopper_is_one_generation(platform, fields, expected):
    assert hopper_processors(types.SimpleNamespace(platform=platform, **fields)) == expected
