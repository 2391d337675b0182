"""What the PyTorch references share: a model is run stage by stage, in its own type and in a higher one, in lockstep.

A run of the same weights in higher precision (`HIGHER`) says how far the model's own rounding takes it (`Stage.noise`).
In half precision another one is fed the model's own values, component by component (`Stage.exact`).
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np
import torch

from ..errors import ParityError
from .components import EMBEDDING, HEAD, MAX_ATTENTION_BYTES, Greedy, Stage, layer_stage, stage_axes

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
# Type of a model -> type of the runs that it is compared with; a float64 model has none.
HIGHER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
CHUNK = 1 << 22  # values that are converted to float64 at a time

# Sees a component by name and in canonical form; returns what the computation goes on with, in the same form and type.
Tap = Callable[[str, torch.Tensor], torch.Tensor]
Forward = Callable[[torch.Tensor, Tap, torch.dtype], torch.Tensor]


class TorchModel(Protocol):
    """A model whose stages can be run one by one, and whose components can be seen and replaced on the way.

    Hidden states are (B, L, D). `layer` and `head` compute in the type `dtype`, which their input has: with the weights
    as they are where that is the model's type, else with a copy of this stage's weights, for as long as it runs. What a
    tap returns for "attn_weights" may go unused.
    """

    @property
    def made_by(self) -> str:
        """See `Reference.made_by`."""

    @property
    def n_layers(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def embed(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """The hidden states of int64 tokens, in the model's type."""

    def layer(self, layer: int, hidden_BLD: torch.Tensor, tap: Tap, dtype: torch.dtype) -> torch.Tensor:
        """The hidden states after a layer, all of whose components the tap has seen in their order."""

    def head(self, hidden_BLD: torch.Tensor, tap: Tap, dtype: torch.dtype) -> torch.Tensor:
        """Logits (B, L, V) after the final norm."""


class States(NamedTuple):
    """What goes from one stage to the next: hidden states (B, L, D) of the model's own run and of the higher one."""

    native: torch.Tensor
    higher: torch.Tensor | None


@dataclass(frozen=True)
class TorchReference:
    """A `Reference` computed by a `TorchModel`. Arrays come back to the host and are read-only."""

    model: TorchModel

    @property
    def made_by(self) -> str:
        """See `Reference.made_by`."""
        return self.model.made_by

    @property
    def dtype(self) -> str:
        """See `Reference.dtype`."""
        return dtype_name(self.model.dtype)

    def stages(self, tokens_BL: np.ndarray) -> Iterator[Stage]:
        """See `Reference.stages`. Raises ParityError for tokens that are not of the vocabulary."""
        states = _embed(self.model, self._tokens(tokens_BL))
        layers = [(layer_stage(i), functools.partial(self.model.layer, i)) for i in range(self.model.n_layers)]
        for name, forward in [(EMBEDDING, _embedding), *layers, (HEAD, self.model.head)]:
            stage, states = _run(self.model, name, forward, states)
            yield stage
            del stage  # not to be held while the next one is computed

    @torch.inference_mode()
    def greedy(self, tokens_BL: np.ndarray, new_tokens: int) -> Greedy:
        """See `Reference.greedy`. Recomputes the whole sequence for each token; of equal logits the lowest token id.

        Raises ParityError for tokens that are not of the vocabulary.
        """
        model, tokens = self.model, self._tokens(tokens_BL)
        chosen_BN = np.zeros((len(tokens), new_tokens), np.int32)
        margins_BN = np.zeros((len(tokens), new_tokens))
        for step in range(new_tokens):
            hidden = model.embed(tokens)
            for i in range(model.n_layers):
                hidden = model.layer(i, hidden, _unchanged, model.dtype)
            logits_BV = to_numpy(model.head(hidden[:, -1:], _unchanged, model.dtype)[:, 0].double())
            second, first = np.partition(logits_BV, (-2, -1), axis=-1)[:, -2:].T
            chosen_BN[:, step] = logits_BV.argmax(axis=-1)  # the first of equals, which torch.argmax does not promise
            margins_BN[:, step] = first - second
            tokens = torch.cat([tokens, torch.from_numpy(chosen_BN[:, step : step + 1]).to(tokens)], dim=1)
        return Greedy(chosen_BN, margins_BN)

    def _tokens(self, tokens_BL: np.ndarray) -> torch.Tensor:
        """The tokens as int64 on the model's device."""
        tokens, vocab_size = np.asarray(tokens_BL), self.model.vocab_size
        if tokens.ndim != 2 or not tokens.size:
            raise ParityError(f"The tokens have shape {tokens.shape}; expected at least one row of at least one token.")
        for row, position in np.argwhere((tokens < 0) | (tokens >= vocab_size))[:1]:
            raise ParityError(
                f"Row {row}, token {position} is {tokens[row, position]}; the reference's token ids are 0 to "
                f"{vocab_size - 1}."
            )
        return torch.from_numpy(tokens.astype(np.int64)).to(self.model.device)


def torch_dtype(name: str) -> torch.dtype:
    """The type called `name`. Raises ParityError when no reference computes in it."""
    if name not in DTYPES:
        raise ParityError(f"dtype={name!r} is not supported; expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a type, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def torch_device(name: str) -> torch.device:
    """The device called `name`, such as "cuda:1". Raises ParityError when there is none."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:  # torch asserts that it was built with CUDA
        raise ParityError(f"device={name!r} cannot be used: {str(e).splitlines()[0]}") from e
    if device.type == "meta":  # which has shapes and no values
        raise ParityError(f"device={name!r} cannot be used: it computes nothing.")
    return device


def torch_version(device: torch.device) -> str:
    """What computes, for `made_by`: such as "torch 2.13.0" or "torch 2.13.0 on NVIDIA H200"."""
    place = f" on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"torch {torch.__version__}{place}"


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """The same bits in a contiguous, read-only array on the host; it may share the tensor's memory."""
    x = x.contiguous().cpu()
    array = x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
    array.flags.writeable = False
    return array


def relative_distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over norm of `exact`, in float64; 0 where both are 0, infinite where only `exact` is."""
    difference, size = [], []
    for a, b in zip(x.flatten().split(CHUNK), exact.flatten().split(CHUNK), strict=True):
        a, b = a.double(), b.double()
        difference.append(torch.linalg.vector_norm(a - b).item())
        size.append(torch.linalg.vector_norm(b).item())
    distance, norm = math.hypot(*difference), math.hypot(*size)
    if norm == 0:
        return 0.0 if distance == 0 else math.inf
    return distance / norm


@torch.inference_mode()
def _embed(model: TorchModel, tokens_BL: torch.Tensor) -> States:
    hidden = model.embed(tokens_BL)
    higher = HIGHER.get(model.dtype)
    return States(hidden, None if higher is None else hidden.to(higher))


def _embedding(hidden_BLD: torch.Tensor, tap: Tap, dtype: torch.dtype) -> torch.Tensor:
    """The forward function of the embedding's stage."""
    del dtype
    return tap(EMBEDDING, hidden_BLD)


def _unchanged(name: str, x: torch.Tensor) -> torch.Tensor:
    del name
    return x


@torch.inference_mode()
def _run(model: TorchModel, name: str, forward: Forward, states: States) -> tuple[Stage, States]:
    """One stage of every run, and the states after it."""
    native: dict[str, torch.Tensor] = {}
    noise: dict[str, float] = {}
    exact: dict[str, np.ndarray] = {}
    higher = HIGHER.get(model.dtype)

    def record(component: str, x: torch.Tensor) -> torch.Tensor:
        if component != "attn_weights" or x.numel() * x.element_size() <= MAX_ATTENTION_BYTES:
            native[component] = x
        return x

    def measure(component: str, x: torch.Tensor) -> torch.Tensor:
        if component in native:
            noise[component] = relative_distance(native[component], x)
        return x

    def isolate(component: str, x: torch.Tensor) -> torch.Tensor:
        if component not in native:
            return x
        exact[component] = to_numpy(x)
        return x if component == "attn_weights" else native[component].to(x.dtype)  # attention is fed as a whole

    after, after_higher, exact_logits = forward(states.native, record, model.dtype), None, None
    unseen = [c for c in stage_axes(name) if c not in native and c != "attn_weights"]
    if unseen:
        raise ParityError(f"{model.made_by} cannot be observed: {', '.join(unseen)} of {name} did not appear.")
    if higher is not None:
        after_higher = forward(states.higher, measure, higher)
        exact_logits = to_numpy(after_higher) if name == HEAD else None
        if model.dtype.itemsize == 2:
            forward(states.native.to(higher), isolate, higher)
    if name == HEAD:
        native["logits"] = native["logits"].to(torch.promote_types(model.dtype, torch.float32))
    values = {c: to_numpy(native[c]) for c in stage_axes(name) if c in native}
    return Stage(name, values, exact, noise, exact_logits), States(after, after_higher)
