"""Meta checkpoints made by torch from the tensors of a Hugging Face model, worked out without the package's code."""

import json
from pathlib import Path

import torch
from hf_models import State

from sharded_llama.config import LlamaConfig

# Head counts that 8 files divide, a head width of dim / n_heads, a vocabulary of Llama 2's kind.
CONFIG = LlamaConfig(
    dim=64,
    n_layers=2,
    n_heads=16,
    n_kv_heads=8,
    head_dim=4,
    ffn_dim=176,
    vocab_size=136,
    norm_eps=1e-6,
    rope_theta=10_000.0,
    max_seq_len=4096,
    bos_id=1,
    eos_ids=(2,),
    dtype="float32",
)
PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 16,
    "n_kv_heads": 8,
    "multiple_of": 16,
    "norm_eps": 1e-6,
    "vocab_size": -1,
}

COLUMN_PARALLEL = ("wq", "wk", "wv", "w1", "w3", "output")
ROW_PARALLEL = ("wo", "w2")
PARTS = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}


def to_meta_names(state: dict[str, torch.Tensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """The tensors under Meta's names, rows of wq and wk so that rotary embeddings turn neighbours."""
    meta = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        if stem in TOP:
            meta[TOP[stem] + ".weight"] = tensor
            continue
        _, _, layer, part = stem.split(".", 3)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            halves = tensor.reshape(-1, 2, config.head_dim // 2, config.dim)
            tensor = torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(tensor.shape)
        meta[f"layers.{layer}.{PARTS[part]}.weight"] = tensor
    return meta


def split(meta: dict[str, torch.Tensor], files: int, embeddings: str) -> list[dict[str, torch.Tensor]]:
    """The tensors of each model-parallel rank; `embeddings` are split by "width" (Llama 2) or "vocabulary"."""

    def axis(name: str) -> int | None:
        kind = name.split(".")[-2]
        if kind == "tok_embeddings":
            return 1 if embeddings == "width" else 0
        return 0 if kind in COLUMN_PARALLEL else 1 if kind in ROW_PARALLEL else None

    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(files)]
    for name, tensor in meta.items():
        parts = [tensor] * files if axis(name) is None else tensor.chunk(files, axis(name))
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part.contiguous().clone()
    return ranks


def save_meta(
    folder: Path,
    state: State,
    config: LlamaConfig,
    *,
    files: int = 1,
    embeddings: str = "vocabulary",
    params: dict | None = None,
) -> None:
    """Writes the folder that Meta's download leaves, for the tensors of a Hugging Face model."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config.dtype)
    tensors = {name: torch.from_numpy(x.astype("float64")).to(dtype) for name, x in state.items()}
    for rank, tensors_of in enumerate(split(to_meta_names(tensors, config), files, embeddings)):
        tensors_of["rope.freqs"] = torch.arange(config.head_dim // 2, dtype=torch.float32)
        torch.save(tensors_of, folder / f"consolidated.{rank:02}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS if params is None else params))
    (folder / "checklist.chk").write_text("d41d8cd98f00b204e9800998ecf8427e  params.json\n")
