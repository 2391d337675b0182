"""One training step: loss, gradient and AdamW, as a pure function of the state, compiled once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ..config import LlamaConfig
from ..errors import TrainingError
from ..mesh import check_mesh
from ..model import Dropout, xfmr
from ..sharding import DATA, MODEL, model_sizes, named_sharding
from ..weights import XfmrWeights, abstract_weights, init_weights
from .data import Batch
from .loss import mean_over, token_nll
from .settings import TrainSettings

# Differentiable on every platform. The blockwise form would save nothing: its backward pass keeps all blocks.
ATTENTION = "reference"
FINAL_LEARNING_RATE = 0.1  # at the last step, as a fraction of the peak


class TrainState(NamedTuple):
    """All that a step changes. Optimizer moments are laid out like their weights."""

    weights: XfmrWeights  # in config.dtype
    opt_state: Any
    step: jax.Array  # int32, (): steps done


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def check_trainable(config: LlamaConfig, settings: TrainSettings, mesh: Mesh) -> None:
    """Raises TrainingError when this model cannot be trained so on this mesh, MeshError when it does not fit it."""
    check_mesh(config, mesh)
    data, model = mesh.shape[DATA], mesh.shape[MODEL]
    if model > config.n_kv_heads:
        sizes = [m for m in model_sizes(config) if m <= config.n_kv_heads]
        raise TrainingError(
            f"model={model} would train {model // config.n_kv_heads} copies of each of the {config.n_kv_heads} kv "
            f"heads apart. Sizes that work: {', '.join(map(str, sizes))}; put the other devices on data."
        )
    if settings.batch % data:
        raise TrainingError(f"batch={settings.batch} does not divide over data={data}: use a multiple of {data}.")
    if settings.length > config.max_seq_len:
        raise TrainingError(
            f"length={settings.length} is longer than the model's context, max_seq_len={config.max_seq_len} tokens."
        )


def make_optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) after clipping by the global norm.

    The learning rate rises linearly over `warmup_steps` and falls as a cosine to a tenth. Matrices are decayed, norms
    are not.
    """
    rate = optax.warmup_cosine_decay_schedule(
        init_value=settings.learning_rate / (settings.warmup_steps + 1),  # not 0, which would waste the first step
        peak_value=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay_steps=settings.steps,
        end_value=FINAL_LEARNING_RATE * settings.learning_rate,
    )
    adamw = optax.adamw(
        rate,
        b1=settings.beta1,
        b2=settings.beta2,
        weight_decay=settings.weight_decay,
        mask=lambda weights: jax.tree.map(lambda w: w.ndim >= 2, weights),
    )
    return optax.chain(optax.clip_by_global_norm(settings.grad_clip), adamw)


def abstract_train_state(config: LlamaConfig, settings: TrainSettings, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without memory."""
    weights = abstract_weights(config, mesh)
    optimizer = make_optimizer(settings)

    def replicated(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named_sharding(mesh, "replicated"))

    opt_state = optax.tree_map_params(
        optimizer,
        lambda x, weight: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=weight.sharding),
        jax.eval_shape(optimizer.init, weights),
        weights,
        transform_non_params=replicated,
    )
    return TrainState(weights, opt_state, replicated(jax.ShapeDtypeStruct((), jnp.int32)))


def init_train_state(config: LlamaConfig, settings: TrainSettings, mesh: Mesh) -> TrainState:
    """Random weights of `settings.seed`, the same model on every mesh, and an optimizer that has seen nothing."""
    check_trainable(config, settings, mesh)
    weights_key, _ = jax.random.split(jax.random.key(settings.seed))
    weights = init_weights(weights_key, config, mesh=mesh)
    optimizer = make_optimizer(settings)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(config, settings, mesh))
    # Zeros have no layout of their own: without the shardings every device would hold all moments.
    init = jax.jit(lambda w: (optimizer.init(w), jnp.int32(0)), out_shardings=shardings[1:])
    return TrainState(weights, *init(weights))


def cast_weights(weights: XfmrWeights, dtype: str) -> XfmrWeights:
    """The weights that the forward pass computes with."""
    return jax.tree.map(lambda w: w.astype(dtype), weights)


def batch_loss(
    weights: XfmrWeights, batch: Batch, config: LlamaConfig, *, mesh: Mesh, dropout: Dropout | None = None
) -> jax.Array:
    """Mean nats per valid token of `batch`, computed in `config.dtype` whatever that of the weights. Differentiable."""
    weights = cast_weights(weights, config.dtype)
    logits_BLV = xfmr(weights, config, batch.tokens_BL, mesh=mesh, backend=ATTENTION, dropout=dropout)
    return mean_over(batch.valid_BL, token_nll(logits_BLV, batch.targets_BL))


def make_train_step(config: LlamaConfig, settings: TrainSettings, mesh: Mesh) -> TrainStep:
    """The jitted step: (state, batch) to the next state and the step's `loss` (nats per token) and `grad_norm`.

    Pure: dropout follows from the seed and the number of the step. The state is donated: its arrays are reused.
    """
    check_trainable(config, settings, mesh)
    optimizer = make_optimizer(settings)
    forward = config.replace(dtype=settings.compute_dtype)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        _, dropout_key = jax.random.split(jax.random.key(settings.seed))
        dropout = Dropout(settings.dropout, jax.random.fold_in(dropout_key, state.step)) if settings.dropout else None
        loss, grads = jax.value_and_grad(batch_loss)(state.weights, batch, forward, mesh=mesh, dropout=dropout)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(weights, opt_state, state.step + 1), metrics

    # Outputs keep the layout of the state, so that one step's result is the next one's input.
    shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(config, settings, mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, named_sharding(mesh, "replicated")))
