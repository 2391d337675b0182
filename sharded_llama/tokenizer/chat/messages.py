"""What a caller sends: checked, bounded and copied, before a template sees it."""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ...errors import RequestError
from .sandbox import FUNCTIONS
from .template import TOKEN_VARIABLES, ChatTemplate

# All that one request has, together.
MAX_MESSAGES = 4096
MAX_TOOLS = 1024
MAX_CHARS = 1 << 22  # a million tokens have about as many
MAX_VALUES = 100_000  # strings, numbers, lists and objects
MAX_DEPTH = 32
MAX_INT_BITS = 256
MAX_KEY_CHARS = 1024
ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")

# Roles that templates give a meaning. Some write special tokens around the role's name.
KNOWN_ROLES = {"system", "developer", "user", "assistant", "model", "tool", "function", "ipython"}
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def checked_chat(
    messages: Any, tools: Any, variables: Any, template: ChatTemplate, names: Collection[str]
) -> dict[str, Any]:
    """Copies of what the caller sent, of nothing but JSON's types: `messages`, `tools`, and the `variables`.

    No role may be one of `names`, those of special tokens. Raises RequestError, naming the message or field.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not 0 < len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages must be a list of 1 to {MAX_MESSAGES} messages.")
    reader = _Reader()
    chat: dict[str, Any] = {"messages": [], "tools": None}
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} must be an object with role and content, not {type(message).__name__}.")
        message = reader.read({key: value for key, value in message.items() if value is not None}, where)
        _check_role(message.get("role"), where, names)
        _check_content(message, where)
        chat["messages"].append(_with_reasoning(message))
    if tools is not None:
        if not isinstance(tools, Sequence) or isinstance(tools, str) or len(tools) > MAX_TOOLS:
            raise RequestError(f"tools must be a list of at most {MAX_TOOLS} objects.")
        if bad := [i for i, tool in enumerate(tools) if not isinstance(tool, Mapping)]:
            raise RequestError(f"tools[{bad[0]}] must be an object, a JSON schema of a function.")
        chat["tools"] = reader.read(list(tools), "tools")
    variables = reader.read({} if variables is None else variables, "variables")
    if not isinstance(variables, dict):
        raise RequestError("variables must be an object.")
    reserved = {*chat, "add_generation_prompt", *template.tokens, *TOKEN_VARIABLES, *FUNCTIONS}
    for name in variables:
        if not name.isidentifier() or name.startswith("_") or name in reserved:
            raise RequestError(f"variables: {name!r} is not a name that a caller may give to a template's variable.")
    return {"documents": None, **variables, **chat}


def _check_role(role: Any, where: str, names: Collection[str]) -> None:
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise RequestError(
            f"{where}.role must be a string of 1 to 64 of the characters A-Z a-z 0-9 _ . - that starts with a letter."
        )
    # Of a template that writes "<|" + role + "|>" this would make any special token.
    if role not in KNOWN_ROLES and role in names:
        raise RequestError(f"{where}.role={role!r} is the name of a special token; roles are {sorted(KNOWN_ROLES)}.")


def _check_content(message: dict[str, Any], where: str) -> None:
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            raise RequestError(f"{where} has no content.")
    elif isinstance(content, list):
        for i, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError(f'{where}.content[{i}] must be {{"type": "text", "text": "..."}}.')
    elif not isinstance(content, str):
        raise RequestError(f"{where}.content must be a string or a list of text parts, not {type(content).__name__}.")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning goes by several names; transformers gives templates these two."""
    reasoning = next((message[name] for name in REASONING_FIELDS if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Reader:
    """Copies values of JSON's types, and counts what it has copied."""

    def __init__(self) -> None:
        self.chars = MAX_CHARS
        self.values = MAX_VALUES

    def read(self, value: Any, where: str, depth: int = 0) -> Any:
        self.values -= 1
        if self.values < 0 or depth > MAX_DEPTH:
            raise RequestError(f"{where}: more than {MAX_VALUES} values, or nested more than {MAX_DEPTH} deep.")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._text(value, where)
        if isinstance(value, int) and value.bit_length() <= MAX_INT_BITS:
            return int(value)
        if isinstance(value, float) and math.isfinite(value):
            return float(value)
        if isinstance(value, Mapping):
            return {self._key(key, where): self.read(value[key], f"{where}.{key}", depth + 1) for key in value}
        if isinstance(value, (list, tuple)):
            return [self.read(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        raise RequestError(f"{where} is no value of JSON, or a number too large: it is a {type(value).__name__}.")

    def _key(self, key: Any, where: str) -> str:
        if not isinstance(key, str) or len(key) > MAX_KEY_CHARS:
            raise RequestError(f"{where}: a name in an object must be a string of at most {MAX_KEY_CHARS} characters.")
        return self._text(key, where)

    def _text(self, text: str, where: str) -> str:
        self.chars -= len(text)
        if self.chars < 0:
            raise RequestError(f"{where}: more than {MAX_CHARS} characters in all.")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise RequestError(f"{where} is not valid Unicode: half a character at index {e.start}.") from None
        return "".join(text)  # a plain string even if it was of a subclass


def strings(value: Any) -> Iterator[str]:
    """Every string in a checked value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
