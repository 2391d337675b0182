"""A conversation on the terminal."""

import sys
from typing import Any

from sharded_llama.engine.llm import LLM
from sharded_llama.errors import RequestError
from sharded_llama.mesh import broadcast_from_main

from . import common


def converse(llm: LLM, system: str | None, settings: dict[str, Any]) -> None:
    """Answers line after line of standard input until it ends; every process takes part, process 0 reads and writes.

    Raises RequestError when the model cannot hold a conversation.
    """
    messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    llm.encode_chat([*messages, {"role": "user", "content": "Hello"}])  # a model that cannot chat says so at once
    while (line := broadcast_from_main(_read_line)) is not None:
        if not line.strip():
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            stream = llm.stream([llm.encode_chat(asked)], **settings)
        except RequestError as error:  # too long, for one; the conversation goes on without this message
            _write(f"error: {error}\n", sys.stderr)
            continue
        text, failure = "", None
        for event in stream:
            text, failure = text + event.text, event.error
            _write(event.text, sys.stdout)
        _write("\n", sys.stdout)
        if failure:
            _write(f"error: {failure}\n", sys.stderr)
        answer = broadcast_from_main(lambda text=text, failure=failure: None if failure else text)
        if answer is not None:
            messages = [*asked, {"role": "assistant", "content": answer}]


def _read_line() -> str | None:
    """The next message; None at the end of the input."""
    if sys.stdin.isatty():
        _write("> ", sys.stderr)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _write(text: str, file: Any) -> None:
    if common.is_main_process():
        file.write(text)
        file.flush()
