"""Meta's own checkpoints in a plain torch model of Meta's layout: a `TorchModel` for the reference.

It follows the formulas of Meta's reference code (`llama/model.py` of Llama 2 and 3, `models/llama3/model.py` of
llama-models). It shares neither the reader of checkpoints nor the permutation of heads nor the configuration with the
engine, so that a mistake in those shows.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ..errors import ParityError
from ..json_file import read_json_object
from .torch_reference import Tap, torch_device, torch_dtype, torch_version

ZIP_MAGIC = b"PK\x03\x04"
# Which axis the ranks split, by what a tensor belongs to; nothing splits a norm.
SPLIT_AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, OLD_CONTEXT = 1, 4, 8192  # constants in Meta's code
FACTOR, FACTORS = 8.0, {(2048, 16): 32.0, (3072, 28): 32.0}  # by (dim, n_layers): Llama 3.2 1B and 3B
LLAMA2_THETA, LLAMA3_THETA, LLAMA3_VOCAB = 10_000.0, 500_000.0, 128_256  # where params.json has no rope_theta

Rank = Mapping[str, torch.Tensor]


def open_meta_model(
    folder: str | os.PathLike[str], dtype: str, *, rope_factor: float | None = None, device: str = "cpu"
) -> "MetaModel":
    """Opens params.json and every consolidated.NN.pth of a folder; the tensors stay in the files until they are used.

    Args:
      folder: as Meta's download leaves it.
      dtype: of weights and activations: float64, float32, bfloat16 or float16.
      rope_factor: of scaled rotary embeddings, used if params.json says `use_scaled_rope`; None: what this package's
        exporter wrote beside it, else 32 for the shapes of Llama 3.2 1B and 3B, else 8.
      device: what computes, such as "cuda".

    Raises ParityError, naming the file and the field or tensor, for what is missing, malformed or not a plain Llama.
    """
    folder = Path(folder)
    to, place = torch_dtype(dtype), torch_device(device)
    files = sorted(folder.glob("consolidated.*.pth"))
    names = [f"consolidated.{rank:02}.pth" for rank in range(len(files))]
    if not files or names != [file.name for file in files]:
        found = ", ".join(file.name for file in files) or "none"
        raise ParityError(f"{folder}: expected consolidated.00.pth, consolidated.01.pth and so on; found {found}.")
    params = _Params(folder / "params.json", read_json_object(folder / "params.json", ParityError))
    dim, n_heads, n_layers = (params.count(name) for name in ("dim", "n_heads", "n_layers"))
    n_kv_heads = params.count("n_kv_heads", n_heads)
    if dim % n_heads or dim // n_heads % 2 or n_heads % n_kv_heads:
        raise ParityError(
            f"{params.file}: dim={dim}, n_heads={n_heads} and n_kv_heads={n_kv_heads} do not go together; expected "
            "heads of one even width, and as many of them for each kv head."
        )
    ranks = tuple(_load(file) for file in files)
    _check(files, ranks, dim, n_layers, n_kv_heads * (dim // n_heads))
    scaled = params.flag("use_scaled_rope")
    is_llama3 = scaled or _joined_shape(ranks, "tok_embeddings.weight", dim)[0] == LLAMA3_VOCAB
    theta = params.positive("rope_theta", LLAMA3_THETA if is_llama3 else LLAMA2_THETA)
    inv_freq = inverse_frequencies(dim // n_heads, theta)
    if scaled:
        inv_freq = scale_frequencies(inv_freq, rope_factor or _factor(folder, (dim, n_layers)))
    return MetaModel(
        ranks=ranks,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        norm_eps=params.positive("norm_eps", 1e-5),
        inv_freq=inv_freq.to(place),
        dtype=to,
        device=place,
    )


def _factor(folder: Path, shape: tuple[int, int]) -> float:
    """The factor of scaled rotary embeddings. Read here, not taken from the engine: it may be what is wrong there."""
    sidecar = folder / "sharded_llama.json"
    if sidecar.exists():
        scaling = read_json_object(sidecar, ParityError).get("rope_scaling")
        if isinstance(scaling, dict):
            return _Params(sidecar, scaling).positive("factor", FACTOR)
    return FACTORS.get(shape, FACTOR)


@dataclass(frozen=True)
class MetaModel:
    """A `TorchModel` whose ranks are joined tensor by tensor, when one is used."""

    ranks: tuple[Rank, ...]
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    inv_freq: torch.Tensor  # (K/2,) float32, radians per position
    dtype: torch.dtype
    device: torch.device

    @property
    def made_by(self) -> str:
        """See `Reference.made_by`."""
        return f"a plain model in Meta's layout, {torch_version(self.device)}"

    @property
    def vocab_size(self) -> int:
        return _joined_shape(self.ranks, "tok_embeddings.weight", self.dim)[0]

    def embed(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """See `TorchModel.embed`."""
        return functional.embedding(tokens_BL, self._weight("tok_embeddings", self.dtype))

    def layer(self, layer: int, hidden_BLD: torch.Tensor, tap: Tap, dtype: torch.dtype) -> torch.Tensor:
        """See `TorchModel.layer`. Queries and keys go to the tap with the pairs of their rotation in halves."""

        def linear(x: torch.Tensor, part: str) -> torch.Tensor:
            return functional.linear(x, self._weight(f"layers.{layer}.{part}", dtype))

        def norm(x: torch.Tensor, part: str) -> torch.Tensor:
            return rms_norm(x, self._weight(f"layers.{layer}.{part}", dtype), self.norm_eps)

        def tap_pairs(name: str, x: torch.Tensor) -> torch.Tensor:
            return to_neighbours(tap(name, to_halves(x)))

        x = tap("attention_norm", norm(hidden_BLD, "attention_norm"))
        q = tap_pairs("q", linear(x, "attention.wq").unflatten(-1, (self.n_heads, -1)))
        k = tap_pairs("k", linear(x, "attention.wk").unflatten(-1, (self.n_kv_heads, -1)))
        v = tap("v", linear(x, "attention.wv").unflatten(-1, (self.n_kv_heads, -1)))
        q, k = tap_pairs("q_rotated", rotate(q, self.inv_freq)), tap_pairs("k_rotated", rotate(k, self.inv_freq))
        weights = tap("attn_weights", attention_weights(q, repeat_kv(k, self.n_heads)))
        attn = tap("attn", torch.matmul(weights, repeat_kv(v, self.n_heads).transpose(1, 2)).transpose(1, 2))
        attn_wo = tap("attn_wo", linear(attn.flatten(-2), "attention.wo"))
        residual = tap("attn_residual", hidden_BLD + attn_wo)
        x = tap("ffn_norm", norm(residual, "ffn_norm"))
        gate, up = tap("gate", linear(x, "feed_forward.w1")), tap("up", linear(x, "feed_forward.w3"))
        activation = tap("activation", functional.silu(gate) * up)
        return tap("ffn_residual", residual + tap("down", linear(activation, "feed_forward.w2")))

    def head(self, hidden_BLD: torch.Tensor, tap: Tap, dtype: torch.dtype) -> torch.Tensor:
        """See `TorchModel.head`."""
        norm = tap("norm", rms_norm(hidden_BLD, self._weight("norm", dtype), self.norm_eps))
        output = "output" if "output.weight" in self.ranks[0] else "tok_embeddings"  # absent: tied
        return tap("logits", functional.linear(norm, self._weight(output, dtype)))

    def _weight(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor, rounded to the model's type and converted to `dtype`."""
        name += ".weight"
        parts, axis = [rank[name] for rank in self.ranks], _split_axis(self.ranks, name, self.dim)
        whole = parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, axis)
        return whole.to(self.device, self.dtype).to(dtype)


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) in float32 (float64 of float64), cast back, times the weight."""
    y = x.to(_accumulator(x))
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight_D


def inverse_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    """Radians per position of each pair of a head's channels: (K/2,) in float32."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)


def scale_frequencies(inv_freq: torch.Tensor, factor: float) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    wavelen = 2 * math.pi / inv_freq
    smooth = (OLD_CONTEXT / wavelen - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    kept = torch.where(wavelen < OLD_CONTEXT / HIGH_FREQ_FACTOR, inv_freq, between)
    return torch.where(wavelen > OLD_CONTEXT / LOW_FREQ_FACTOR, inv_freq / factor, kept)


def rotate(x_BLHK: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Turns each pair of neighbouring channels by its position's angle: a complex product in float32 or float64."""
    real = _accumulator(x_BLHK)
    positions = torch.arange(x_BLHK.shape[1], device=x_BLHK.device, dtype=real)
    angles = torch.outer(positions, inv_freq.to(real))[:, None]
    pairs = torch.view_as_complex(x_BLHK.to(real).unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2).to(x_BLHK.dtype)


def repeat_kv(x_BLGK: torch.Tensor, n_heads: int) -> torch.Tensor:
    """(B, L, H, K): each kv head once for every query head that it serves."""
    return x_BLGK.repeat_interleave(n_heads // x_BLGK.shape[2], dim=2)


def attention_weights(q_BLHK: torch.Tensor, k_BSHK: torch.Tensor) -> torch.Tensor:
    """Weights (B, H, L, S) of causal attention: softmax of q.k / sqrt(K) in float32 or float64, cast back."""
    scores = torch.matmul(q_BLHK.transpose(1, 2), k_BSHK.permute(0, 2, 3, 1)) / math.sqrt(q_BLHK.shape[-1])
    scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
    return functional.softmax(scores.to(_accumulator(q_BLHK)), dim=-1).to(q_BLHK.dtype)


def to_halves(x: torch.Tensor) -> torch.Tensor:
    """The canonical order of rotated channels: of each neighbouring pair the first ones, then the second ones."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def to_neighbours(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_halves`."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class _Params:
    """The fields of params.json, checked one by one; null is as good as absent."""

    file: Path
    values: Mapping[str, Any]

    def count(self, name: str, default: int | None = None) -> int:
        value = default if self.values.get(name) is None else self.values[name]
        if type(value) is not int or value < 1:
            raise ParityError(f"{self.file}: {name}={value!r}; expected a whole number of at least 1.")
        return value

    def positive(self, name: str, default: float) -> float:
        value = default if self.values.get(name) is None else self.values[name]
        if type(value) not in (int, float) or not 0 < value < 1e30:  # also false for NaN
            raise ParityError(f"{self.file}: {name}={value!r}; expected a number above 0.")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if not isinstance(value, bool | None):
            raise ParityError(f"{self.file}: {name}={value!r}; expected true or false.")
        return value is True


def _load(file: Path) -> Rank:
    """The tensors of a rank, mapped where the file's form allows it (torch.save's zip form since 1.6)."""
    try:
        with file.open("rb") as f:
            mapped = f.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:  # which types a broken file raises, torch does not say
        raise ParityError(
            f"{file}: torch's restricted loader refuses it ({type(e).__name__}); expected a dictionary of tensors, as "
            "torch.save writes it."
        ) from e
    if not isinstance(tensors, dict):
        raise ParityError(f"{file}: holds a {type(tensors).__name__}; expected a dictionary of tensors.")
    for name, x in tensors.items():
        if not isinstance(name, str) or not _is_plain(x):
            raise ParityError(f"{file}: {ascii(name)[:100]} is not a contiguous tensor; expected nothing else.")
    return tensors


def _is_plain(x: object) -> bool:
    """Whether it is a tensor with a place in the file for each of its values: its shape is no mere claim."""
    return isinstance(x, torch.Tensor) and x.layout == torch.strided and x.device.type == "cpu" and x.is_contiguous()


def _check(files: list[Path], ranks: tuple[Rank, ...], dim: int, n_layers: int, kv_dim: int) -> None:
    """Raises ParityError unless the tensors of all ranks together are those of the model, and no others."""
    first = ranks[0]
    if n_layers > len(first):
        raise ParityError(f"{files[0]}: has {len(first)} tensors, too few for the {n_layers} layers of params.json.")
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):  # they tell the other sizes
        if name not in first or first[name].ndim != 2:
            raise ParityError(f"{files[0]}: lacks the matrix {name}.")
    vocab_size = _joined_shape(ranks, "tok_embeddings.weight", dim)[0]
    ffn_dim = _joined_shape(ranks, "layers.0.feed_forward.w1.weight", dim)[0]
    shapes = {"tok_embeddings": (vocab_size, dim), "norm": (dim,)}
    if "output.weight" in first:
        shapes["output"] = (vocab_size, dim)
    for i in range(n_layers):
        shapes |= {f"layers.{i}.attention.{name}": (dim, dim) for name in ("wq", "wo")}
        shapes |= {f"layers.{i}.attention.{name}": (kv_dim, dim) for name in ("wk", "wv")}
        shapes |= {f"layers.{i}.feed_forward.{name}": (ffn_dim, dim) for name in ("w1", "w3")}
        shapes |= {f"layers.{i}.feed_forward.w2": (dim, ffn_dim)}
        shapes |= {f"layers.{i}.{name}": (dim,) for name in ("attention_norm", "ffn_norm")}
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()}
    for file, rank in zip(files, ranks, strict=True):
        known = {name for name in rank if not name.endswith("rope.freqs")}  # Llama 2 stores what follows from params
        for name in sorted(known ^ shapes.keys()):
            raise ParityError(f"{file}: {'lacks' if name in shapes else 'has an unknown'} tensor {name}.")
        for name, shape in shapes.items():
            x, axis = rank[name], _split_axis(ranks, name, dim)
            split = tuple(n / len(ranks) if i == axis else n for i, n in enumerate(shape))
            if tuple(x.shape) != split or not x.is_floating_point():
                raise ParityError(
                    f"{file}: tensor {name} is {x.dtype} {tuple(x.shape)}; expected floats of shape {shape} in "
                    f"{len(ranks)} parts."
                )


def _split_axis(ranks: tuple[Rank, ...], name: str, dim: int) -> int | None:
    """Which axis of a tensor the ranks split; of the embeddings columns (Llama 2) or rows (Llama 3)."""
    part = name.split(".")[-2]
    if part == "tok_embeddings":
        return 0 if ranks[0][name].shape[1] == dim else 1
    return SPLIT_AXES.get(part)


def _joined_shape(ranks: tuple[Rank, ...], name: str, dim: int) -> tuple[int, ...]:
    """The shape of a whole tensor."""
    axis = _split_axis(ranks, name, dim)
    return tuple(n * len(ranks) if i == axis else n for i, n in enumerate(ranks[0][name].shape))
