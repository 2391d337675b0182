"""Whole prompts through the compiled model, in one piece and through the cache, and greedy continuations."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from ..config import LlamaConfig
from ..engine.llm import LLM
from ..kv_cache import PAGE_SIZE, KVPages
from ..model import StepRows, xfmr_step
from ..sharding import DATA, MODEL
from ..weights import XfmrWeights
from .capture import fetch, repeat_rows, without_padding
from .components import Reference, Stage
from .contract import ATOL, CONTRACT, EXACT, FLOAT32_LOGITS, FLOAT64, HALF, NO_BOUND, RTOL, judge
from .measure import kl_divergence, measure, top_k_agreement
from .paged_rows import PagedRows
from .pieces import Piece, pieces_of, whole_prompts
from .results import CUMULATIVE, GreedyRow, LogitsRow


def compare_logits(
    llm: LLM, head: Stage, tokens_BL: np.ndarray, chunk: int, expect: str = CONTRACT
) -> tuple[LogitsRow, ...]:
    """The logits of every position: computed in one piece without the cache; through the cache in chunks, token by
    token, and the second half token by token after the first in one piece, as it is served.

    `head` is the reference's last stage. `chunk` is in tokens. The reference's logits come from another program than
    these, even if it is this engine: EXACT expects no more of them than CONTRACT.
    """
    expect = CONTRACT if expect == EXACT else expect
    length, dtype = tokens_BL.shape[1], llm.config.dtype
    theirs, exact = (None if x is None else repeat_rows(x, llm) for x in (head.values["logits"], head.exact_logits))
    tokens_BL = repeat_rows(tokens_BL, llm)
    batch, half = len(tokens_BL), length // 2
    singles = pieces_of(batch, length, 1, n_single=length, start=half)
    ways = {
        "one piece": [],
        f"chunks of {chunk}": pieces_of(batch, length, chunk, n_single=0),
        "token by token": pieces_of(batch, length, 1, n_single=length),
        "prefill + decode": [*whole_prompts(batch, half), *singles],
    }
    rows = []
    for way, pieces in ways.items():
        if pieces:
            ours = logits_through_cache(llm, tokens_BL, pieces, length=length + chunk)
        else:  # without the cache, as sequences are scored
            ours = fetch(llm.forward(tokens_BL))
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


def logits_through_cache(llm: LLM, tokens_BL: np.ndarray, pieces: Sequence[Piece], *, length: int) -> np.ndarray:
    """Logits (B, L, V) of every position; B divides over the mesh.

    Every piece attends to the cache, which has room for `length` tokens of each sequence, padding of the last piece
    included. Longer pieces run in rows of a few tokens, as prompts do when they are served.
    """
    config, mesh = llm.config, llm.mesh
    paged = PagedRows.new(mesh, len(tokens_BL), length)
    pages = KVPages.new(config, mesh, paged.n_pages)
    logits = np.zeros((*tokens_BL.shape, config.vocab_size), np.promote_types(config.jnp_dtype, np.float32))
    for piece in pieces:
        tokens = piece.take(tokens_BL)
        rows, n_single, width = paged.step(tokens, piece.starts_B, mesh)
        out, pages = _step(llm.weights, rows, pages, config=config, mesh=mesh, backend=llm.backend, n_single=n_single)
        of_rows = without_padding(fetch(out), config.vocab_size).reshape(len(tokens), width, -1)
        piece.put(of_rows[:, : tokens.shape[1]], logits)
    return logits


@functools.partial(jax.jit, static_argnames=("config", "mesh", "backend", "n_single"), donate_argnames="pages")
def _step(
    weights: XfmrWeights,
    rows: StepRows,
    pages: tuple[KVPages, ...],
    *,
    config: LlamaConfig,
    mesh: Mesh,
    backend: str,
    n_single: int,
) -> tuple[jax.Array, tuple[KVPages, ...]]:
    return xfmr_step(weights, config, rows, pages, mesh=mesh, n_single=n_single, backend=backend, all_logits=True)


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
    batch, length = tokens_BL.shape
    return logits_through_cache(llm, tokens_BL, whole_prompts(batch, length), length=length)[0, -1]


def greedy_tokens(llm: LLM, tokens_BL: np.ndarray, new_tokens: int) -> np.ndarray:
    """The engine's own greedy continuation (B, N), as it serves it."""
    (batch, length), data = tokens_BL.shape, llm.mesh.shape[DATA]
    # An engine of its own, just large enough: there may be a second model in the same memory.
    served = llm.resized(
        max_model_len=length + new_tokens,
        max_num_seqs=batch,
        decode_steps=1,  # as most devices serve; and one step to compile, not two
        num_pages=-(-batch // data) * -(-(length + new_tokens) // PAGE_SIZE),
    )
    try:
        answers = served.generate(tokens_BL.tolist(), max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    finally:
        served.shutdown()
    return np.array([answer.outputs[0].token_ids for answer in answers], np.int32)


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
