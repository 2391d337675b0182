"""Whole prompts through the compiled model, in one piece and through the cache, and greedy continuations."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from ..config import LlamaConfig
from ..engine.llm import LLM
from ..kv_cache import KVCache
from ..model import xfmr
from ..sharding import MODEL
from ..weights import XfmrWeights
from .capture import fetch, repeat_rows, without_padding
from .components import Reference, Stage
from .contract import ATOL, CONTRACT, EXACT, FLOAT32_LOGITS, FLOAT64, HALF, NO_BOUND, RTOL, judge
from .measure import kl_divergence, measure, top_k_agreement
from .pieces import Piece, pieces_of
from .results import CUMULATIVE, GreedyRow, LogitsRow


def compare_logits(
    llm: LLM, head: Stage, tokens_BL: np.ndarray, chunk: int, expect: str = CONTRACT
) -> tuple[LogitsRow, ...]:
    """The logits of every position, computed in one piece, in chunks, token by token through the cache, and
    the second half token by token after the first in one piece.

    `head` is the reference's last stage. `chunk` is in tokens. The reference's logits come from another program than
    these, even if it is this engine: EXACT expects no more of them than CONTRACT.
    """
    expect = CONTRACT if expect == EXACT else expect
    length, dtype = tokens_BL.shape[1], llm.config.dtype
    theirs, exact = (None if x is None else repeat_rows(x, llm) for x in (head.values["logits"], head.exact_logits))
    tokens_BL = repeat_rows(tokens_BL, llm)
    batch, half = len(tokens_BL), length // 2
    ways = {
        "one piece": (length, []),
        f"chunks of {chunk}": (0, pieces_of(batch, length, chunk, n_single=0)),
        "token by token": (0, pieces_of(batch, length, 1, n_single=length)),
        "prefill + decode": (half, pieces_of(batch, length, 1, n_single=length, start=half)),  # as it is served
    }
    rows = []
    for way, (prefill, pieces) in ways.items():
        ours = logits_through_cache(llm, tokens_BL, prefill, pieces, cache_length=length + chunk)
        judged, bound = judge(
            CUMULATIVE,
            "logits",
            ours,
            theirs,
            exact=exact,
            noise=head.noise.get("logits"),
            dtype=dtype,
            shards=llm.mesh.shape[MODEL],
            expect=expect,
        )
        close = dtype != "float32" or expect != CONTRACT or np.allclose(ours, theirs, rtol=RTOL, atol=ATOL)
        kl = kl_divergence(ours, theirs)
        top1, top5 = (top_k_agreement(ours, theirs, k) for k in (1, 5))
        difference = measure(ours, theirs)
        rows.append(
            LogitsRow(way, difference, judged, bound, bool(close), float(kl.mean()), float(kl.max()), top1, top5)
        )
    return tuple(rows)


def logits_through_cache(
    llm: LLM, tokens_BL: np.ndarray, prefill: int, pieces: Sequence[Piece], *, cache_length: int
) -> np.ndarray:
    """Logits (B, L, V) of every position; B divides over the mesh.

    The first `prefill` tokens run in one piece, as prompts do: they attend to themselves and only write the cache. The
    pieces that follow attend to the cache, which must have room for the padding of the last chunk.
    """
    (batch, length), config = tokens_BL.shape, llm.config
    step = functools.partial(_step, config=config, mesh=llm.mesh, backend=llm.steps.backend)
    caches = KVCache.new(config, llm.mesh, batch, cache_length)
    logits = np.zeros((batch, length, config.vocab_size), np.promote_types(config.jnp_dtype, np.float32))

    def run(tokens: np.ndarray, starts_B: np.ndarray | None, caches: tuple[KVCache, ...]) -> tuple:
        positions = None if starts_B is None else llm.steps.put("tokens", starts_B)
        out, caches = step(llm.weights, llm.steps.put("tokens", tokens.astype(np.int32)), positions, caches)
        return without_padding(fetch(out), config.vocab_size), caches

    if prefill:
        logits[:, :prefill], caches = run(tokens_BL[:, :prefill], None, caches)
    for piece in pieces:
        out, caches = run(piece.take(tokens_BL), piece.starts_B, caches)
        piece.put(out, logits)
    return logits


@functools.partial(jax.jit, static_argnames=("config", "mesh", "backend"), donate_argnames="caches")
def _step(
    weights: XfmrWeights,
    tokens_BL: jax.Array,
    cur_pos_B: jax.Array | None,
    caches: tuple[KVCache, ...],
    *,
    config: LlamaConfig,
    mesh: Mesh,
    backend: str,
) -> tuple[jax.Array, tuple[KVCache, ...]]:
    return xfmr(weights, config, tokens_BL, cur_pos_B, caches, mesh=mesh, backend=backend)


def compare_greedy(
    llm: LLM,
    reference: Reference,
    head: Stage,
    tokens_BL: np.ndarray,
    new_tokens: int,
    expect: str = CONTRACT,
) -> tuple[GreedyRow, ...]:
    """The greedy continuation of every row against the reference's: where they part, and how near a tie that was."""
    theirs = reference.greedy(tokens_BL, new_tokens)
    ours_BN = greedy_tokens(llm, tokens_BL, new_tokens)
    noise = _greedy_noise(llm.config.dtype, head, expect)
    rows = []
    for row, (mine, other, margins) in enumerate(zip(ours_BN, theirs.tokens_BN, theirs.margins_BN, strict=True)):
        differences = np.flatnonzero(mine != other)
        if not differences.size:
            rows.append(GreedyRow(row, new_tokens, None, None, None, None, noise))
            continue
        step = int(differences[0])
        own_V = last_logits(llm, np.concatenate([tokens_BL[row], other[:step]]))
        own_margin = float(own_V[mine[step]]) - float(own_V[other[step]])
        at = step, int(mine[step]), int(other[step]), float(margins[step])
        rows.append(GreedyRow(row, new_tokens, *at, noise, own_margin))
    return tuple(rows)


def last_logits(llm: LLM, tokens_L: np.ndarray) -> np.ndarray:
    """The engine's logits (V,) after one sequence of tokens."""
    tokens_BL = repeat_rows(tokens_L[None], llm)
    return logits_through_cache(llm, tokens_BL, tokens_BL.shape[1], [], cache_length=tokens_BL.shape[1])[0, -1]


def greedy_tokens(llm: LLM, tokens_BL: np.ndarray, new_tokens: int) -> np.ndarray:
    """The engine's own greedy continuation (B, N), as it serves it."""
    prompts = [row.tolist() for row in tokens_BL]
    answers = llm.generate(prompts, max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    return np.array([answer.token_ids for answer in answers], np.int32)


def _greedy_noise(dtype: str, head: Stage, expect: str) -> float | None:
    """The margin between two tokens below which the contract leaves their order open; None: nothing is expected.

    Both logits may be off: by what the contract allows in float64 and float32, in half precision by HALF times the
    largest error of the reference's own logits.
    """
    if expect == NO_BOUND:
        return None
    if expect == EXACT:
        return 0.0
    logits = head.values["logits"]
    own = 0.0 if head.exact_logits is None else float(np.abs(logits - head.exact_logits).max())
    largest = float(np.abs(logits).max())
    if dtype in ("float64", "float32"):
        return 2 * max(HALF * own, {"float64": FLOAT64, "float32": FLOAT32_LOGITS}[dtype] * largest)
    return None if head.exact_logits is None else 2 * HALF * own
