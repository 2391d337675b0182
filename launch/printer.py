"""Answers on standard output, in order, while they come."""

import sys
from collections.abc import Sequence

from sharded_llama.engine.outputs import StreamEvent
from sharded_llama.sampling.entropy import TokenMetrics

from .metrics_view import MetricsPrinter


class Printer:
    """Prints answers in the order of prompts and answers, the first unfinished one as it comes."""

    def __init__(self, prompts: Sequence[str], n: int, view: MetricsPrinter | None = None):
        """`view` tints the text by the metrics of its tokens."""
        self.prompts, self.n = prompts, n
        self._view = view
        self._current = -1
        self._waiting: list[list[StreamEvent]] = [[] for _ in range(len(prompts) * n)]  # of answers not printed yet
        self._done = [False] * len(self._waiting)

    def add(self, event: StreamEvent) -> None:
        if self._current < 0:  # nothing is printed before the first token is there
            if self._view:
                self._view.legend()
            self._next()
        number = event.request * self.n + event.index
        self._done[number] = event.finish_reason is not None
        if number != self._current:
            self._waiting[number].append(event)
            return
        self._write(event.text, event.metrics or ())
        while self._current < len(self._done) and self._done[self._current]:
            self._write("\n")
            self._next()

    def _next(self) -> None:
        """Goes to the next answer and prints its prompt, with what is there of it."""
        self._current += 1
        if self._current < len(self._done):
            request, index = divmod(self._current, self.n)
            self._write(self._heading(request, index) + self.prompts[request])
            for event in self._waiting[self._current]:
                self._write(event.text, event.metrics or ())
            self._waiting[self._current].clear()

    def _heading(self, request: int, index: int) -> str:
        """The line above an answer; none when there is but one."""
        parts = [f"prompt {request + 1} of {len(self.prompts)}"] if len(self.prompts) > 1 else []
        parts += [f"answer {index + 1} of {self.n}"] if self.n > 1 else []
        return f"--- {', '.join(parts)} ---\n" if parts else ""

    def _write(self, text: str, metrics: Sequence[TokenMetrics] | None = None) -> None:
        """A piece of an answer, with its metrics, or (None) what stands around answers."""
        if self._view is None:
            sys.stdout.write(text)
            sys.stdout.flush()
        elif metrics is None:
            self._view.write_plain(text)
        else:
            self._view.write(text, metrics)
