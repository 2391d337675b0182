"""What is compared: the components of the forward pass in the order of their computation, and what a reference gives.

A component is a value inside the model under a name of its own, in one canonical form for every framework, mesh and
format: nothing repeated or padded, rotary embeddings in the half-split order. A stage is what is held at a time:
the embedding, one layer, or the head.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from ..config import LlamaConfig

EMBEDDING, HEAD = "embedding", "head"

# Axes of each component; the letters are those of the package, and S is the position that is attended to.
EMBEDDING_AXES = {"embedding": "BLD"}
LAYER_AXES = {
    "attention_norm": "BLD",
    "q": "BLHK",
    "k": "BLGK",
    "v": "BLGK",
    "q_rotated": "BLHK",
    "k_rotated": "BLGK",
    "attn_weights": "BHLS",
    "attn": "BLHK",  # before wo
    "attn_wo": "BLD",  # after it
    "attn_residual": "BLD",
    "ffn_norm": "BLD",
    "gate": "BLF",
    "up": "BLF",
    "activation": "BLF",  # silu(gate) * up
    "down": "BLD",
    "ffn_residual": "BLD",  # the layer's output
}
HEAD_AXES = {"norm": "BLD", "logits": "BLV"}

MAX_ATTENTION_BYTES = 1 << 30  # of a layer's attn_weights in the model's type; larger ones are left out

AXIS_NAMES = {
    "B": "row",
    "L": "token",
    "S": "attended token",
    "H": "head",
    "G": "kv head",
    "K": "channel",
    "D": "channel",
    "F": "channel",
    "V": "token id",
}


def layer_stage(layer: int) -> str:
    """The name of a layer's stage."""
    return f"layers.{layer}"


def keeps_attention_weights(shape: tuple[int, int], n_heads: int, dtype: np.dtype) -> bool:
    """Whether the attention weights of (B, L) tokens are small enough to be compared."""
    batch, length = shape
    return batch * n_heads * length**2 * np.dtype(dtype).itemsize <= MAX_ATTENTION_BYTES


def stage_axes(stage: str) -> dict[str, str]:
    """Axes by component of a stage, in the order of computation."""
    return {EMBEDDING: EMBEDDING_AXES, HEAD: HEAD_AXES}.get(stage, LAYER_AXES)


def component_shapes(stage: str, config: LlamaConfig, tokens_shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shape by component of a stage of a model, for (B, L) tokens."""
    batch, length = tokens_shape
    sizes = {"B": batch, "L": length, "S": length, "D": config.dim, "F": config.ffn_dim, "V": config.vocab_size}
    sizes |= {"H": config.n_heads, "G": config.n_kv_heads, "K": config.head_dim}
    return {name: tuple(sizes[axis] for axis in axes) for name, axes in stage_axes(stage).items()}


class Stage(NamedTuple):
    """One stage of a reference's run over (B, L) tokens: NumPy arrays by component, in the axes of `stage_axes`.

    Every component is there but those that the reference leaves out, such as attention weights that would be too large.
    """

    name: str  # EMBEDDING, layer_stage(i) or HEAD
    values: dict[str, np.ndarray]  # in the run's dtype; logits at least float32
    # Half precision only: each component in float32, computed from the reference's own half-precision inputs. What
    # the component would be without the rounding of its own arithmetic.
    exact: dict[str, np.ndarray]
    # Relative distance of `values` from a run of the same weights in higher precision throughout (float64 for float32,
    # float32 for half precision), by component; empty where there is none.
    noise: dict[str, float]
    # Of the head, where there is one: the logits of that run.
    exact_logits: np.ndarray | None = None


class Greedy(NamedTuple):
    """A greedy continuation of N tokens: what a reference chose and by how much."""

    tokens_BN: np.ndarray  # int32
    margins_BN: np.ndarray  # float64: its largest logit less its second largest


class Reference(Protocol):
    """Where the numbers to compare with come from."""

    @property
    def made_by(self) -> str:
        """What computed it, with versions, such as "transformers 5.23.0 (eager attention), torch 2.13.0"."""

    @property
    def dtype(self) -> str:
        """Type of its weights and activations, such as "bfloat16"."""

    def stages(self, tokens_BL: np.ndarray) -> Iterator[Stage]:
        """The embedding, every layer and the head, in order. Holds the values of one stage at a time."""

    def greedy(self, tokens_BL: np.ndarray, new_tokens: int) -> Greedy:
        """The tokens that it finds most likely after each row, one by one; end-of-sequence tokens end nothing."""
