"""The Python API: `load` a checkpoint into a mesh, then `generate`, `stream` or `forward`."""

import dataclasses
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ..attention import choose_backend
from ..checkpoint import CheckpointSource, hub, load_weights, open_checkpoint
from ..config import LlamaConfig
from ..errors import ConfigError, RequestError, TokenizerError
from ..hf_config import read_generation_config
from ..mesh import check_mesh, default_mesh
from ..model import xfmr
from ..sampling import SamplingParams
from ..sharding import DATA
from ..tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from ..weights import XfmrWeights, init_weights
from .batch import NewToken, compile_batch, plan_batch, run_batch
from .steps import Steps

DEMO_CHECKPOINT = Path(__file__).parent.parent / "demo_checkpoint"
MAX_BATCH = 256  # requests that run together; more are run in several batches

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Generation:
    """The answer to one prompt."""

    prompt: Prompt
    text: str  # without the prompt; empty when the model has no tokenizer
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]  # an end-of-sequence token included
    finish_reason: str  # "stop": an end-of-sequence token; "length": max_tokens or the end of the context


@dataclasses.dataclass(frozen=True)
class StreamEvent:
    """What one step added to one request. Texts of a request join up to its `Generation.text`."""

    request: int  # index into the prompts
    text: str  # may be empty while a character is incomplete
    token_id: int
    finish_reason: str | None  # set on the request's last event


@dataclasses.dataclass
class Timings:
    """Counts and seconds of a stream, filled in while it runs."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    compile_s: float = 0.0
    first_token_s: float = 0.0  # time to first token, of the first batch, compilation excluded
    total_s: float = 0.0  # compilation excluded

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of the whole stream, prefill included and compilation excluded."""
        return self.new_tokens / self.total_s if self.total_s else 0.0


class Stream:
    """Iterates over StreamEvents; `timings` is complete when the iteration is."""

    def __init__(self, llm: "LLM", prompts: list[list[int]], params: list[SamplingParams]):
        self.prompt_token_ids = prompts
        self.timings = Timings(prompt_tokens=sum(map(len, prompts)))
        self._events = self._run(llm, prompts, params)

    def __iter__(self) -> Iterator[StreamEvent]:
        return self._events

    def _run(self, llm: "LLM", prompts: list[list[int]], params: list[SamplingParams]) -> Iterator[StreamEvent]:
        for first in range(0, len(prompts), MAX_BATCH):
            batch = slice(first, first + MAX_BATCH)
            decoders = [StreamDecoder(llm.tokenizer) if llm.tokenizer else None for _ in prompts[batch]]
            for new in llm._run_batch(prompts[batch], params[batch], self.timings):
                decoder = decoders[new.request]
                text = ""
                if decoder is not None:
                    text = decoder.push([new.token]) + (decoder.flush() if new.finish_reason else "")
                yield StreamEvent(first + new.request, text, new.token, new.finish_reason)


class LLM:
    """A model in its mesh, ready to generate. Made by `load`, or by `LLM.random` for experiments."""

    def __init__(
        self,
        config: LlamaConfig,
        mesh: Mesh,
        weights: XfmrWeights,
        tokenizer: Tokenizer | None = None,
        *,
        sampling_defaults: dict[str, Any] | None = None,
        attention: str | None = None,
    ):
        """`sampling_defaults` are SamplingParams fields used where a request says nothing; default: greedy."""
        _check_dtype(config)
        self.config = config
        self.mesh = mesh
        self.weights = weights
        self.tokenizer = tokenizer
        self.sampling_defaults = sampling_defaults or {"temperature": 0.0}
        self.steps = Steps(config, mesh, attention)
        self._forward = jax.jit(lambda w, tokens: xfmr(w, config, tokens, mesh=mesh, backend=self.steps.backend)[0])

    @classmethod
    def random(cls, config: LlamaConfig, mesh: Mesh | None = None, *, seed: int = 0, **kwargs: Any) -> "LLM":
        """A model with random weights, for experiments and measurements."""
        mesh = default_mesh(config) if mesh is None else mesh
        return cls(config, mesh, init_weights(jax.random.key(seed), config, mesh=mesh), **kwargs)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **overrides: Any,
    ) -> list[Generation]:
        """Answers every prompt, in order; they run as one batch (of up to MAX_BATCH).

        Args:
          prompts: texts (BOS is added as the tokenizer does by default, exactly once) or lists of token ids
            (used as they are). An empty text starts from BOS alone.
          sampling: how to sample, for all prompts or one each. Default: the checkpoint's generation_config,
            else greedy, changed by `overrides`, such as max_tokens=64 or temperature=0.7.

        Raises RequestError for prompts or parameters that cannot be served; nothing is run then.
        """
        prompts = _as_list(prompts)
        stream = self.stream(prompts, sampling, **overrides)
        texts: list[list[str]] = [[] for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        reasons = [""] * len(prompts)
        for event in stream:
            texts[event.request].append(event.text)
            tokens[event.request].append(event.token_id)
            reasons[event.request] = event.finish_reason or ""
        return [
            Generation(prompt, "".join(text), tuple(ids), tuple(new), reason)
            for prompt, text, ids, new, reason in zip(
                prompts, texts, stream.prompt_token_ids, tokens, reasons, strict=True
            )
        ]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **overrides: Any,
    ) -> Stream:
        """The streaming form of `generate`: an iterable of StreamEvents, as the tokens come."""
        prompts = _as_list(prompts)
        if not prompts:
            raise RequestError("there is no prompt; give at least one.")
        if sampling is not None and overrides:
            raise RequestError(f"give sampling or {', '.join(overrides)}, not both.")
        if sampling is None:
            sampling = SamplingParams.make(self.sampling_defaults, **overrides)
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(params) != len(prompts):
            raise RequestError(f"{len(params)} sampling parameters for {len(prompts)} prompts: give one, or one each.")
        return Stream(self, [self.encode(p) for p in prompts], _with_seeds(params))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as `generate` uses them. Raises RequestError when the model cannot take it."""
        if isinstance(prompt, str):
            ids = self._encode_text(prompt)
        else:
            ids = [int(i) for i in prompt]
            bad = [i for i in ids if not 0 <= i < self.config.vocab_size]
            if bad:
                raise RequestError(f"token id {bad[0]} is outside the vocabulary of {self.config.vocab_size} tokens.")
        if not ids:
            raise RequestError(f"the prompt {prompt!r} has no tokens; it needs at least one, such as BOS.")
        if len(ids) >= self.config.max_seq_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, but the model's context of {self.config.max_seq_len} must hold the "
                f"prompt and at least one new token: shorten it to {self.config.max_seq_len - 1} tokens or fewer."
            )
        return ids

    def _encode_text(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise RequestError("the model was loaded without a tokenizer; give the prompt as token ids.")
        return encode_text(self.tokenizer, self.config, text)

    def forward(self, tokens_BL: Any) -> jax.Array:
        """Logits (B, L, V) of a rectangular array of token ids, float32 (float64 for a float64 model).

        Compiled for each new shape of the batch.
        """
        tokens_BL = np.asarray(tokens_BL, np.int32)
        if tokens_BL.ndim != 2 or tokens_BL.size == 0:
            raise RequestError(f"forward takes a non-empty (batch, length) array, got shape {tokens_BL.shape}.")
        if tokens_BL.min() < 0 or tokens_BL.max() >= self.config.vocab_size:
            raise RequestError(f"token ids must lie in 0..{self.config.vocab_size - 1}.")
        batch, data = len(tokens_BL), self.mesh.shape[DATA]
        padded = np.pad(tokens_BL, [(0, -batch % data), (0, 0)])
        logits = self._forward(self.weights, self.steps.put("tokens", padded))
        return logits[:batch, :, : self.config.vocab_size]

    def _run_batch(
        self, prompts: list[list[int]], params: list[SamplingParams], timings: Timings
    ) -> Iterator[NewToken]:
        max_new = [min(s.max_tokens, self.config.max_seq_len - len(p)) for p, s in zip(prompts, params, strict=True)]
        plan = plan_batch([len(p) for p in prompts], max_new, self.mesh.shape[DATA])
        start = time.perf_counter()
        compile_batch(self.steps, plan, greedy=all(p.temperature == 0 for p in params))
        timings.compile_s += time.perf_counter() - start

        start, before = time.perf_counter(), timings.total_s
        for step in run_batch(self.steps, self.weights, plan, prompts, params, max_new):
            timings.total_s = before + time.perf_counter() - start
            timings.first_token_s = timings.first_token_s or timings.total_s
            timings.new_tokens += len(step)
            yield from step


def load(
    checkpoint: str | Path | CheckpointSource,
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    rope_factor: float | None = None,
    skip_tokenizer: bool = False,
    progress: bool = True,
) -> LLM:
    """Reads a checkpoint straight into its shards.

    Args:
      checkpoint: folder in any format that `open_checkpoint` knows, name of a repository of the Hugging Face hub such
        as "meta-llama/Llama-3.2-1B", "demo" for the small model that comes with the package, or what
        `open_checkpoint` gave.
      mesh: from `make_mesh`; default: all devices (`default_mesh`).
      dtype: of weights, activations and cache, such as "float32"; default: the checkpoint's.
      attention: backend; default: cuDNN where it can run the model, else plain JAX.
      rope_factor: of a Meta checkpoint with scaled rotary embeddings; default: see `meta_config.read_config`.
      skip_tokenizer: prompts will be token ids; the folder needs no tokenizer.
      progress: shows a progress bar on a terminal.

    Raises CheckpointError, ConfigError, MeshError or TokenizerError naming what is wrong.
    """
    start = time.perf_counter()
    source = checkpoint
    if not isinstance(checkpoint, str | Path) and rope_factor is not None:
        raise ConfigError("rope_factor belongs to opening the checkpoint: open_checkpoint(folder, rope_factor=...).")
    if isinstance(checkpoint, str | Path):
        source = open_checkpoint(checkpoint_folder(checkpoint), rope_factor=rope_factor)
    folder = Path(source.location)
    config = source.read_config()
    if dtype is not None:
        config = config.replace(dtype=dtype)
    mesh = default_mesh(config) if mesh is None else mesh
    check_mesh(config, mesh)
    _check_dtype(config)
    choose_backend(config, mesh.devices.flat[0], attention)  # a mistake shows before the weights are read
    tokenizer = None if skip_tokenizer else open_tokenizer(folder, config)
    defaults = read_generation_config(folder)
    if not defaults.pop("do_sample"):
        defaults = {"temperature": 0.0}
    logging.info("config and tokenizer: %.1f s", time.perf_counter() - start)
    start = time.perf_counter()
    weights = load_weights(source, config, mesh=mesh, progress=progress)
    logging.info("weights: %.1f s", time.perf_counter() - start)
    llm = LLM(config, mesh, weights, tokenizer, sampling_defaults=defaults, attention=attention)
    logging.info("mesh data:%d,model:%d, %s, attention: %s", *mesh.shape.values(), config.dtype, llm.steps.backend)
    return llm


def open_tokenizer(folder: Path, config: LlamaConfig) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises TokenizerError when there is none, or it is of another model."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary only "
            f"{config.vocab_size}: they do not belong together."
        )
    return tokenizer


def encode_text(tokenizer: Tokenizer, config: LlamaConfig, text: str) -> list[int]:
    """Token ids of a text: BOS as the tokenizer adds it; of an empty one BOS alone. Raises RequestError without BOS."""
    if text:
        return tokenizer.encode(text, bos=tokenizer.adds_bos)
    bos_id = config.bos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if bos_id is None:
        raise RequestError("the prompt is empty and the model has no BOS token to start from; give a prompt.")
    return [bos_id]


def _check_dtype(config: LlamaConfig) -> None:
    if config.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ConfigError("float64 needs jax.config.update('jax_enable_x64', True) before the model is loaded.")


def checkpoint_folder(name: str | Path) -> Path:
    """The folder of a checkpoint: "demo" is the small model that comes with the package; a hub name is downloaded."""
    return DEMO_CHECKPOINT if str(name) == "demo" else hub.resolve(_expanded(name))


def _expanded(name: str | Path) -> str | Path:
    """A name with ~ replaced by the home folder, which shells do not do after --checkpoint=."""
    return os.path.expanduser(name) if isinstance(name, str) else name.expanduser()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One text or one list of token ids counts as one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)
    one = bool(prompts) and isinstance(prompts[0], (int, np.integer))
    return [prompts] if one else prompts


def _with_seeds(params: list[SamplingParams]) -> list[SamplingParams]:
    """Gives every request without a seed a fresh one, the same in every process."""
    seeds = np.array([secrets.randbits(32) for _ in params], np.uint32)
    if jax.process_count() > 1:
        seeds = multihost_utils.broadcast_one_to_all(seeds)
    return [
        p if p.seed is not None else dataclasses.replace(p, seed=int(s)) for p, s in zip(params, seeds, strict=True)
    ]
