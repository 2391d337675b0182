"""The gradient of every weight against torch's autograd, on every mesh that repeats no kv heads."""

import functools

import jax
import numpy as np
import pytest
import torch
from hf_reference import distance, make_model, save
from tiny_model import CONFIG, QUICK, SETTINGS, compiled_step

from sharded_llama.attention import blockwise_attn, grouped_query_attn
from sharded_llama.checkpoint import load_weights, open_checkpoint
from sharded_llama.config import LlamaConfig
from sharded_llama.errors import TrainingError
from sharded_llama.mesh import make_mesh
from sharded_llama.training.data import Batch, put_batch
from sharded_llama.training.settings import TrainSettings
from sharded_llama.training.step import batch_loss, check_trainable, init_train_state, make_train_step

MESHES = [(d, n // d) for n in (1, 2, 4, 8) for d in (1, 2, 4, 8) if d <= n and n // d <= 4]
# Grouped heads; V and F are odd, so that every mesh but model:1 pads them.
SHAPE = {"num_key_value_heads": 4, "head_dim": 6, "vocab_size": 131, "intermediate_size": 91}


@functools.cache
def reference(tied):
    return make_model("grouped", tie_word_embeddings=tied, num_hidden_layers=1 if tied else 2, **SHAPE)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {tied: save(reference(tied), tmp_path_factory.mktemp(f"tied-{tied}")) for tied in (False, True)}


def random_batch():
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, SHAPE["vocab_size"], (2, 8, 11)).astype(np.int32)
    targets[0] = SHAPE["vocab_size"] - 1  # beside the padding
    return Batch(tokens, targets, rng.random((8, 11)) < 0.8)


@functools.cache
def reference_gradients(tied):
    """Loss and gradients, by Hugging Face name, of the mean over valid tokens."""
    model = reference(tied)
    model.zero_grad()
    batch = random_batch()
    logits = model(torch.from_numpy(batch.tokens_BL).long(), use_cache=False).logits
    valid = torch.from_numpy(batch.valid_BL)
    loss = torch.nn.functional.cross_entropy(logits[valid], torch.from_numpy(batch.targets_BL).long()[valid])
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def unfused(grads, config):
    """Our gradients under Hugging Face's names, worked out without the package's layout; and the padding's."""
    v, f, d = config.vocab_size, config.ffn_dim, config.dim
    r = config.n_heads // config.n_kv_heads
    tensors, padding = {"model.norm.weight": grads.norm}, []

    def cut(x, axis, size):
        kept, rest = np.split(x, [size], axis)
        padding.append(rest)
        return kept

    tensors["model.embed_tokens.weight"] = cut(grads.tok_embeddings, 0, v)
    if grads.output is not None:
        tensors["lm_head.weight"] = cut(grads.output, 0, v)
    for i, layer in enumerate(grads.layers):
        w1, w3 = cut(layer.w13, 1, f)
        matrices = {
            "input_layernorm": layer.attention_norm,
            "self_attn.q_proj": layer.wqkv[:, :r].reshape(-1, d),
            "self_attn.k_proj": layer.wqkv[:, r].reshape(-1, d),
            "self_attn.v_proj": layer.wqkv[:, r + 1].reshape(-1, d),
            "self_attn.o_proj": layer.wo.reshape(d, -1),
            "post_attention_layernorm": layer.ffn_norm,
            "mlp.gate_proj": w1,
            "mlp.up_proj": w3,
            "mlp.down_proj": cut(layer.w2, 1, f),
        }
        tensors |= {f"model.layers.{i}.{name}.weight": x for name, x in matrices.items()}
    return tensors, padding


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("mesh_shape", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
def test_every_weight(checkpoints, mesh_shape, tied):
    mesh = make_mesh(*mesh_shape)
    config = LlamaConfig.from_hf(checkpoints[tied], dtype="float32")
    weights = load_weights(open_checkpoint(checkpoints[tied]), config, mesh=mesh, progress=False)
    run = jax.jit(lambda w, b: jax.value_and_grad(batch_loss)(w, b, config, mesh=mesh), compiler_options=QUICK)
    loss, grads = run(weights, put_batch(random_batch(), mesh))
    tensors, padding = unfused(jax.tree.map(np.asarray, grads), config)

    expected_loss, expected = reference_gradients(tied)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-6)
    assert tensors.keys() == expected.keys()
    errors = {name: distance(tensors[name], expected[name]) for name in expected}
    print(f"largest error {max(errors.values()):.1e} of {max(errors, key=errors.get)}")
    assert max(errors.values()) < 1e-5, errors
    assert all(not rows.any() for rows in padding)
    assert (sum(rows.size for rows in padding) > 0) == (mesh_shape[1] > 1)


def test_blockwise_attention_has_the_same_gradient(monkeypatch):
    """A last partial block, blocks that some queries cannot see, and grouped heads."""
    monkeypatch.setattr("sharded_llama.attention.reference.BLOCK", 8)
    length, keys = 19, jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, (1, length, n, 4)) for key, n in zip(keys, (2, 1, 1, 2), strict=True))
    positions = np.arange(length)[None]

    def gradient(attend):
        loss = jax.grad(lambda *qkv: (attend(*qkv, positions) * weight).sum(), argnums=(0, 1, 2))
        return jax.jit(loss, compiler_options=QUICK)(q, k, v)

    for reference, blockwise in zip(gradient(grouped_query_attn), gradient(blockwise_attn), strict=True):
        assert distance(blockwise, reference) < 2e-6


def test_no_vocabulary_is_gathered():
    """Logits and weights stay where they are: the compiled step moves sums, never a gathered array."""
    text = compiled_step(CONFIG, SETTINGS, (2, 4)).as_text()
    assert "all-reduce" in text
    assert not [word for word in ("all-gather", "all-to-all", "collective-permute") if word in text]


@pytest.mark.parametrize(("mesh_shape", "model"), [((1, 8), 8)])
def test_repeated_kv_heads_are_refused(checkpoints, mesh_shape, model):
    config = LlamaConfig.from_hf(checkpoints[True], dtype="float32")
    settings = TrainSettings(batch=8, length=11)
    for function in (check_trainable, init_train_state, make_train_step):
        with pytest.raises(TrainingError, match=rf"model={model} would train 2 copies .* 4 kv heads.*1, 2, 4;"):
            function(config, settings, make_mesh(*mesh_shape))
