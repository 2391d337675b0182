"""Hugging Face folders in transformers' own Llama: a `TorchModel` for the reference.

The modules are transformers' own. Its components are seen through forward hooks, and through the two functions of its
attention, which are wrapped for as long as a layer runs. Only the loop over the layers is written here.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from torch.func import functional_call
from transformers import LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import modeling_llama
from transformers.utils import logging

from ..errors import ParityError
from ..json_file import read_json_object
from .torch_reference import Tap, torch_device, torch_dtype, torch_version


def open_transformers(folder: str | os.PathLike[str], dtype: str, device: str = "cpu") -> "TransformersModel":
    """Loads a Hugging Face folder of safetensors into transformers' Llama.

    Args:
      folder: with config.json and the weights; nothing is downloaded.
      dtype: of weights and activations: float64, float32, bfloat16 or float16.
      device: where weights are kept and what computes, such as "cuda".

    Raises ParityError for a folder that transformers cannot load, or that lacks some of the model's tensors.
    """
    config = read_json_object(Path(folder) / "config.json", ParityError)  # transformers would do without the file
    if config.get("model_type", "llama") != "llama":  # and would make a Llama of it
        raise ParityError(f"{folder}: config.json has model_type={config['model_type']!r}; only 'llama' is supported.")
    to, place = torch_dtype(dtype), torch_device(device)
    try:
        with _quiet_unless_terminal():
            model, loaded = LlamaForCausalLM.from_pretrained(
                folder,
                dtype=to,
                attn_implementation="eager",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as e:  # which types a broken folder raises, transformers does not say
        raise ParityError(f"{folder}: transformers cannot load it: {e}") from e
    if loaded["missing_keys"]:  # they are random numbers now
        raise ParityError(f"{folder} lacks tensors: {', '.join(sorted(loaded['missing_keys']))[:200]}.")
    return TransformersModel(model.eval().to(place))  # of place alone: inv_freq stays in float32


@dataclass(frozen=True)
class TransformersModel:
    """A `TorchModel`: a Llama of transformers with eager attention."""

    model: LlamaForCausalLM

    @property
    def made_by(self) -> str:
        """See `Reference.made_by`."""
        return f"transformers {transformers.__version__} (eager attention), {torch_version(self.device)}"

    @property
    def n_layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def embed(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """See `TorchModel.embed`."""
        return self.model.model.embed_tokens(tokens_BL)

    def layer(self, layer: int, hidden_BLD: torch.Tensor, tap: Tap, dtype: torch.dtype) -> torch.Tensor:
        """See `TorchModel.layer`. Angles and mask are those that `LlamaModel.forward` makes for such hidden states."""
        module = self.model.model.layers[layer]
        positions = torch.arange(hidden_BLD.shape[1], device=hidden_BLD.device)[None]
        mask = create_causal_mask(
            config=self.model.config,
            inputs_embeds=hidden_BLD,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        with _precision(dtype), _observed(module, tap):
            angles = self.model.model.rotary_emb(hidden_BLD, position_ids=positions)
            inputs = {"attention_mask": mask, "position_ids": positions, "position_embeddings": angles}
            return tap("ffn_residual", self._call(module, dtype, hidden_BLD, **inputs))

    def head(self, hidden_BLD: torch.Tensor, tap: Tap, dtype: torch.dtype) -> torch.Tensor:
        """See `TorchModel.head`."""
        with _precision(dtype):
            norm = tap("norm", self._call(self.model.model.norm, dtype, hidden_BLD))
        return tap("logits", self._call(self.model.lm_head, dtype, norm))

    def _call(self, module: nn.Module, dtype: torch.dtype, x: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The module's output with its weights in `dtype`."""
        if dtype == self.dtype:
            return module(x, **inputs)
        weights = {name: weight.to(dtype) for name, weight in module.named_parameters()}
        return functional_call(module, weights, (x,), inputs)


@contextlib.contextmanager
def kept_in_float64() -> Iterator[None]:
    """transformers casts norm, rotary and softmax to float32 even in a float64 model: here they stay in float64."""

    def norm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self: nn.Module, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    softmax = nn.functional.softmax

    def softmax_as_given(x: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        del dtype
        return softmax(x, dim=dim)

    with (
        mock.patch.object(modeling_llama.LlamaRMSNorm, "forward", norm),
        mock.patch.object(modeling_llama.LlamaRotaryEmbedding, "forward", rotary),
        mock.patch.object(nn.functional, "softmax", softmax_as_given),
    ):
        yield


def _precision(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    return kept_in_float64() if dtype == torch.float64 else contextlib.nullcontext()


@contextlib.contextmanager
def _observed(layer: nn.Module, tap: Tap) -> Iterator[None]:
    """While this is active, the components of a decoder layer go through `tap`: all but its output."""
    attention, mlp = layer.self_attn, layer.mlp
    rotate, attend = modeling_llama.apply_rotary_pos_emb, modeling_llama.eager_attention_forward
    head_dim = attention.head_dim
    outputs = {
        "attention_norm": layer.input_layernorm,
        "attn_wo": attention.o_proj,
        "ffn_norm": layer.post_attention_layernorm,
        "gate": mlp.gate_proj,
        "up": mlp.up_proj,
        "down": mlp.down_proj,
    }

    def output(name: str, module: nn.Module, args: tuple, x: torch.Tensor) -> torch.Tensor:
        return tap(name, x)

    def heads(name: str, module: nn.Module, args: tuple, x: torch.Tensor) -> torch.Tensor:
        return tap(name, x.unflatten(-1, (-1, head_dim))).flatten(-2)

    def activation(module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        return tap("activation", args[0])

    def residual(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        # The layer adds this tensor again after the MLP, so that a replacement has to go into it.
        args[0].copy_(tap("attn_residual", args[0].clone()))

    def rotary(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        rotated = zip(("q_rotated", "k_rotated"), rotate(q, k, *args, **kwargs), strict=True)
        return tuple(tap(name, x.transpose(1, 2)).transpose(1, 2) for name, x in rotated)

    def eager_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        attn, weights = attend(*args, **kwargs)
        tap("attn_weights", weights)
        return tap("attn", attn), weights

    with contextlib.ExitStack() as stack:
        for name, module in outputs.items():
            stack.enter_context(module.register_forward_hook(functools.partial(output, name)))
        for name in ("q", "k", "v"):
            module = getattr(attention, f"{name}_proj")
            stack.enter_context(module.register_forward_hook(functools.partial(heads, name)))
        stack.enter_context(mlp.down_proj.register_forward_pre_hook(activation))
        stack.enter_context(layer.post_attention_layernorm.register_forward_pre_hook(residual))
        stack.enter_context(mock.patch.object(modeling_llama, "apply_rotary_pos_emb", rotary))
        stack.enter_context(mock.patch.object(modeling_llama, "eager_attention_forward", eager_attention))
        yield


@contextlib.contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Keeps transformers' progress bars out of logs and files; its warnings stay."""
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
