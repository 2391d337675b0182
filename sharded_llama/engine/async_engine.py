"""The engine for a server: one thread steps it, and every request is an asynchronous iterator."""

import asyncio
import contextlib
import functools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from ..errors import EngineError
from ..sampling import SamplingParams
from ..tokenizer import Tokenizer
from .compilation import left_out_of_garbage_collection
from .deltas import TokenDelta
from .engine import Engine, EngineStats
from .outputs import Answers, RequestOutput, StreamEvent


class _Listener:
    """Whoever waits for the deltas of one request. Compared by identity: its name may later be another's."""

    def __init__(self, request_id: str):
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self._deltas: asyncio.Queue[TokenDelta | Exception] = asyncio.Queue()

    def put(self, delta: TokenDelta | Exception) -> None:
        """For the loop's thread."""
        self._deltas.put_nowait(delta)

    async def next(self) -> TokenDelta:
        delta = await self._deltas.get()
        if isinstance(delta, Exception):
            raise delta
        return delta


class AsyncEngine:
    """Wraps an `Engine`. All methods may be called from any thread or event loop; the engine itself sees one thread."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None = None):
        """The tokenizer is for the texts of `stream` and `answer`."""
        self._engine, self._tokenizer = engine, tokenizer
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[str, _Listener] = {}  # seen by the thread alone
        self._stopped, self._stopping = False, threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    async def generate(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, *, priority: int = 0
    ) -> AsyncIterator[TokenDelta]:
        """The deltas of one request as they come, of all its n (or best_of) answers; stop strings are not looked for.

        Cancelling the task that iterates, or closing the iterator (`contextlib.aclosing`), aborts the request. Raises
        RequestError when it cannot be served, EngineError when the engine is dead or dies. An answer that alone
        cannot go on ends with a delta that has the error; the others go on.
        """
        await self._prepare(params)
        listener = _Listener(request_id)
        unfinished = params.n_sequences
        self._call(functools.partial(self._add, listener, prompt, params, priority))
        try:
            while unfinished:
                delta = await listener.next()
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            self._leave(listener)

    async def stream(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, *, priority: int = 0
    ) -> AsyncIterator[StreamEvent]:
        """The answers as text, as they come: like `generate`, with stop strings.

        Raises RequestError as well for stop strings without a tokenizer, and for best_of.
        """
        answers = Answers(prompt, params, self._tokenizer, self._engine.config.eos_ids, streamed=True)
        async with contextlib.aclosing(self._events(request_id, prompt, answers, priority)) as events:
            async for event in events:
                yield event

    async def answer(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, *, priority: int = 0
    ) -> RequestOutput:
        """The whole answers, as `LLM.generate` has them. Cancelling the task aborts the request. Raises as `stream`."""
        answers = Answers(prompt, params, self._tokenizer, self._engine.config.eos_ids, streamed=False)
        async with contextlib.aclosing(self._events(request_id, prompt, answers, priority)) as events:
            async for _ in events:
                pass
        return RequestOutput(request_id, None, tuple(prompt), answers.outputs(), answers.prompt_logprobs)

    async def _events(
        self, request_id: str, prompt: Sequence[int], answers: Answers, priority: int
    ) -> AsyncIterator[StreamEvent]:
        await self._prepare(answers.engine_params)
        listener = _Listener(request_id)
        self._call(functools.partial(self._add, listener, prompt, answers.engine_params, priority))
        try:
            while answers.n_unfinished:
                delta = await listener.next()
                event = answers.add(delta)
                if event is None:  # it came after a stop string
                    continue
                if event.finish_reason is not None and delta.finish_reason is None:
                    self._calls.put(functools.partial(self._end, listener, delta.index))
                yield event
        finally:
            self._leave(listener)

    async def _prepare(self, params: SamplingParams) -> None:
        """Compiles a request's grammar in a thread of its own, while the engine steps on."""
        if params.structured_outputs is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._engine.compile_grammar, params)

    async def stats(self) -> EngineStats:
        """The engine's statistics between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[EngineStats] = loop.create_future()

        def report() -> None:
            stats = self._engine.stats()
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(lambda: future.done() or future.set_result(stats))

        self._call(report)
        return await future

    def shutdown(self) -> None:
        """Ends every request with an error and the thread after its current step."""
        with self._stopping:
            if not self._stopped:
                self._calls.put(None)
            self._stopped = True
        self._thread.join()

    def _call(self, call: Callable[[], None]) -> None:
        """Has the thread call it between two steps. Nothing comes behind the end, where nobody would answer."""
        with self._stopping:
            if self._stopped:
                raise EngineError("the engine is dead: it was shut down.")
            self._calls.put(call)

    def _leave(self, listener: _Listener) -> None:
        """Nobody listens any more: aborts what has not ended."""
        self._calls.put(functools.partial(self._abort, listener))

    # What the thread does

    def _add(self, listener: _Listener, prompt: Sequence[int], params: SamplingParams, priority: int) -> None:
        try:
            self._engine.add_request(listener.request_id, prompt, params, priority=priority)
            self._listeners[listener.request_id] = listener
        except Exception as error:  # it belongs to whoever asked
            self._deliver((listener, error))

    def _deliver(self, *deliveries: tuple[_Listener, TokenDelta | Exception]) -> None:
        """Each event loop is called once: to wake it for every token of a step would take longer than to plan it."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Listener, TokenDelta | Exception]]] = {}
        for listener, delta in deliveries:
            by_loop.setdefault(listener.loop, []).append((listener, delta))
        for loop, of_loop in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, of_loop)
            except RuntimeError:  # the loop is closed: nobody is listening any more
                for listener, _ in of_loop:
                    self._abort(listener)

    def _end(self, listener: _Listener, index: int) -> None:
        if self._is_current(listener):
            self._engine.end(listener.request_id, index)
            self._forget(listener.request_id)

    def _abort(self, listener: _Listener) -> None:
        if self._is_current(listener):
            del self._listeners[listener.request_id]
            self._engine.abort(listener.request_id)

    def _is_current(self, listener: _Listener) -> bool:
        """Else it was refused, or has ended."""
        return self._listeners.get(listener.request_id) is listener

    def _forget(self, request_id: str) -> None:
        """Where a request has ended, its name is free."""
        if not self._engine.is_unfinished(request_id):
            self._listeners.pop(request_id, None)

    def _loop(self) -> None:
        error: BaseException = EngineError("the engine is dead: it was shut down.")
        try:
            with left_out_of_garbage_collection():
                self._serve()
        except BaseException as failure:  # whatever it is, nobody may wait for ever
            error = failure if isinstance(failure, EngineError) else EngineError(f"the engine is dead: {failure!r}.")
        with self._stopping:
            self._stopped = True
        for listener in list(self._listeners.values()):
            self._deliver((listener, error))
        self._engine.shutdown()
        while not self._calls.empty():  # those that came before the end are told of it by the engine
            if call := self._calls.get():
                with contextlib.suppress(Exception):
                    call()
        self._engine.release()

    def _serve(self) -> None:
        while True:
            # Without work the thread sleeps until there is a call.
            while not self._calls.empty() or not self._engine.has_unfinished:
                call = self._calls.get()
                if call is None:
                    return
                call()
            deltas = self._engine.step()
            if self._engine.is_dead:
                # It says so to whom it still knows; what the last step had for others is lost with it.
                said = next((delta.error for delta in deltas if delta.error), "the engine is dead.")
                for listener in list(self._listeners.values()):
                    self._deliver((listener, EngineError(said)))
                self._listeners.clear()
                continue
            known = ((self._listeners.get(delta.request_id), delta) for delta in deltas)
            self._deliver(*((listener, delta) for listener, delta in known if listener is not None))
            for request_id in {delta.request_id for delta in deltas}:
                self._forget(request_id)


def _put_all(deliveries: Sequence[tuple[_Listener, TokenDelta | Exception]]) -> None:
    for listener, delta in deliveries:
        listener.put(delta)
