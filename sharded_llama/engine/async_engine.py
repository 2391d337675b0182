"""The engine for a server: one thread steps it, and every request is an asynchronous iterator."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from ..errors import EngineError
from ..sampling import SamplingParams
from .engine import Engine, EngineStats, TokenDelta


class AsyncEngine:
    """Wraps an `Engine`. All methods may be called from any thread or event loop; the engine itself sees one thread."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, Callable[[TokenDelta | Exception], None]] = {}  # seen by the thread alone
        self._stopped, self._stopping = False, threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    async def generate(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, *, priority: int = 0
    ) -> AsyncIterator[TokenDelta]:
        """The deltas of one request as they come, of all its n answers.

        Cancelling the task that iterates, or closing the iterator (`contextlib.aclosing`), aborts the request. Raises
        RequestError when it cannot be served, EngineError when the engine is dead or dies.
        """
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[TokenDelta | Exception] = asyncio.Queue()

        def deliver(delta: TokenDelta | Exception) -> None:
            try:
                loop.call_soon_threadsafe(deltas.put_nowait, delta)
            except RuntimeError:  # the loop is closed: nobody is listening any more
                self._abort(request_id, deliver)

        def add() -> None:
            try:
                self._engine.add_request(request_id, prompt, params, priority=priority)
                self._streams[request_id] = deliver
            except Exception as error:  # it belongs to whoever asked
                deliver(error)

        unfinished = params.n
        self._call(add)
        try:
            while unfinished:
                delta = await deltas.get()
                if isinstance(delta, Exception):
                    unfinished = 0
                    raise delta
                unfinished -= delta.finish_reason is not None
                if delta.error:
                    unfinished = 0
                    raise EngineError(delta.error)
                yield delta
        finally:
            if unfinished:
                self._calls.put(lambda: self._abort(request_id, deliver))

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

    def _abort(self, request_id: str, deliver: Callable[[TokenDelta | Exception], None]) -> None:
        if self._streams.get(request_id) is deliver:  # else it was refused, or has ended: the name may be another's
            del self._streams[request_id]
            self._engine.abort(request_id)

    def _loop(self) -> None:
        error: BaseException = EngineError("the engine is dead: it was shut down.")
        try:
            self._serve()
        except BaseException as failure:  # whatever it is, nobody may wait for ever
            error = failure if isinstance(failure, EngineError) else EngineError(f"the engine is dead: {failure!r}.")
        with self._stopping:
            self._stopped = True
        for deliver in list(self._streams.values()):
            deliver(error)
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
            for delta in deltas:
                if deliver := self._streams.get(delta.request_id):
                    deliver(delta)
            for request_id in {delta.request_id for delta in deltas}:
                if not self._engine.is_unfinished(request_id):
                    self._streams.pop(request_id, None)
