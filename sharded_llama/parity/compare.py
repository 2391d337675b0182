"""The comparison itself: the engine and a reference in step, stage by stage, then whole prompts and continuations."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ..config import LlamaConfig
from ..engine.llm import LLM
from ..errors import ParityError
from ..sharding import MODEL
from .capture import Arrays, Capture, repeat_rows
from .components import EMBEDDING, HEAD, Reference, Stage, component_shapes, layer_stage, stage_axes
from .contract import CONTRACT, NO_BOUND, WHOLE_LAYER, judge
from .decoding import compare_greedy, compare_logits
from .measure import measure
from .results import CUMULATIVE, ISOLATED, MODES, GreedyRow, LogitsRow, Report, Row
from .tokens import check_tokens

# What the isolated mode adds to a layer's components, and the reference's component that each is compared with.
ADDED = {
    WHOLE_LAYER: "ffn_residual",
    "cached_q_rotated": "q_rotated",
    "cached_k_rotated": "k_rotated",
    "k_cache": "k_rotated",
    "v_cache": "v",
    "cached_attn": "attn",
}
DEFAULT_CHUNK, DEFAULT_NEW_TOKENS = 8, 16


def compare(
    llm: LLM,
    reference: Reference,
    tokens_BL: np.ndarray,
    *,
    modes: Sequence[str] = MODES,
    chunk: int = DEFAULT_CHUNK,
    new_tokens: int = DEFAULT_NEW_TOKENS,
    expect: str = CONTRACT,
    components_only: bool = False,
    settings: dict[str, Any] | None = None,
) -> Report:
    """Compares every component of `llm` with `reference` on the same tokens.

    Args:
      tokens_BL: token ids (B, L); every position is compared.
      modes: ISOLATED: each component is fed the reference's own inputs. CUMULATIVE: the engine's own.
      chunk: tokens of a chunk where the prompt goes through the cache in chunks.
      new_tokens: of the greedy continuation; 0 leaves it out.
      expect: CONTRACT, EXACT or NO_BOUND of `parity.contract`; with NO_BOUND the reference may be of another type.
      components_only: leaves out whole prompts through the cache and the continuation.
      settings: what the report says of itself.

    Host memory holds the reference's and our values of one stage at a time, and the logits. Raises ParityError when
    tokens, types or the reference's stages do not fit the model.
    """
    check_tokens(llm.config, tokens_BL, 0 if components_only else new_tokens)
    if reference.dtype != llm.config.dtype and expect != NO_BOUND:
        raise ParityError(f"the reference is {reference.dtype}, the model {llm.config.dtype}: compare equal types.")
    if not modes or not set(modes) <= set(MODES):
        raise ParityError(f"modes={list(modes)!r} must be some of {', '.join(MODES)}.")
    if chunk < 1:
        raise ParityError(f"chunk={chunk} must be at least 1.")
    chunk = min(chunk, tokens_BL.shape[1])
    rows: list[Row] = []
    run = _Run(llm, chunk, expect)
    names = [EMBEDDING, *map(layer_stage, range(llm.config.n_layers)), HEAD]
    stages = reference.stages(tokens_BL)
    with tqdm(total=len(names), desc="comparing", unit="stage", leave=False, disable=None) as bar:
        for name in names:
            stage = None  # the last one is not to be held while the next one is computed
            stage = next(stages, None)
            _check_stage(stage, name, llm.config, tokens_BL.shape)
            rows += run.rows(stage, tokens_BL, modes)
            bar.update()
    if next(stages, None) is not None:
        raise ParityError(f"the reference goes on after {HEAD}: it is of another model.")
    head = stage
    logits: tuple[LogitsRow, ...] = ()
    greedy: tuple[GreedyRow, ...] = ()
    if not components_only:
        logits = compare_logits(llm, head, tokens_BL, chunk, expect)
        greedy = compare_greedy(llm, reference, head, tokens_BL, new_tokens, expect) if new_tokens else ()
    return Report(settings or {}, tuple(rows), logits, greedy)


def _check_stage(stage: Stage | None, name: str, config: LlamaConfig, tokens_shape: tuple[int, int]) -> None:
    """Raises ParityError unless the reference gives stage `name` of a model of these sizes, completely."""
    if stage is None or stage.name != name:
        given = "ends" if stage is None else f"gives {stage.name}"
        raise ParityError(f"the reference {given} where {name} should come.")
    for component, shape in component_shapes(name, config, tokens_shape).items():
        if component not in stage.values and component != "attn_weights":
            raise ParityError(f"the reference does not give {component} of {name}.")
        if component in stage.values and stage.values[component].shape != shape:
            given = stage.values[component].shape
            raise ParityError(f"the reference gives {component} of {name} in shape {given}; this model's is {shape}.")


class _Run:
    """The state of a comparison between stages: the reference's hidden state and our own."""

    def __init__(self, llm: LLM, chunk: int, expect: str):
        self.capture = Capture(llm)
        self.rules = {"dtype": llm.config.dtype, "shards": llm.mesh.shape[MODEL], "expect": expect}
        self.chunk = chunk
        self.layer = 0
        self.theirs: np.ndarray | None = None  # (B, L, D)
        self.own: np.ndarray | None = None

    def rows(self, stage: Stage, tokens_BL: np.ndarray, modes: Sequence[str]) -> Iterator[Row]:
        """The rows of the next stage."""
        for mode in MODES:
            if mode in modes:
                for name, ours in self._compute(mode, stage, tokens_BL).items():
                    yield self._row(mode, stage, name, ours)
        if stage.name == EMBEDDING:
            self.theirs = stage.values[EMBEDDING]
        elif stage.name != HEAD:
            self.theirs = stage.values["ffn_residual"]
            self.layer += 1

    def _compute(self, mode: str, stage: Stage, tokens_BL: np.ndarray) -> Arrays:
        """Our components of a stage, in the order of computation."""
        if stage.name == EMBEDDING:
            embedding = self.capture.embedding(tokens_BL)
            self.own = embedding[: len(tokens_BL)]
            return {EMBEDDING: embedding}
        if stage.name == HEAD:
            isolated = mode == ISOLATED
            return self.capture.head(self.theirs if isolated else self.own, stage.values["norm"] if isolated else None)
        weights = "attn_weights" in stage.values
        if mode == CUMULATIVE:
            ours = self.capture.layer(self.layer, self.own, weights=weights)
            self.own = ours["ffn_residual"][: len(tokens_BL)]
            return ours
        ours = self.capture.layer(self.layer, self.theirs, stage.values, weights=weights)
        ours[WHOLE_LAYER] = self.capture.layer_output(self.layer, self.theirs, weights=weights)
        return ours | self.capture.cached_layer(self.layer, self.theirs, stage.values, self.chunk)

    def _row(self, mode: str, stage: Stage, name: str, ours: np.ndarray) -> Row:
        of = ADDED.get(name, name)
        axes = stage_axes(stage.name)[of]
        theirs, noise, exact = stage.values[of], None, None
        if mode == CUMULATIVE:
            noise = stage.noise.get(of)
            exact = stage.exact_logits if name == "logits" else None
        elif name != WHOLE_LAYER:
            exact = stage.exact.get(of)
        # Every replica is compared, on rows that repeat the first one, and every repeated kv head.
        theirs, exact = (None if x is None else repeat_rows(x, self.capture.llm) for x in (theirs, exact))
        copies = ours.shape[2] // theirs.shape[2] if "G" in axes else 1
        if copies > 1:
            theirs, exact = (None if x is None else np.repeat(x, copies, axis=2) for x in (theirs, exact))
        judged, bound = judge(mode, name, ours, theirs, exact=exact, noise=noise, **self.rules)
        difference = measure(ours, theirs, copies, len(stage.values[of]))
        return Row(mode, stage.name, name, axes, difference, noise, judged, bound)
