"""The engine's own components: the functions that serve, run stage by stage with a probe that keeps what it sees.

Nothing here is a second model. `embed`, `transformer_layer` and `head` are the functions that `xfmr` is made of; a
probe keeps their components as further outputs and, where a reference's values are fed, hands these on in their place.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ..attention import attention_weights
from ..config import LlamaConfig
from ..engine.llm import LLM
from ..errors import ParityError
from ..kv_cache import KVPages
from ..layers import rope_angles
from ..model import LAYER_PSPECS, StepRows, check_vma, embed, head, row_places, transformer_layer
from ..sharding import DATA, MODEL, SPECS, padded, put
from ..weights import LayerWeights
from .components import LAYER_AXES
from .paged_rows import PagedRows
from .pieces import pieces_of

Arrays = dict[str, np.ndarray]

# Entry of the sharding table by axes.
_LAYOUTS = {
    "BLD": "hidden",
    "BLHK": "heads",
    "BLGK": "heads",
    "BHLS": "attn_weights",
    "BLF": "feed_forward",
}
_LAYER_LAYOUTS = {name: _LAYOUTS[axes] for name, axes in LAYER_AXES.items()}
_CACHED_FED = ("q", "k", "v", "q_rotated", "k_rotated")  # what rotation and attention depend on
_CACHED_GIVEN = ("q_rotated", "k_rotated", "attn")


class Capture:
    """The components of one model, for (B, L) arrays of tokens. B need not divide over the mesh.

    What goes in and comes out are host arrays in the axes of `parity.components`. What comes out has more in it: rows
    that repeat the first one until they divide over `data`, so that every replica is compared, and of k, v and what is
    cached of them every repeated kv head: (B', L, G', K).
    """

    def __init__(self, llm: LLM):
        self.llm = llm
        self._static = {"config": llm.config, "mesh": llm.mesh, "backend": llm.backend}

    def embedding(self, tokens_BL: np.ndarray) -> np.ndarray:
        """The embeddings (B', L, D)."""
        tokens = self._put("tokens", tokens_BL.astype(np.int32))
        return fetch(_embedding(self.llm.weights.tok_embeddings, tokens, mesh=self.llm.mesh))

    def layer(
        self, layer: int, h_BLD: np.ndarray, fed: Mapping[str, np.ndarray] | None = None, *, weights: bool = True
    ) -> Arrays:
        """Every component of a layer whose input is `h_BLD`.

        Components in `fed` are computed and then replaced by the given values, which is what those after them see.
        `weights=False` leaves out attn_weights, which grow with the square of the length.
        """
        fed = {name: self._feed(name, x) for name, x in (fed or {}).items() if name != "attn_weights"}
        out = self._run_layer(layer, h_BLD, fed, weights)
        width = self.llm.config.ffn_dim
        return {
            name: fetch(out[name])[..., : width if axes[-1] == "F" else None]
            for name, axes in LAYER_AXES.items()
            if name in out
        }

    def layer_output(self, layer: int, h_BLD: np.ndarray, *, weights: bool = True) -> np.ndarray:
        """The output (B', L, D) of a whole layer, from the program that `layer` runs without anything fed."""
        return fetch(self._run_layer(layer, h_BLD, {}, weights)["ffn_residual"])

    def cached_layer(self, layer: int, h_BLD: np.ndarray, fed: Mapping[str, np.ndarray], chunk: int) -> Arrays:
        """Rotation and attention of a prompt that goes through the KV cache, each fed the given values.

        The tokens come in chunks of `chunk`, the last three one by one, as a prompt that is continued and then
        decoded, neighbouring rows at different positions. Gives the rotated q and k that the layer computes at these
        positions, what the cache then holds, and what attention to the cache gives.
        """
        h_BLD, *values = (repeat_rows(x, self.llm) for x in (h_BLD, *(fed[name] for name in _CACHED_FED)))
        fed = dict(zip(_CACHED_FED, values, strict=True))
        rows, length = h_BLD.shape[:2]
        one_layer, mesh = self.llm.config.replace(n_layers=1), self.llm.mesh
        paged = PagedRows.new(mesh, rows, length + chunk)
        (pages,) = KVPages.new(one_layer, mesh, paged.n_pages)
        tables = self._put("tokens", paged.tables_BW)
        whole: Arrays = {}
        for piece in pieces_of(rows, length, min(chunk, length), n_single=3):
            out, pages = _cached_layer(
                self.llm.weights.layers[layer],
                self._put("hidden", piece.take(h_BLD)),
                {name: self._feed(name, piece.take(x)) for name, x in fed.items()},
                pages,
                tables,
                self._put("tokens", piece.starts_B),
                **self._static,
            )
            for name, x in out.items():
                part = fetch(x)
                piece.put(part, whole.setdefault(name, np.zeros((rows, length, *part.shape[2:]), part.dtype)))
        k_cache, v_cache = paged.cached(jax.tree.map(fetch, pages), length)
        rotated = {f"cached_{name}": whole[name] for name in ("q_rotated", "k_rotated")}
        return rotated | {"k_cache": k_cache, "v_cache": v_cache, "cached_attn": whole["attn"]}

    def head(self, h_BLD: np.ndarray, norm_BLD: np.ndarray | None = None) -> Arrays:
        """The final norm of `h_BLD`, and the logits (B', L, V) of it, or of `norm_BLD` where that is given."""
        weights = self.llm.weights
        output = weights.tok_embeddings if weights.output is None else weights.output
        fed = {} if norm_BLD is None else {"norm": self._put("hidden", norm_BLD)}
        h = self._put("hidden", h_BLD)
        out = _head(h, weights.norm, output, fed, config=self.llm.config, mesh=self.llm.mesh)
        return {"norm": fetch(out["norm"]), "logits": without_padding(fetch(out["logits"]), self.llm.config.vocab_size)}

    def _run_layer(
        self, layer: int, h_BLD: np.ndarray, fed: dict[str, jax.Array], weights: bool
    ) -> dict[str, jax.Array]:
        w, h = self.llm.weights.layers[layer], self._put("hidden", h_BLD)
        return _layer(w, h, fed, weights=weights, **self._static)

    def _put(self, layout: str, x: np.ndarray) -> jax.Array:
        if layout != "tokens":  # the reference may be of another type
            x = x.astype(self.llm.config.jnp_dtype, copy=False)
        return put(self.llm.mesh, layout, repeat_rows(x, self.llm))

    def _feed(self, name: str, x: np.ndarray) -> jax.Array:
        """A component of the reference in the form that it has on this mesh: heads repeated, widths padded."""
        axes, model = LAYER_AXES[name], self.llm.mesh.shape[MODEL]
        if "G" in axes:
            x = np.repeat(x, max(1, model // self.llm.config.n_kv_heads), axis=axes.index("G"))
        if "F" in axes:
            width = x.shape[-1]
            x = np.pad(x, [(0, 0), (0, 0), (0, padded(width, model) - width)])
        return self._put(_LAYER_LAYOUTS[name], x)


def repeat_rows(x: np.ndarray, llm: LLM) -> np.ndarray:
    """The array with its first row again until the rows divide over the mesh's `data`."""
    missing = -len(x) % llm.mesh.shape[DATA]
    return np.concatenate([x, *[x[:1]] * missing]) if missing else x


def fetch(x: jax.Array) -> np.ndarray:
    """A global array on the host, in every process."""
    if not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def without_padding(logits_V: np.ndarray, vocab_size: int) -> np.ndarray:
    """The logits (.., V) of true tokens. Raises ParityError when padding of the vocabulary could be sampled."""
    if (logits_V[..., vocab_size:] != -np.inf).any():
        raise ParityError(f"the logits of the padding of the vocabulary, from {vocab_size} on, are not all -inf.")
    return logits_V[..., :vocab_size]


class _Keep:
    """A probe that keeps every component and hands on those that are fed."""

    def __init__(self, fed: Mapping[str, jax.Array]):
        self.fed = fed
        self.seen: dict[str, jax.Array] = {}

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        self.seen[name] = x
        return self.fed.get(name, x)


@functools.partial(jax.jit, static_argnames="mesh")
def _embedding(tok_embeddings_VD: jax.Array, tokens_BL: jax.Array, *, mesh: Mesh) -> jax.Array:
    specs = (SPECS["tok_embeddings"], SPECS["tokens"])
    return jax.shard_map(embed, mesh=mesh, in_specs=specs, out_specs=SPECS["hidden"])(tok_embeddings_VD, tokens_BL)


@functools.partial(jax.jit, static_argnames=("weights", "config", "mesh", "backend"))
def _layer(
    w: LayerWeights,
    h_BLD: jax.Array,
    fed: dict[str, jax.Array],
    *,
    weights: bool,
    config: LlamaConfig,
    mesh: Mesh,
    backend: str,
) -> dict[str, jax.Array]:
    """A layer of a prompt that attends to itself, as prefill runs it."""

    def run(w: LayerWeights, h_BLD: jax.Array, fed: dict[str, jax.Array]) -> dict[str, jax.Array]:
        keep = _Keep(fed)
        positions_BL = jnp.broadcast_to(jnp.arange(h_BLD.shape[1]), h_BLD.shape[:2])
        rotary = rope_angles(config, positions_BL)
        transformer_layer(w, h_BLD, rotary, config=config, backend=backend, probe=keep)
        if weights:
            q, k = (keep.fed.get(name, keep.seen[name]) for name in ("q_rotated", "k_rotated"))
            probs_BGRLS = attention_weights(q, k, positions_BL).astype(q.dtype)
            keep("attn_weights", probs_BGRLS.reshape(q.shape[0], q.shape[2], *probs_BGRLS.shape[-2:]))
        return keep.seen

    in_specs = (LAYER_PSPECS, SPECS["hidden"], {name: SPECS[_LAYER_LAYOUTS[name]] for name in fed})
    out_specs = {n: SPECS[layout] for n, layout in _LAYER_LAYOUTS.items() if weights or n != "attn_weights"}
    sharded = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma(backend))
    return sharded(w, h_BLD, fed)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "backend"), donate_argnames="pages")
def _cached_layer(
    w: LayerWeights,
    h_BLD: jax.Array,
    fed: dict[str, jax.Array],
    pages: KVPages,
    tables_BW: jax.Array,
    start_B: jax.Array,
    *,
    config: LlamaConfig,
    mesh: Mesh,
    backend: str,
) -> tuple[dict[str, jax.Array], KVPages]:
    """Rotated q and k of tokens at `start_B` and after, their attention to the cache, and the cache with them."""

    def run(
        w: LayerWeights,
        h_BLD: jax.Array,
        fed: dict[str, jax.Array],
        pages: KVPages,
        tables_BW: jax.Array,
        start_B: jax.Array,
    ) -> tuple[dict[str, jax.Array], KVPages]:
        batch, length = h_BLD.shape[:2]
        n_single = batch if length == 1 else 0
        flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in fed.items()}
        keep = _Keep(flat)
        tokens_T = jnp.zeros(batch * length, jnp.int32)
        rows = StepRows(tokens_T, start_B, jnp.full_like(start_B, length), tables_BW)
        positions_T, places = row_places(rows, n_single, *pages.kv_NPGK.shape[:2])
        h_TD, rotary = h_BLD.reshape(-1, h_BLD.shape[-1]), rope_angles(config, positions_T)
        _, pages, _ = transformer_layer(
            w, h_TD, rotary, pages, places, config=config, backend=backend, n_single=n_single, probe=keep
        )
        seen = {name: keep.seen[name] for name in _CACHED_GIVEN}
        return {name: x.reshape(batch, length, *x.shape[1:]) for name, x in seen.items()}, pages

    fed_specs = {name: SPECS[_LAYER_LAYOUTS[name]] for name in fed}
    in_specs = (LAYER_PSPECS, SPECS["hidden"], fed_specs, SPECS["kv_pages"], SPECS["tokens"], SPECS["tokens"])
    out_specs = (dict.fromkeys(_CACHED_GIVEN, SPECS["heads"]), SPECS["kv_pages"])
    sharded = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma(backend))
    return sharded(w, h_BLD, fed, pages, tables_BW, start_B)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _head(
    h_BLD: jax.Array,
    norm_D: jax.Array,
    output_VD: jax.Array,
    fed: dict[str, jax.Array],
    *,
    config: LlamaConfig,
    mesh: Mesh,
) -> dict[str, jax.Array]:
    def run(
        h_BLD: jax.Array, norm_D: jax.Array, output_VD: jax.Array, fed: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        keep = _Keep(fed)
        logits = head(h_BLD, norm_D, output_VD, config, keep)
        return {"norm": keep.seen["norm"], "logits": logits}

    in_specs = (SPECS["hidden"], SPECS["norm"], SPECS["output"], {name: SPECS["hidden"] for name in fed})
    out_specs = {"norm": SPECS["hidden"], "logits": SPECS["logits"]}
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(h_BLD, norm_D, output_VD, fed)
