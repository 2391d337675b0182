"""A model and a text that train in seconds, on every mesh with up to 4 model shards and without padding."""

import functools
from typing import Any

import jax
import numpy as np

from sharded_llama.config import LlamaConfig
from sharded_llama.mesh import make_mesh
from sharded_llama.training.data import Batch, put_batch, training_batch
from sharded_llama.training.settings import TrainSettings
from sharded_llama.training.step import TrainState, TrainStep, abstract_train_state, make_train_step
from sharded_llama.weights import XfmrWeights, abstract_weights

QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of these tests' time

CONFIG = LlamaConfig(
    dim=16,
    n_layers=1,
    n_heads=8,
    n_kv_heads=4,
    head_dim=4,
    ffn_dim=24,
    vocab_size=264,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    max_seq_len=32,
    tie_embeddings=True,
    bos_id=0,
    eos_ids=(1,),
    dtype="float32",
)
SETTINGS = TrainSettings(
    steps=6, batch=8, length=16, warmup_steps=2, learning_rate=1e-2, dropout=0.1, eval_every=2, save_every=3
)
TEXT = "".join(f"{i} green bottles, hanging on the wall; und Äpfel auch.\n" for i in range(60))
IDS = np.random.default_rng(0).integers(2, 40, 200).astype(np.int32)


def batch_of(step: int, settings: TrainSettings = SETTINGS) -> Batch:
    return training_batch(
        IDS, step, seed=settings.seed, batch=settings.batch, length=settings.length, bos_id=CONFIG.bos_id
    )


def random_weights(config: LlamaConfig, mesh_shape: tuple[int, int]) -> XfmrWeights:
    """Weights without compiling an initialiser; the same on every mesh that does not pad."""
    rng = np.random.default_rng(1)
    abstract = abstract_weights(config, make_mesh(*mesh_shape))

    def make(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put((x.ndim == 1) + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), x.sharding)

    return jax.tree.map(make, abstract)


def random_state(mesh_shape: tuple[int, int]) -> TrainState:
    """The state of CONFIG and SETTINGS before the first step, from `random_weights`."""
    _, *rest = abstract_train_state(CONFIG, SETTINGS, make_mesh(*mesh_shape))
    zeros: Any = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), rest)
    return TrainState(random_weights(CONFIG, mesh_shape), *zeros)


@functools.cache
def compiled_step(config: LlamaConfig, settings: TrainSettings, mesh_shape: tuple[int, int]) -> TrainStep:
    mesh = make_mesh(*mesh_shape)
    args = abstract_train_state(config, settings, mesh), put_batch(batch_of(1, settings), mesh)
    return make_train_step(config, settings, mesh).lower(*args).compile(QUICK)


def run_steps(
    state: TrainState,
    steps: range,
    mesh_shape: tuple[int, int],
    config: LlamaConfig = CONFIG,
    settings: TrainSettings = SETTINGS,
) -> tuple[TrainState, list[float]]:
    """The state after `steps` (numbers from 1) and their losses; `state` is used up."""
    mesh, step_function, losses = make_mesh(*mesh_shape), compiled_step(config, settings, mesh_shape), []
    for i in steps:
        state, metrics = step_function(state, put_batch(batch_of(i, settings), mesh))
        losses.append(float(metrics["loss"]))
    return state, losses
