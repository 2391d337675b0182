"""What rendering a chat template once may cost, in time and memory."""

import time
from collections.abc import Iterable
from typing import Any

from ...errors import RequestError

# The largest honest requests need about a tenth.
MAX_VALUE = 1 << 23  # characters and items of one value, nested ones included, and of the text that comes out
MAX_WORK = 1 << 30  # characters and items made in all
MAX_CPU_SECONDS = 5.0  # of the thread, so that a busy machine changes nothing
MAX_VALUE_INT_BITS = 1 << 16
MAX_NESTING = 100  # lists in lists: Python does some things to them without looking at its stack
MAX_WIDTH = 1000  # of padding, indentation and formatted numbers

VIEWS = (type({}.keys()), type({}.values()), type({}.items()))


class Budget:
    """What rendering once may still spend."""

    def __init__(self) -> None:
        self._left = MAX_WORK
        self._deadline = time.thread_time() + MAX_CPU_SECONDS
        # Of lists and the like, by identity: size and depth. The value is kept, so that no other one gets its identity.
        self._measured: dict[int, tuple[Any, int, int]] = {}

    def spend(self, cost: int = 0) -> None:
        """Raises RequestError when there is nothing left."""
        self._left -= cost + 1
        if self._left < 0 or time.thread_time() > self._deadline:
            raise RequestError(
                f"the chat template takes too long for the messages: more than {MAX_WORK} steps or "
                f"{MAX_CPU_SECONDS:g} s of processor time."
            )

    def checked(self, value: Any) -> Any:
        """The value. Raises RequestError when it is too large, or the budget is spent."""
        allow(self.size(value))
        self.spend(len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0)
        return value

    def joined(self, separator: str, values: Iterable[Any]) -> str:
        """The values, written out and joined. Raises RequestError when that is too long, or the budget is spent."""
        parts, size = [], 0
        for value in values:
            parts.append(str(value))
            size += len(parts[-1]) + len(separator)
            allow(size)
            self.spend(len(parts[-1]) + len(separator))
        return separator.join(parts)

    def output(self, parts: Iterable[str]) -> str:
        """The text that comes out, of its parts. Raises RequestError as `joined` does."""
        kept, chars = [], 0
        for part in parts:
            kept.append(part)
            chars += len(part)
            self.spend(len(part))
            if chars > MAX_VALUE:
                raise RequestError(f"the chat template made more than {MAX_VALUE} characters of the messages.")
        return "".join(kept)

    def size(self, value: Any) -> int:
        """Characters and items, nested ones included and counted as often as they are reached.

        Values are made of others that are measured already, so this looks no deeper than what is new. Iterators are
        one item: what they give is measured where it is kept. Raises RequestError for what is nested too deeply, or a
        number too large.
        """
        return self._measure(value)[0]

    def _measure(self, value: Any) -> tuple[int, int]:
        """Size and depth of a value."""
        if isinstance(value, int):
            allow_number(value.bit_length())
        if isinstance(value, (str, bytes, range)):
            return 1 + len(value), 0
        if not isinstance(value, (list, tuple, dict, *VIEWS)):
            return 1, 0
        if id(value) not in self._measured:
            items = [*value, *value.values()] if isinstance(value, dict) else list(value)
            sizes, depths = zip((0, 0), *map(self._measure, items), strict=True)
            if max(depths) >= MAX_NESTING:
                raise RequestError(f"the chat template makes a value that is nested more than {MAX_NESTING} deep.")
            self._measured[id(value)] = (value, 1 + sum(sizes), 1 + max(depths))
        return self._measured[id(value)][1:]


def allow(size: int) -> None:
    """Raises RequestError when a value may not have so many characters and items."""
    if size > MAX_VALUE:
        raise RequestError(f"the chat template makes a value of more than {MAX_VALUE} characters or items.")


def allow_number(bits: int) -> None:
    """Raises RequestError when an integer may not have so many bits."""
    if bits > MAX_VALUE_INT_BITS:
        raise RequestError("the chat template makes numbers that are too large.")
