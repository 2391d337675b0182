"""The engine: requests of token ids in, tokens out as they come, with the mesh kept full.

Each `step` plans and queues one dispatch and then reads the one before, so that the device works on while the host
plans. In a run of several processes the engine of process 0 decides, and those of the others `follow`.
"""

import collections
import dataclasses
import operator
import secrets
import time
from collections.abc import Callable, Sequence as Seq
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from ..attention import choose_backend, run_length
from ..config import LlamaConfig
from ..constraints import Grammar, GrammarCompiler, row_mask
from ..errors import EngineError, RequestError
from ..kv_cache import PAGE_SIZE
from ..sampling import Sampled, SamplingParams
from ..sharding import DATA, MODEL
from ..tokenizer import Tokenizer
from ..weights import XfmrWeights
from .compilation import use_compilation_cache
from .deltas import (
    Flight,
    TokenDelta,
    TokenLogprob,
    by_sequence,
    count_right,
    logprobs_of,
    metrics_of,
    speculation_of,
    take_prompt_logprobs,
)
from .drafting import Drafter, LookupDrafter, ModelDrafter, may_speculate
from .lockstep import Lockstep
from .memory import plan_pages
from .options import EngineOptions, check_options, modes_of, pages_per_sequence, sizes_of
from .packing import Packed, Packer, ScoredRows, SequenceSampling
from .runner import Executables, Runner, Work
from .scheduler import Scheduler, SchedulerConfig, SchedulerStats
from .sequence import Sequence

MAX_REQUESTS = 1 << 20  # unfinished at a time: bounds the host's memory


@dataclasses.dataclass
class StepSeconds:
    """Where the engine's time went: planning, queueing work on the device, waiting for it and reading."""

    steps: int = 0
    plan_s: float = 0.0
    dispatch_s: float = 0.0
    wait_s: float = 0.0
    new_tokens: int = 0


class EngineStats(NamedTuple):
    scheduler: SchedulerStats
    seconds: StepSeconds
    n_compiled: int  # executables so far


class Engine:
    """Continuous batching of one model on one mesh. Used from one thread; `AsyncEngine` makes it usable from many."""

    def __init__(
        self,
        config: LlamaConfig,
        mesh: Mesh,
        weights: XfmrWeights | None,
        options: EngineOptions | None = None,
        *,
        attention: str | None = None,
        tokenizer: Tokenizer | None = None,
        draft: tuple[LlamaConfig, XfmrWeights | None] | None = None,
        expected_bytes: int | None = None,
        ahead: bool = False,
    ):
        """Computes how many pages the memory holds and makes the cache.

        Steps are compiled when they are first needed, or all of them before by `compile`, of which `ahead` lets this
        do a part. The tokenizer is for requests that say in text what an answer must have or must not. `draft` is a
        smaller model of the same vocabulary on the same mesh, which guesses tokens ahead
        (options.num_speculative_tokens).

        Weights that are None are on their way, and `load` brings them before the first step. `expected_bytes`: see
        `plan_pages`.

        Raises ConfigError for options that contradict the model, the mesh or its memory.
        """
        options = EngineOptions() if options is None else options
        check_options(options, config, None if draft is None else draft[0])
        use_compilation_cache()
        self.config, self.mesh, self.options = config, mesh, options
        backend = choose_backend(config, mesh.devices.flat[0], attention)
        self.sizes = sizes_of(options, mesh, run_length(backend, config, mesh.shape[MODEL]))
        executables: Executables = {}
        budget = plan_pages(
            config,
            mesh,
            backend,
            options,
            self.sizes,
            None if draft is None else draft[0],
            expected_bytes=expected_bytes,
            ahead=ahead,
            executables=executables,
        )
        self.max_model_len = budget.max_model_len
        sizes = {
            "sizes": self.sizes,
            "n_pages": budget.n_pages,
            "table_width": pages_per_sequence(budget.max_model_len),
            "kv_dtype": options.kv_cache_dtype,
        }
        self.runner = Runner(
            config, mesh, weights, backend=backend, modes=modes_of(options), executables=executables, **sizes
        )
        n_shards = mesh.shape[DATA]
        self._tokenizer = tokenizer
        self._grammars: GrammarCompiler | None = None
        if tokenizer is not None:
            self._grammars = GrammarCompiler(tokenizer, config.vocab_size, tuple(config.eos_ids))
        self._packer = Packer(self.sizes, n_shards, budget.n_pages, config.vocab_size)
        self._lockstep = Lockstep(self.sizes, n_shards) if jax.process_count() > 1 else None
        self._draft_runner: Runner | None = None
        self._drafter: Drafter | None = LookupDrafter(options) if options.num_speculative_tokens else None
        if draft is not None:
            of_draft = choose_backend(draft[0], mesh.devices.flat[0], None)
            self._draft_runner = Runner(draft[0], mesh, draft[1], backend=of_draft, **sizes)
            self._drafter = ModelDrafter(
                options, self._packer, lambda work: self._execute(work._replace(for_draft=True))
            )
        self._scheduler = Scheduler(
            SchedulerConfig(
                n_shards=n_shards,
                slots_per_shard=self.sizes.slots,
                pages_per_shard=budget.n_pages,
                page_size=PAGE_SIZE,
                max_model_len=budget.max_model_len,
                block=self.sizes.block,
                max_blocks=self.sizes.max_blocks,
                max_batched_tokens=self.sizes.max_tokens,
                decode_row_sizes=self.sizes.beside_chunks,
                decode_steps=self.sizes.decode_steps,
                prefix_caching=options.enable_prefix_caching,
            )
        )
        self._in_flight: collections.deque[Flight] = collections.deque()
        self._sequences: dict[str, list[Sequence]] = {}  # unfinished requests
        self._aborted: list[TokenDelta] = []
        self._arrivals = 0
        self._dead: str | None = None
        self._seed = secrets.randbits(63) if options.seed is None else options.seed
        self.seconds = StepSeconds()
        if weights is not None:
            self.load(weights, None if draft is None else draft[1])

    def load(self, weights: XfmrWeights, draft: XfmrWeights | None = None) -> None:
        """Takes the models' weights, where they were still on their way, and makes the cache."""
        for runner, of_model in zip(self._runners, (weights, draft), strict=False):
            runner.weights = of_model
            runner.start()

    def add_request(self, request_id: str, prompt: Seq[int], params: SamplingParams, *, priority: int = 0) -> None:
        """Takes a request; smaller `priority` first, then by arrival. Its tokens come from `step`.

        Raises RequestError for what can never be served, EngineError when the engine is dead or shut down.
        """
        self._check_alive()
        prompt = self.check_prompt(prompt)
        if request_id in self._sequences:
            raise RequestError(f"request {request_id!r} is being served already; give every request an id of its own.")
        if len(self._sequences) >= MAX_REQUESTS:
            raise RequestError(f"{MAX_REQUESTS} requests are waiting already; send this one later.")
        if self._aborted:  # what is still to be said of an aborted request must not be taken for this one's
            self._aborted = [delta for delta in self._aborted if delta.request_id != request_id]
        self._check_params(params)
        grammar = self.compile_grammar(params)
        # A grammar's end has to be said.
        ends = frozenset() if params.ignore_eos and grammar is None else frozenset(self.config.eos_ids)
        stop = ends | frozenset(params.stop_token_ids)
        banned = frozenset(self.config.eos_ids) | stop  # by min_tokens
        seed = self._seed + self._arrivals if params.seed is None else params.seed
        speculates = self._drafter is not None and may_speculate(params)
        leader, sequences = None, []
        mask = row_mask(
            params, vocab_size=self.config.vocab_size, stop_ids=banned, tokenizer=self._tokenizer, grammar=grammar
        )
        for index in range(params.n_sequences):
            if index and mask is not None:
                mask = mask.another()
            sampling = SequenceSampling(params, (int(seed) + index) % 2**64, mask)
            sequence = Sequence(
                request_id=request_id,
                index=index,
                prompt=prompt,
                max_tokens=min(params.max_tokens, self.max_model_len - len(prompt)),
                stop_token_ids=stop,
                priority=priority,
                arrival=self._arrivals,
                params=sampling,
                leader=leader,
                one_by_one=speculates or (mask is not None and (mask.is_dynamic or mask.switch_at > 0)),
                speculates=speculates,
                # A draft model computes prompts, and the answers that it guesses at.
                caches_answer=speculates or self._draft_runner is None,
                scores_prompt=index == 0 and params.prompt_logprobs is not None,
            )
            if sequence.scores_prompt:
                sampling.prompt_logprobs = [None] * len(prompt)
            leader = leader or sequence
            self._arrivals += 1
            self._scheduler.add(sequence)
            sequences.append(sequence)
        self._sequences[request_id] = sequences

    def _check_params(self, params: SamplingParams) -> None:
        """Raises RequestError for what this model and engine cannot do."""
        for name in ("stop_token_ids", "logit_bias"):  # allowed_token_ids are looked at where the mask is made
            bad = next((i for i in getattr(params, name) or () if i >= self.config.vocab_size), None)
            if bad is not None:
                raise RequestError(
                    f"{name}: token id {bad} is outside the vocabulary of {self.config.vocab_size} tokens."
                )
        if params.entropy and not self.options.entropy_sampler:
            raise RequestError("the entropy sampler is off: make the engine with entropy_sampler=True.")
        if params.entropy and (params.entropy.pause_token or 0) >= self.config.vocab_size:
            raise RequestError(
                f"entropy setting pause_token={params.entropy.pause_token} is outside the vocabulary of "
                f"{self.config.vocab_size} tokens."
            )

    def compile_grammar(self, params: SamplingParams) -> Grammar | None:
        """The grammar of a request, kept for `add_request`. Other threads may call it, to spare the engine the time.

        Raises RequestError for a form that cannot be enforced.
        """
        if params.structured_outputs is None:
            return None
        if self._grammars is None:
            raise RequestError("structured_outputs needs a tokenizer, and the model was loaded without one.")
        return self._grammars.compile(params.structured_outputs)

    def compile(self, progress: bool = True, check: Callable[[], None] = lambda: None) -> None:
        """Compiles every step that can be needed, so that nothing is compiled while serving.

        check: called after each; what it raises ends the compiling.
        """
        self.runner.compile_all(progress, check=check)
        if self._draft_runner is not None:
            self._draft_runner.compile_all(progress, self.options.num_speculative_tokens + 1, check)

    def check_prompt(self, prompt: Seq[int]) -> list[int]:
        """The prompt as a list. Raises RequestError when it can never be served."""
        try:
            ids = [operator.index(i) for i in prompt]
        except TypeError as error:
            raise RequestError(f"a prompt is a list of token ids, whole numbers: {error}.") from None
        if not ids:
            raise RequestError("the prompt has no tokens; it needs at least one, such as BOS.")
        bad = next((i for i in ids if not 0 <= i < self.config.vocab_size), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size} tokens.")
        if len(ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, but max_model_len={self.max_model_len} must hold the prompt and at "
                f"least one new token: shorten it to {self.max_model_len - 1} tokens or fewer."
            )
        return ids

    def abort(self, request_id: str) -> None:
        """Ends a request now; `step` gives its last delta. Unknown ids, which may just have finished, are ignored."""
        sequences = self._sequences.pop(request_id, [])
        unfinished = [s for s in sequences if s.finish_reason is None]
        self._scheduler.abort(request_id)
        self._aborted += [TokenDelta(request_id, s.index, (), None, "abort") for s in unfinished]

    def end(self, request_id: str, index: int, reason: str = "stop") -> None:
        """Ends one answer now; nothing more is said of it. Unknown and finished ones are ignored."""
        for sequence in self._sequences.get(request_id, ()):
            if sequence.index == index and sequence.finish_reason is None:
                self._scheduler.end(request_id, index, reason)
                self._forget(sequence)
                return

    def is_unfinished(self, request_id: str) -> bool:
        """Whether `step` still has something to say of this request."""
        return request_id in self._sequences

    @property
    def _runners(self) -> list[Runner]:
        return [runner for runner in (self.runner, self._draft_runner) if runner is not None]

    @property
    def compile_s(self) -> float:
        """Seconds that executables took to compile so far, one after the other."""
        return sum(runner.compile_s for runner in self._runners)

    @property
    def is_dead(self) -> bool:
        """Whether it was shut down or a step failed."""
        return self._dead is not None

    @property
    def has_unfinished(self) -> bool:
        return bool(self._sequences or self._aborted or self._in_flight)

    def step(self) -> list[TokenDelta]:
        """Queues the next dispatch and gives what the one before it brought; empty when there is nothing to do.

        When a step fails, every request that the engine has ends with an error, and the engine is dead.
        """
        self._check_alive()
        deltas, self._aborted = self._aborted, []
        try:
            self._step(deltas)
        except Exception as error:  # whatever the device or the runtime raises
            deltas += self._die(error)
        except BaseException as error:  # Ctrl-C between planning and reading: what is computed is no longer known
            self._die(error)
            raise
        return deltas

    def _step(self, new: list[TokenDelta]) -> None:
        """Appends to `new` what is read, as it is read: it is not lost when what comes after fails."""
        start, n_before = time.perf_counter(), len(new)
        if self._drafter is not None:
            self._drafter.propose(self._scheduler.speculating())
        plan = self._scheduler.schedule()
        if self._drafter is not None and plan is not None:
            self._drafter.complete(plan)
        packed = None if plan is None else self._packer.pack(plan)
        planned = time.perf_counter()
        waited = 0.0
        if packed is not None:
            for work in packed.works:
                if self._drafter is not None:
                    self._drafter.follow(work, any(plan.chunks))
                sampled = self._execute(work)
            if packed.masked:
                # What the rows may choose depends on tokens that are read while the device computes their logits.
                reading = time.perf_counter()
                while self._in_flight:
                    new += self._read(self._in_flight.popleft())
                waited = time.perf_counter() - reading
                masks, ended = self._masks(packed)
                new += ended
                for work in self._packer.masks(masks):
                    sampled = self._execute(work)
            self._in_flight.append(Flight(plan, packed.columns, packed.scored, sampled))
        dispatched = time.perf_counter()
        if self._in_flight and (packed is None or len(self._in_flight) > 1):
            new += self._read(self._in_flight.popleft())
        seconds = self.seconds
        seconds.steps += packed is not None
        seconds.plan_s += planned - start
        seconds.dispatch_s += dispatched - planned - waited
        seconds.wait_s += time.perf_counter() - dispatched + waited
        seconds.new_tokens += sum(len(d.token_ids) for d in new[n_before:])

    def _execute(self, work: Work) -> Sampled | None:
        if self._lockstep:
            self._lockstep.send(work)
        return self._runner_of(work).execute(work)

    def _runner_of(self, work: Work) -> Runner:
        return self._draft_runner if work.for_draft else self.runner

    def _masks(self, packed: Packed) -> tuple[list[tuple[Sequence, np.ndarray]], list[TokenDelta]]:
        """The masks of unfinished rows; where a form is complete, or cannot be kept, the sequence ends."""
        masks, ended = [], []
        for sequence in packed.masked:
            if sequence.finish_reason is not None:
                continue
            try:
                mask = sequence.params.mask.mask(sequence.tokens[len(sequence.prompt) :])
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # also a panic of the library, which is no Exception
                ended.append(self._fail(sequence, (), None, str(error)))
                continue
            if mask.any():
                masks.append((sequence, mask))
            else:  # its form is complete, and the model has no token that says so
                self.end(sequence.request_id, sequence.index)
                ended.append(TokenDelta(sequence.request_id, sequence.index, (), None, "stop"))
        return masks, ended

    def _read(self, flight: Flight) -> list[TokenDelta]:
        """Waits for a step's tokens and hands them to the scheduler, which says what they mean."""
        plan = flight.plan
        sampled = Sampled(*(None if x is None else np.asarray(x) for x in flight.sampled))
        for rows in flight.scored:
            self._store_scored(rows, sampled)
        sampled = by_sequence(sampled, flight)
        n_right = count_right(plan, sampled.tokens_R) if any(map(any, plan.drafts)) else None
        is_bad = np.isnan(sampled.logprobs_R)
        any_bad = is_bad.any()
        row_of = {id(s): row for row, s in enumerate(plan.rows)}
        deltas = []
        for sequence, new in self._scheduler.update(plan, sampled.tokens_R, n_right):
            wanted, row = sequence.params.params.logprobs, row_of[id(sequence)]
            error = None
            if any_bad and is_bad[: len(new), row].any():
                new = new[: int(is_bad[:, row].argmax())]
                error = "the model's logits for the next token are not numbers"
            logprobs = None if wanted is None else logprobs_of(sampled, row, len(new), wanted)
            if error:
                deltas.append(self._fail(sequence, tuple(new), logprobs, error))
                continue
            deltas.append(
                TokenDelta(
                    sequence.request_id,
                    sequence.index,
                    tuple(new),
                    logprobs,
                    sequence.finish_reason,
                    prompt_logprobs=take_prompt_logprobs(sequence),
                    metrics=metrics_of(sampled, row, len(new)) if sequence.params.params.entropy else None,
                    speculation=speculation_of(sequence) if sequence.finish_reason else None,
                )
            )
            if sequence.finish_reason:
                self._forget(sequence)
        return deltas

    def _fail(
        self, sequence: Sequence, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] | None, error: str
    ) -> TokenDelta:
        """Ends one sequence with an error; the others go on."""
        self._scheduler.end(sequence.request_id, sequence.index, "error")
        self._forget(sequence)
        scored = take_prompt_logprobs(sequence)
        return TokenDelta(sequence.request_id, sequence.index, tokens, logprobs, "error", error, scored)

    def _store_scored(self, rows: ScoredRows, sampled: Sampled) -> None:
        sampling: SequenceSampling = rows.seq.params
        scored = Sampled(*(None if x is None else x[None] for x in sampled))
        for position, column in enumerate(rows.columns.tolist(), rows.start + 1):
            (found,) = logprobs_of(scored, column, 1, sampling.params.prompt_logprobs)
            sampling.prompt_logprobs[position] = found

    def _forget(self, sequence: Sequence) -> None:
        sequences = self._sequences.get(sequence.request_id)
        if sequences and all(s.finish_reason for s in sequences):
            del self._sequences[sequence.request_id]

    def stats(self) -> EngineStats:
        n_compiled = sum(runner.n_compiled for runner in self._runners)
        return EngineStats(self._scheduler.stats(), dataclasses.replace(self.seconds), n_compiled)

    def follow(self) -> None:
        """In every process but 0: executes what process 0 sends until it calls `release`."""
        recent: collections.deque[Sampled] = collections.deque()
        while (work := self._lockstep.receive()) is not None:
            sampled = self._runner_of(work).execute(work)
            if sampled is not None:
                recent.append(sampled)
            if len(recent) > 2:  # the queue on the device stays as short as in process 0
                jax.block_until_ready(recent.popleft())

    def release(self) -> None:
        """In process 0: lets the others go on after their `follow`."""
        if self._lockstep:
            self._lockstep.send(None)

    def shutdown(self) -> None:
        """Frees the cache; the engine cannot be used after that."""
        self._dead = self._dead or "it was shut down"
        self._in_flight.clear()
        self._sequences.clear()
        self._aborted.clear()
        for runner in self._runners:
            runner.state = None

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineError(f"the engine is dead: {self._dead}.")

    def _die(self, error: BaseException) -> list[TokenDelta]:
        self._dead = f"a step failed with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        logging.error("the engine is dead: %s", self._dead, exc_info=error)
        unfinished = [s for sequences in self._sequences.values() for s in sequences if s.finish_reason is None]
        self._sequences.clear()
        self._in_flight.clear()
        return [TokenDelta(s.request_id, s.index, (), None, "error", self._dead) for s in unfinished]
