"""The Python API: an `LLM` made of a checkpoint, to `generate`, `chat`, `stream` or `forward`."""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from ..attention import choose_backend
from ..checkpoint import CheckpointSource
from ..config import LlamaConfig
from ..errors import EngineError, RequestError, ShardedLlamaError
from ..mesh import broadcast_from_main, default_mesh
from ..model import xfmr
from ..sampling import SamplingParams
from ..sharding import DATA, put
from ..tokenizer.chat import ChatTemplate, SpecialTokens, encode_chat, special_tokens
from ..weights import XfmrWeights, init_weights
from .compilation import (
    COMPILE_THREADS,
    COMPILING,
    OPENING,
    PAGES,
    PLANNING,
    WAITING,
    CompileCounter,
    Phases,
    no_garbage_collection,
    tell,
    use_compilation_cache,
)
from .deltas import TokenDelta
from .engine import Engine
from .loading import LoadedModel, Loading, check_dtype, encode_text, open_draft, open_model
from .memory import expected_in_use
from .options import EngineOptions, check_options
from .outputs import Answers, Prompt, RequestOutput, StreamEvent, from_plain, to_plain

_Mailbox = collections.deque[TokenDelta | EngineError]
Messages = Sequence[Mapping[str, Any]]  # a conversation: {"role": ..., "content": ...} each


@dataclasses.dataclass
class Timings:
    """Counts and seconds of a stream, filled in while it runs."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    compile_s: float = 0.0  # of steps that were needed for the first time
    first_token_s: float = 0.0  # time to first token, compilation excluded
    total_s: float = 0.0  # compilation excluded

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of the whole stream, prefill included."""
        return self.new_tokens / self.total_s if self.total_s else 0.0


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt that was checked, with how to sample for it."""

    prompt: Prompt | None  # None: a conversation
    token_ids: list[int]
    params: SamplingParams


class Stream:
    """Iterates over StreamEvents; `timings` is complete when the iteration is.

    In a run of several processes process 0 has the events; the others iterate too, over none.
    """

    def __init__(self, llm: "LLM", requests: list[Request]):
        """Raises RequestError for what cannot be streamed; nothing is run before the iteration."""
        self.prompt_token_ids = [r.token_ids for r in requests]
        self.timings = Timings(prompt_tokens=sum(len(r.token_ids) for r in requests))
        self._requests, self._answers = requests, llm._answers(requests, streamed=True)
        self._events = llm._run(requests, self._answers, self.timings, self)

    def outputs(self) -> list[RequestOutput]:
        """The answers as `generate` gives them, as far as they have come; in process 0 alone."""
        return _outputs(self._requests, self._answers)

    def close(self) -> None:
        """Aborts what is not finished. A stream that is not iterated to its end does so when nothing refers to it."""
        self._events.close()

    def __iter__(self) -> Iterator[StreamEvent]:
        return self._events


class LLM:
    """A model in its mesh, ready to answer.

    Its weights are read in the background, while `start` compiles; whatever needs them waits. The engine, with its
    cache, is made by `start`, or when the first answer is asked for; comparing, scoring and saving a model do without.
    `phases` are the seconds that this took.
    """

    def __init__(
        self,
        checkpoint: str | Path | CheckpointSource | LoadedModel,
        *,
        mesh: Mesh | None = None,
        dtype: str | None = None,
        attention: str | None = None,
        rope_factor: float | None = None,
        skip_tokenizer: bool = False,
        chat_template: ChatTemplate | None = None,
        draft_model: str | Path | CheckpointSource | LoadedModel | None = None,
        progress: bool = True,
        **options: Any,
    ):
        """Opens the model (see `open_model`) and begins to load it.

        `options` are those of `EngineOptions`, such as max_model_len=8192. `chat_template` replaces the checkpoint's.
        `draft_model` is a smaller one with the same tokenizer, which guesses num_speculative_tokens at a time; it is
        loaded on the same mesh, in `dtype` or its checkpoint's.

        Raises CheckpointError, ConfigError, MeshError or TokenizerError naming what is wrong. What can only be seen by
        reading the weights is raised by the first method that needs them, as CheckpointError. In a run of several
        processes they are read here.
        """
        self.phases = Phases()
        with self.phases.of(OPENING):
            self.options = EngineOptions.make(**options)
            model = checkpoint
            if not isinstance(checkpoint, LoadedModel):
                model = open_model(
                    checkpoint,
                    mesh=mesh,
                    dtype=dtype,
                    attention=attention,
                    rope_factor=rope_factor,
                    skip_tokenizer=skip_tokenizer,
                )
            draft = None if draft_model is None else open_draft(draft_model, model, dtype)
            check_options(self.options, model.config, draft and draft.config)
            check_dtype(model.config)
            self.config, self.mesh, self.tokenizer = model.config, model.mesh, model.tokenizer
            self.sampling_defaults = model.sampling_defaults or {"temperature": 0.0}
            self.chat_template = chat_template or model.chat_template
            self.backend = choose_backend(self.config, self.mesh.devices.flat[0], attention)
            self.progress = progress
            use_compilation_cache()
        self._draft_config = draft and draft.config
        models = [m for m in (model, draft) if m is not None]
        opened = [m.config for m in models if not isinstance(m, LoadedModel)]
        self._expected_bytes = expected_in_use(self.mesh, opened) if opened else None
        self._loading = Loading(models, progress)
        if jax.process_count() > 1:  # all processes do the same in the same order
            with self.phases.of(WAITING):
                self._loading.result()
        self._engine: Engine | None = None
        self._engine_waits = False  # for weights
        self._shut_down = False
        self._mailboxes: dict[str, _Mailbox] = {}  # of every run under way, by request
        self._n_requests = 0
        self._open_run: Stream | None = None

    @classmethod
    def random(cls, config: LlamaConfig, mesh: Mesh | None = None, *, weights_seed: int = 0, **kwargs: Any) -> "LLM":
        """A model with random weights, for experiments and measurements."""
        mesh = default_mesh(config) if mesh is None else mesh
        return cls(LoadedModel(config, mesh, init_weights(jax.random.key(weights_seed), config, mesh=mesh)), **kwargs)

    @functools.cached_property
    def _special(self) -> SpecialTokens:
        """The tokenizer's; finding them takes 0.1 s for Llama 3."""
        return special_tokens(self.tokenizer)

    def resized(self, **options: Any) -> "LLM":
        """The same model, sharing the weights, with an engine of its own of other options.

        A draft model stays, and guesses as many tokens as before where `options` do not say otherwise;
        draft_model=None leaves it out.
        """
        model = LoadedModel(
            self.config, self.mesh, self.weights, self.tokenizer, self.sampling_defaults, self.chat_template
        )
        same = {"attention": self.backend, "progress": self.progress, "draft_model": self.draft}
        if options.get("draft_model", self.draft) is not None:
            same["num_speculative_tokens"] = self.options.num_speculative_tokens
        return LLM(model, **same | options)

    @functools.cached_property
    def weights(self) -> XfmrWeights:
        """The model's, when they are there. Raises CheckpointError where they cannot be read."""
        return self._loading.result()[0].weights

    @property
    def draft(self) -> LoadedModel | None:
        """The model that guesses, if there is one, when its weights are there. Raises as `weights`."""
        return None if self._draft_config is None else self._loading.result()[1]

    @property
    def engine(self) -> Engine:
        """The engine, made now if it is not there yet, with the weights. Raises as `weights`."""
        engine = self._planned_engine
        if self._engine_waits:
            engine.load(self.weights, self.draft and self.draft.weights)
            self._engine_waits = False
        return engine

    @property
    def _planned_engine(self) -> Engine:
        """The engine, whose weights may be on their way: enough to check requests."""
        if self._engine is None:
            self._check_alive()
            self._engine = self._new_engine(ahead=False)
        return self._engine

    def _new_engine(self, ahead: bool) -> Engine:
        """An engine that knows how much it has room for; with weights if they are there."""
        waits = self._engine_waits = not self._loading.is_done
        return Engine(
            self.config,
            self.mesh,
            None if waits else self.weights,
            self.options,
            attention=self.backend,
            tokenizer=self.tokenizer,
            draft=self._draft_config and (self._draft_config, None if waits else self.draft.weights),
            expected_bytes=self._expected_bytes if waits else None,
            ahead=ahead,
        )

    def start(self) -> None:
        """Makes the engine and compiles every step that can be needed, so that nothing is compiled while it answers.

        Without it a step is compiled when it is first needed: sooner done for a single answer. `phases` say where the
        time went. Raises ConfigError, saying what would fit, when the memory is too small, and CheckpointError for
        weights that cannot be read; nothing goes on in the background then.
        """
        try:
            with CompileCounter(COMPILE_THREADS) as counter, no_garbage_collection():
                if self._engine is None:
                    self._check_alive()
                    with self.phases.of(PLANNING):
                        self._engine = self._new_engine(ahead=True)
                with self.phases.of(COMPILING):
                    self._engine.compile(self.progress, self._loading.check)
            with self.phases.of(WAITING):
                self._loading.result()
            with self.phases.of(PAGES):
                jax.block_until_ready(self.engine.runner.state)
        except BaseException:
            self._loading.stop()
            raise
        self.phases.weights_s = self._loading.seconds
        self.phases.n_compiled += counter.count
        self.phases.n_cached += counter.cached
        tell("%s", self.phases.line())

    def shutdown(self) -> None:
        """Frees the cache, and ends the reading of weights. Weights that are there stay; what asks for an answer after
        that raises EngineError."""
        self._shut_down, self._engine_waits = True, False
        self._loading.stop()
        if self._engine is not None:
            self._engine.shutdown()

    def _check_alive(self) -> None:
        if self._shut_down:
            raise EngineError("the model was shut down; make a new LLM.")

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **overrides: Any,
    ) -> list[RequestOutput]:
        """Answers every prompt; the results are in the order of the prompts.

        Args:
          prompts: texts (BOS is added as the tokenizer does by default, exactly once) or lists of token ids
            (used as they are). An empty text starts from BOS alone.
          sampling_params: how to sample, for all prompts or one each. Default: the checkpoint's generation_config,
            else greedy, changed by `overrides`, such as max_tokens=64 or temperature=0.7.

        Raises RequestError for prompts or parameters that cannot be served, and nothing is run then; EngineError when
        the device fails. An answer that alone cannot go on, as where its logits are not numbers, ends with the
        finish_reason "error" and says why in `error`; the others go on.
        """
        prompts = _as_list(prompts)
        return self._answer(self._requests(prompts, [self.encode(p) for p in prompts], sampling_params, overrides))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **overrides: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation or several: the assistant's next message, as the chat template has it.

        A conversation is a list of messages such as {"role": "user", "content": "Hello"}. Text in a message never
        becomes a special token. Raises RequestError for messages that cannot be rendered.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        ids = [self.encode_chat(m) for m in conversations]
        return self._answer(self._requests([None] * len(ids), ids, sampling_params, overrides))

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **overrides: Any,
    ) -> Stream:
        """The streaming form of `generate`: an iterable of StreamEvents, as the tokens come."""
        prompts = _as_list(prompts)
        ids = [self.encode(p) for p in prompts]
        return Stream(self, self._requests(prompts, ids, sampling_params, overrides))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as `generate` uses them. Raises RequestError when the model cannot take it."""
        if not isinstance(prompt, str):
            return self._planned_engine.check_prompt(prompt)
        if self.tokenizer is None:
            raise RequestError("the model was loaded without a tokenizer; give the prompt as token ids.")
        return self._planned_engine.check_prompt(encode_text(self.tokenizer, self.config, prompt))

    def encode_chat(self, messages: Messages, **kwargs: Any) -> list[int]:
        """Token ids of a conversation up to where the assistant answers; see `tokenizer.encode_chat`."""
        if self.tokenizer is None:
            raise RequestError("the model was loaded without a tokenizer; a conversation needs one.")
        if self.chat_template is None:
            raise RequestError("the checkpoint has no chat template; give one, or use generate.")
        return self._planned_engine.check_prompt(
            encode_chat(self.tokenizer, self.chat_template, messages, special=self._special, **kwargs)
        )

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
        logits = _forward(
            self.weights, put(self.mesh, "tokens", padded), config=self.config, mesh=self.mesh, backend=self.backend
        )
        return logits[:batch, :, : self.config.vocab_size]

    def _requests(
        self,
        prompts: Sequence[Prompt | None],
        token_ids: list[list[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        overrides: dict[str, Any],
    ) -> list[Request]:
        if not token_ids:
            raise RequestError("there is no prompt; give at least one.")
        if sampling is not None and overrides:
            raise RequestError(f"give sampling_params or {', '.join(overrides)}, not both.")
        if sampling is None:
            sampling = SamplingParams.make(self.sampling_defaults, **overrides)
        params = [sampling] * len(token_ids) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(params) != len(token_ids):
            raise RequestError(
                f"{len(params)} sampling parameters for {len(token_ids)} prompts: give one, or one each."
            )
        if jax.process_count() == 1:  # else process 0 does it when it adds them, and tells the others
            for of_request in params:
                self._planned_engine.compile_grammar(of_request)
        return [Request(*request) for request in zip(prompts, token_ids, params, strict=True)]

    def _answers(self, requests: list[Request], streamed: bool) -> list[Answers]:
        """Where the answers to each request are collected. Raises RequestError for what cannot be collected."""
        return [
            Answers(r.token_ids, r.params, self.tokenizer, self.config.eos_ids, streamed=streamed, request=number)
            for number, r in enumerate(requests)
        ]

    def _answer(self, requests: list[Request]) -> list[RequestOutput]:
        """Runs requests to their end. Every process returns the same answers."""
        answers = self._answers(requests, streamed=False)
        timings = Timings()
        bar = tqdm(total=len(requests), desc="answering", unit="prompt", disable=None if self.progress else True)
        with bar:
            for event in self._run(requests, answers, timings):
                if event.error:
                    logging.warning("prompt %d, answer %d: %s", event.request, event.index, event.error)
                if event.finish_reason is not None and not answers[event.request].n_unfinished:
                    bar.set_postfix_str(f"{timings.tokens_per_s:.1f} tokens/s", refresh=False)
                    bar.update()
        if jax.process_count() == 1:
            return _outputs(requests, answers)
        plain = broadcast_from_main(lambda: [to_plain(output) for output in _outputs(requests, answers)])
        return [
            from_plain(p, str(number), r.prompt, r.token_ids)
            for number, (p, r) in enumerate(zip(plain, requests, strict=True))
        ]

    def _run(
        self, requests: list[Request], answers: list[Answers], timings: Timings, stream: Stream | None = None
    ) -> Iterator[StreamEvent]:
        """Yields what the answers get, until all have ended. Several such runs may be under way in turns."""
        engine = self.engine
        several = jax.process_count() > 1
        open_run, self._open_run = self._open_run, stream
        if several and open_run is not None:
            open_run.close()  # the other processes take part in one run at a time
        if jax.process_index() != 0:
            engine.follow()
            broadcast_from_main(lambda: None)  # raises what ended the run in process 0
            return
        failure: ShardedLlamaError | None = None
        start, compiled = time.perf_counter(), engine.compile_s
        first = self._n_requests
        self._n_requests += len(requests)
        numbers = {str(first + i): i for i in range(len(requests))}
        unfinished = sum(r.params.n_sequences for r in requests)
        mailbox: _Mailbox = collections.deque()
        try:
            for request_id, i in numbers.items():
                self._mailboxes[request_id] = mailbox
                engine.add_request(request_id, requests[i].token_ids, answers[i].engine_params)
            while unfinished:
                if not mailbox:
                    self._step()
                timings.compile_s = engine.compile_s - compiled
                timings.total_s = time.perf_counter() - start - timings.compile_s
                while mailbox:
                    delta = mailbox.popleft()
                    if isinstance(delta, EngineError):
                        raise delta
                    event = answers[numbers[delta.request_id]].add(delta)
                    if event is None:  # it came after a stop string
                        continue
                    if event.finish_reason is not None:
                        unfinished -= 1
                        if delta.finish_reason is None:
                            engine.end(delta.request_id, delta.index)
                    timings.first_token_s = timings.first_token_s or timings.total_s
                    timings.new_tokens += len(event.token_ids)
                    yield event
        except ShardedLlamaError as error:
            failure = error
            raise
        finally:
            for request_id in numbers:
                engine.abort(request_id)
                self._mailboxes.pop(request_id, None)
            if several:
                engine.release()
                _tell_others(failure)

    def _step(self) -> None:
        """Steps the engine, and hands out what that brought. Errors of a dead engine are raised where they arrive."""
        deltas = self.engine.step()
        is_dead = self.engine.is_dead
        for delta in deltas:
            if delta.request_id in self._mailboxes:
                failed = delta.error and is_dead
                self._mailboxes[delta.request_id].append(EngineError(delta.error) if failed else delta)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "backend"))
def _forward(weights: Any, tokens_BL: jax.Array, *, config: LlamaConfig, mesh: Mesh, backend: str) -> jax.Array:
    return xfmr(weights, config, tokens_BL, mesh=mesh, backend=backend)


def _tell_others(failure: Exception | None) -> None:
    """In process 0: ends a run in the others, with the error that ended it here."""

    def outcome() -> None:
        if failure is not None:
            raise failure

    with contextlib.suppress(ShardedLlamaError):  # it is on its way to the caller here
        broadcast_from_main(outcome)


def _outputs(requests: list[Request], answers: list[Answers]) -> list[RequestOutput]:
    return [
        RequestOutput(str(number), r.prompt, tuple(r.token_ids), of_request.outputs(), of_request.prompt_logprobs)
        for number, (r, of_request) in enumerate(zip(requests, answers, strict=True))
    ]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One text or one list of token ids counts as one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)
    one = bool(prompts) and isinstance(prompts[0], (int, np.integer))
    return [prompts] if one else prompts
