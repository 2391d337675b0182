"""What each format calls the canonical tensors of `source`. Reading and exporting both use these tables."""

import re
from collections.abc import Mapping

# Canonical name -> stored name; `{i}` is the layer.
HF_NAMES = {
    "tok_embeddings": "model.embed_tokens.weight",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.wq": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.wk": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.wv": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.wo": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.w1": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.w3": "model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.w2": "model.layers.{i}.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "output": "lm_head.weight",
}
META_NAMES = {
    "tok_embeddings": "tok_embeddings.weight",
    "layers.{i}.attention_norm": "layers.{i}.attention_norm.weight",
    "layers.{i}.wq": "layers.{i}.attention.wq.weight",
    "layers.{i}.wk": "layers.{i}.attention.wk.weight",
    "layers.{i}.wv": "layers.{i}.attention.wv.weight",
    "layers.{i}.wo": "layers.{i}.attention.wo.weight",
    "layers.{i}.ffn_norm": "layers.{i}.ffn_norm.weight",
    "layers.{i}.w1": "layers.{i}.feed_forward.w1.weight",
    "layers.{i}.w3": "layers.{i}.feed_forward.w3.weight",
    "layers.{i}.w2": "layers.{i}.feed_forward.w2.weight",
    "norm": "norm.weight",
    "output": "output.weight",
}


def to_stored(name: str, table: Mapping[str, str]) -> str:
    """The stored name of canonical tensor `name` in a table above; a name that is not canonical is its own."""
    return _translate(name, table)


def to_canonical(stored: str, table: Mapping[str, str]) -> str:
    """The canonical name of a stored tensor; a name that is not in the table is its own."""
    return _translate(stored, {theirs: ours for ours, theirs in table.items()})


def _translate(name: str, table: Mapping[str, str]) -> str:
    layer = re.search(r"(?<=layers\.)\d+(?=\.)", name)
    if layer is None:
        return table.get(name, name)
    pattern = f"{name[: layer.start()]}{{i}}{name[layer.end() :]}"
    return table[pattern].format(i=layer[0]) if pattern in table else name
