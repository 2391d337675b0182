"""Chat templates: messages to the token ids that a chat model was trained on.

template = load_chat_template(checkpoint_folder)
ids = encode_chat(tokenizer, template, [{"role": "user", "content": "Hello"}])

Text and ids are those of transformers' `apply_chat_template`, but for two things. What a caller wrote never becomes a
special token, and BOS comes exactly once.

Whose a character is. A template is a program, so its output does not tell. The messages are therefore rendered twice:
as they are, and with characters of the caller's strings replaced one by one by marks, private-use characters that
occur nowhere in the messages or in the first text. If the second text is the first one when the marks are replaced
back, then special tokens in the second text are the template's, and others in the first are the caller's. Templates
that look at a text or rewrite it may take another way for a marked one; then fewer characters are marked. If no way
of marking is understood, the request is refused.

What a template may do. It is a program of somebody else: it runs in jinja2's sandbox and has a budget. A loop's every
step, every attribute, call, operator and filter spends some of it, by the size of the result; values that grow beyond
a bound are refused where they are made, before they take memory where that can be told. So what happens between
two looks at the budget is bounded, and so is the whole. What remains: in every request a template can use all of
MAX_CPU_SECONDS, up to four times as one request is rendered up to four times, and a few hundred megabytes.
"""

import functools
import itertools
import json
import math
import os
import re
import time
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import escape

from ..errors import RequestError, ShardedLlamaError, TokenizerError
from ..json_file import read_json_object
from .base import Tokenizer, TokenKind
from .common import with_bos
from .convert import is_sentencepiece
from .llama3 import BOS

# Of a template. Published ones have up to about 20,000 characters.
MAX_TEMPLATE_CHARS = 1 << 17
MAX_TEMPLATES = 32  # in one folder
MAX_TOKEN_CHARS = 256  # of a special token that tokenizer_config.json names

# Of a request: what the caller sent, all of it together.
MAX_MESSAGES = 4096
MAX_TOOLS = 1024
MAX_CHARS = 1 << 22  # a million tokens have about as many
MAX_VALUES = 100_000  # strings, numbers, lists and objects
MAX_DEPTH = 32
MAX_INT_BITS = 256
MAX_KEY_CHARS = 1024
ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")

# Of rendering once. The largest honest requests above need about a tenth.
MAX_VALUE = 1 << 23  # characters and items of one value, nested ones included, and of the text that comes out
MAX_WORK = 1 << 30  # characters and items made in all
MAX_CPU_SECONDS = 5.0  # of the thread, so that a busy machine changes nothing
MAX_VALUE_INT_BITS = 1 << 16
MAX_NESTING = 100  # lists in lists: Python does some things to them without looking at its stack
MAX_WIDTH = 1000  # of padding, indentation and formatted numbers

# Roles that templates give a meaning. Some write special tokens around the role's name.
KNOWN_ROLES = {"system", "developer", "user", "assistant", "model", "tool", "function", "ipython"}
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
TOKEN_VARIABLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FUNCTIONS = ("range", "cycler", "joiner", "dict", "namespace", "raise_exception", "strftime_now")
MARKS = [chr(i) for i in range(0xE000, 0xF900)]  # the private-use area
MAX_MARKED = 1000  # different characters

# What Llama 3.1 to 3.3 were trained on: a first message that says the dates, then role and text of each message.
LLAMA3_TEMPLATE = r"""
{%- macro text(content) -%}
    {{- (content if content is string else content | map(attribute="text") | join) | trim -}}
{%- endmacro -%}
{%- macro refuse_tools() -%}
    {{- raise_exception("the built-in template of Llama 3 has no tools; give the checkpoint's own template") -}}
{%- endmacro -%}
{%- macro turn(role, text) -%}
    {{- "<|start_header_id|>" ~ role ~ "<|end_header_id|>\n\n" ~ text ~ "<|eot_id|>" -}}
{%- endmacro -%}
{%- if tools -%}
    {{- refuse_tools() -}}
{%- endif -%}
{%- set has_system = messages[0].role == "system" -%}
{%- set today = date_string | default("26 Jul 2024") -%}
{%- set dates = "Cutting Knowledge Date: December 2023\nToday Date: " ~ today ~ "\n\n" -%}
{{- bos_token ~ turn("system", dates ~ (text(messages[0].content) if has_system else "")) -}}
{%- for message in (messages[1:] if has_system else messages) -%}
    {%- if message.tool_calls is defined or message.role in ("tool", "ipython") -%}
        {{- refuse_tools() -}}
    {%- endif -%}
    {{- turn(message.role, text(message.content)) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template; instances are immutable and may be shared by threads."""

    source: str
    tokens: Mapping[str, str]  # variables of the template: `bos_token`, ... -> the token's text
    code: types.CodeType = field(repr=False, compare=False)
    for_tools: "ChatTemplate | None" = None  # taken instead when a request has tools


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer, and what rendering needs to know of them; made by `of`."""

    ids: Mapping[str, int]  # by their texts
    pattern: re.Pattern[str]  # matches any of them; of two that match, the longer one
    names: frozenset[str]  # without signs around them: eot_id of <|eot_id|>
    ways: tuple[frozenset[str], ...]  # which characters to mark: the first way that works is taken

    @staticmethod
    def of(ids: Mapping[str, int]) -> "SpecialTokens":
        pattern = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        names = frozenset(re.sub(r"^\W+|\W+$", "", text) for text in ids)
        return SpecialTokens(dict(ids), re.compile(pattern or "(?!)"), names, tuple(_ways_to_mark(ids)))


class Piece(NamedTuple):
    """A part of a rendered chat."""

    text: str
    special: bool  # whether special tokens written in it are the template's, and are to be recognised


def load_chat_template(
    folder: str | os.PathLike, override: str | os.PathLike | None = None, name: str | None = None
) -> ChatTemplate | None:
    """The chat template of a checkpoint folder, None when it has none, as base models.

    As in transformers 5, chat_template.jinja and additional_chat_templates/ come before tokenizer_config.json; between
    them chat_template.json, which transformers reads for processors only. A folder of Meta's (params.json) with
    Llama 3's tokenizer.model and none of these gets the format of Llama 3.1, 3.2 and 3.3 without tools. Meta's files do
    not say whether a model is a base model, so it gets it too.

    Args:
        folder: of the checkpoint.
        override: taken instead of the folder's: a template's text, or the path of a file that holds one. A string
            with a brace is a text.
        name: which of a folder's templates is meant. None for the one called default, which gives way to
            the one called tool_use, if there is any, when a request has tools.

    Raises TokenizerError, naming the file, when one is malformed, too large, or not a template that can be compiled.
    """
    folder = Path(folder)
    tokens = _token_variables(folder)
    if override is not None:
        is_text = isinstance(override, str) and "{" in override
        return compile_chat_template(override if is_text else _read_text(Path(override)), tokens)
    sources, where = _sources(folder)
    if not sources:
        if name is not None:
            raise TokenizerError(f"{folder} has no chat template, but the one named {name!r} was asked for.")
        if not _is_meta_llama3(folder):
            return None
        return compile_chat_template(LLAMA3_TEMPLATE, {"bos_token": BOS, "eos_token": "<|eot_id|>"})
    wanted = "default" if name is None else name
    if wanted not in sources:
        raise TokenizerError(f"{where} has no chat template named {wanted!r}; it has {sorted(sources)}.")
    for_tools = None
    if name is None and "tool_use" in sources:
        for_tools = compile_chat_template(sources["tool_use"], tokens, where)
    return compile_chat_template(sources[wanted], tokens, where, for_tools)


def compile_chat_template(
    source: str,
    tokens: Mapping[str, str] | None = None,
    where: str | os.PathLike = "the chat template",
    for_tools: ChatTemplate | None = None,
) -> ChatTemplate:
    """A template from its text; `where` is for messages. Raises TokenizerError when it is none."""
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE_CHARS:
        raise TokenizerError(f"{where}: a chat template must be a text of at most {MAX_TEMPLATE_CHARS} characters.")
    environment = _Sandbox(_Budget())
    try:
        tree = _Bounding().visit(environment.parse(source))
        tree.set_environment(environment)
        code = environment.compile(tree)
    except jinja2.TemplateSyntaxError as e:
        raise TokenizerError(f"{where}, line {e.lineno}: {e.message}; expected a jinja2 template.") from None
    except ShardedLlamaError as e:
        raise TokenizerError(f"{where} cannot be compiled: {e}") from None
    except Exception as e:  # nested too deeply, numbers too long: whatever parser and compiler stumble over
        raise TokenizerError(f"{where} cannot be compiled: {type(e).__name__}: {e}.") from e
    return ChatTemplate(source, dict(tokens or {}), code, for_tools)


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """The tokenizer's special tokens. Goes through the whole vocabulary: 0.1 s for Llama 3's."""
    tokens = {}
    for i in range(tokenizer.vocab_size):
        if tokenizer.kind(i) is TokenKind.SKIPPED:
            text = tokenizer.decode([i], skip_special=False)
            if text and i in tokenizer.encode(text, special=True):
                tokens[text] = i
    return SpecialTokens.of(tokens)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    special: SpecialTokens | None = None,
    **options: Any,
) -> list[int]:
    """Token ids of a conversation, with BOS exactly once if the template writes it or the tokenizer adds it.

    Args:
        tokenizer: of the model.
        template: of the model.
        messages: see `render`, which `options` go to as well.
        special: `special_tokens(tokenizer)`, for those who call this more than once.

    Text of a caller that is spelled like a special token is encoded as the text it is. This holds for tokens that are
    special in the tokenizer's file; a tokenizer.json may have others, which it recognises in every text.

    Raises RequestError for messages that cannot be rendered, or not safely.
    """
    special = special_tokens(tokenizer) if special is None else special
    pieces = render(template, messages, special=special, **options)
    ids = [i for piece in pieces for i in tokenizer.encode(piece.text, special=piece.special)]
    # The tokenizer may know more ways to write a special token than its text, such as look-alike letters. The unknown
    # token is another matter: plain text can give it.
    expected = Counter(special.ids[m.group()] for p in pieces if p.special for m in special.pattern.finditer(p.text))
    looked_for = set(special.ids.values()) - set(tokenizer.encode("\U0010fffd"))
    if Counter(i for i in ids if i in looked_for) - expected:
        raise RequestError("the messages have text that the tokenizer would take for a special token; leave it out.")
    return with_bos(ids, tokenizer.bos_id) if tokenizer.adds_bos else ids


def render(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    special: SpecialTokens,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    date: datetime | None = None,
    variables: Mapping[str, Any] | None = None,
) -> tuple[Piece, ...]:
    """The text that a template makes of a conversation, in pieces that are to be encoded one by one.

    Args:
        template: of the model.
        messages: one or more; each has a `role`, and as `content` a string or a list of {"type": "text", "text": ...}.
            A message with `tool_calls` may go without. Other fields are passed on; what is None is left out.
        special: those of the tokenizer, by `special_tokens`.
        add_generation_prompt: end with what starts an answer.
        continue_final_message: end inside the last message instead, for the model to continue it.
        tools: JSON schemas of functions.
        date: what the template's `strftime_now` tells; the time of the call if None.
        variables: more variables of the template, such as `date_string`. They may come from a caller; those that the
            template relies on cannot be replaced.

    The pieces' texts, joined, are what transformers' `apply_chat_template(tokenize=False)` returns.

    Raises RequestError, naming the message or field, for what is malformed or too large; when the template refuses the
    messages, fails, or exceeds its budget; and when a text in the messages is spelled like a special token and
    the template works on the texts in such a way that the two cannot be told apart.
    """
    chat = _checked_chat(messages, tools, variables, template, special.names)
    if continue_final_message and add_generation_prompt:
        raise RequestError("continue_final_message needs add_generation_prompt=False: the answer has begun already.")
    if template.for_tools is not None and tools is not None:
        template = template.for_tools
    now = datetime.now() if date is None else date
    used = set(template.source).union(*_strings(chat), *special.ways)
    end = next(c for c in MARKS if c not in used) if continue_final_message else ""
    if end:
        chat = _with_end(chat, template, end)
    run = functools.partial(_run, template, now=now, add_generation_prompt=add_generation_prompt)
    text = run(chat)
    used.update(text)
    free = list(itertools.islice((c for c in MARKS if c not in used), MAX_MARKED))
    for chars in special.ways:
        marks = dict(zip(sorted(chars), free, strict=False))
        if len(marks) < len(chars):
            continue
        try:
            marked = run(_marked(chat, marks, special.names), marks=marks)
        except RequestError:
            continue  # a template that understands the marked messages less than the others
        if marked.translate(str.maketrans({mark: c for c, mark in marks.items()})) == text:
            stop = _end_of(text, end, chat) if end else len(text)
            return _pieces(text[:stop], marked[:stop], special.pattern)
    raise RequestError(
        "the messages have characters of special tokens, and the chat template works on the texts in a way that leaves "
        f"open which special tokens are its own; leave out texts like {min(special.ids, default='')!r}."
    )


def _pieces(text: str, marked: str, pattern: re.Pattern[str]) -> tuple[Piece, ...]:
    """Cuts out what lies between two special tokens of the template and is spelled like one."""
    pieces, start, at = [], 0, 0  # text[start:at] needs no cut
    for stop, after in [*(m.span() for m in pattern.finditer(marked)), (len(text), len(text))]:
        if pattern.search(text, at, stop):
            pieces += [Piece(text[start:at], True), Piece(text[at:stop], False)]
            start = stop
        at = after
    pieces.append(Piece(text[start:], True))
    return tuple(piece for piece in pieces if piece.text)


# The caller's side: what is taken, and how it is marked.


def _checked_chat(
    messages: Any, tools: Any, variables: Any, template: ChatTemplate, names: Collection[str]
) -> dict[str, Any]:
    """Copies of what the caller sent, of nothing but JSON's types: `messages`, `tools`, and the `variables`."""
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


def _strings(value: Any) -> Iterator[str]:
    """Every string in a checked value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _ways_to_mark(special: Collection[str]) -> Iterator[frozenset[str]]:
    """Which characters to mark, from all that can be to the fewest that are part of every special token.

    Never white space, which templates trim, nor quotes and backslashes, which `tojson` escapes, unless a special token
    has them.
    """
    letters = frozenset("".join(special)) - set(" \t\r\n")
    yield letters | {chr(i) for i in range(0x21, 0x7F)} - set("\"'\\")
    signs = frozenset(c for c in letters if not c.isalnum())
    yield signs
    few, left = frozenset(), [token for token in special if token.strip(" \t\r\n")]
    while left:
        # Of equal ones, one that ordinary text and the logic of templates have less often.
        usual = "</>_-.\"'\\"
        choice = sorted(signs & set("".join(left))) or sorted(letters & set("".join(left)))
        few |= {max(choice, key=lambda c: (sum(c in token for token in left), c not in usual))}
        left = [token for token in left if not few & set(token)]
    yield few


def _marked(chat: dict[str, Any], marks: Mapping[str, str], names: Collection[str]) -> dict[str, Any]:
    """The chat with marks for characters, but not in words that templates ask for: roles, types, names of fields."""
    table = str.maketrans(dict(marks))

    def word(text: str) -> str:
        return text if text.isidentifier() and text not in names else text.translate(table)

    def mark(value: Any, name: str = "") -> Any:
        if isinstance(value, str):
            return word(value) if name == "type" else value.translate(table)
        if isinstance(value, dict):
            return {word(key): mark(item, key) for key, item in value.items()}
        return [mark(item) for item in value] if isinstance(value, list) else value

    messages = [mark(message) | {"role": message["role"]} for message in chat["messages"]]
    rest = {name: mark(value) for name, value in chat.items() if name != "messages"}
    return rest | {"messages": messages}


def _with_end(chat: dict[str, Any], template: ChatTemplate, end: str) -> dict[str, Any]:
    """The chat with a character at the end of its last message, and a space to tell whether the template trims."""
    *others, last = chat["messages"]
    content = last.get("content")
    if content is None or "content" not in template.source:
        raise RequestError("continue_final_message: the last message has no content, or the template does not use it.")
    if isinstance(content, list):
        if not content:
            raise RequestError("continue_final_message: the last message's content is an empty list.")
        content = [*content[:-1], content[-1] | {"text": content[-1]["text"] + end + " "}]
    else:
        content += end + " "
    return chat | {"messages": [*others, last | {"content": content}]}


def _end_of(text: str, end: str, chat: dict[str, Any]) -> int:
    """Where the text is to be cut for its last message to be continued."""
    content = chat["messages"][-1]["content"]
    said = (content[-1]["text"] if isinstance(content, list) else content)[:-2]
    at = text.rfind(end)
    if at < 0 or said.strip() not in text:
        raise RequestError("continue_final_message: the template leaves out the last message, or rewrites it.")
    return at if text.startswith(end + " ", at) else len(text[:at].rstrip())


# The template's side: the sandbox and its budget.


def _run(
    template: ChatTemplate,
    chat: Mapping[str, Any],
    *,
    now: datetime,
    add_generation_prompt: bool,
    marks: Mapping[str, str] | None = None,
) -> str:
    """What the template makes of a checked chat."""
    budget = _Budget()
    environment = _Sandbox(budget, now, marks or {})
    variables = {**template.tokens, **chat, "add_generation_prompt": add_generation_prompt}
    try:
        for value in variables.values():
            budget.checked(value)
        compiled = jinja2.Template.from_code(environment, template.code, environment.make_globals(None))
        parts, chars = [], 0
        for part in compiled.generate(variables):
            parts.append(part)
            chars += len(part)
            budget.spend(len(part))
            if chars > MAX_VALUE:
                raise RequestError(f"the chat template made more than {MAX_VALUE} characters of the messages.")
        return "".join(parts)
    except ShardedLlamaError:
        raise
    except _Refusal as e:
        raise RequestError(f"the chat template refuses the messages: {e}.") from None
    except Exception as e:  # whatever a template can do wrong
        raise RequestError(f"the chat template failed: {type(e).__name__}: {str(e)[:500]}.") from e


class _Refusal(Exception):
    """What a template says by `raise_exception`."""


class _Budget:
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
        _allow(self.size(value))
        self.spend(len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0)
        return value

    def size(self, value: Any) -> int:
        """Characters and items, nested ones included and counted as often as they are reached.

        Values are made of others that are measured already, so this looks no deeper than what is new. Iterators are
        one item: what they give is measured where it is kept. Raises RequestError for what is nested too deeply, or a
        number too large.
        """
        return self._measure(value)[0]

    def _measure(self, value: Any) -> tuple[int, int]:
        """Size and depth of a value."""
        if isinstance(value, int) and value.bit_length() > MAX_VALUE_INT_BITS:
            raise RequestError("the chat template makes numbers that are too large.")
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


def _allow(size: int) -> None:
    if size > MAX_VALUE:
        raise RequestError(f"the chat template makes a value of more than {MAX_VALUE} characters or items.")


class _Names(Namespace):
    """jinja2's namespace, without names that mean something to Python, and without its content when written out."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a name may be `self`
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} is not a name for a namespace")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, by which templates mark what the model says. It changes nothing here."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
LOOP, MADE, JOINED = "a loop", "a value", "a text"  # filters that no template can name


class _Bounding(NodeTransformer):
    """Puts a look at the budget into loops, and where a value is made that the sandbox does not see."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        texts = [d.data for n in node.body for d in _all(n, nodes.TemplateData)]
        texts += [c.value for n in node.body for c in _all(n, nodes.Const) if isinstance(c.value, str)]
        node.iter = _filter(LOOP, node.iter, nodes.Const(sum(map(len, texts))))
        return node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _filter(MADE, node)

    visit_Tuple = visit_Dict = visit_List

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(JOINED, nodes.List(node.nodes, lineno=node.lineno))

    def visit_Block(self, node: nodes.Node) -> nodes.Node:
        name = type(node).__name__.lower()
        raise jinja2.TemplateSyntaxError(f"{name} is not available in chat templates", node.lineno)

    visit_Extends = visit_Include = visit_Import = visit_FromImport = visit_Block
    visit_ScopedEvalContextModifier = visit_EvalContextModifier = visit_Block


def _all(node: nodes.Node, kind: type[nodes.Node]) -> Iterable[Any]:
    return [node] if isinstance(node, kind) else node.find_all(kind)


def _filter(name: str, node: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    for arg in args:
        arg.set_lineno(node.lineno)
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Of jinja2's filters, those with results of about the size of their input.
PLAIN_FILTERS = _words(
    "abs attr capitalize count d default dictsort first float groupby int items last length list lower map max min "
    "reject rejectattr reverse select selectattr sort string title trim truncate unique upper urlencode wordcount"
)

# And of the methods of values. Those of other types are refused, but for what jinja2 itself gives to templates.
METHODS: dict[type, frozenset[str]] = {
    str: _words(
        "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit "
        "isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition "
        "removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith "
        "strip swapcase title upper zfill"
    ),
    dict: _words("copy get items keys values"),
    list: _words("copy count index"),
    tuple: _words("count index"),
}


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering: what transformers offers to templates, each use of it out of the budget."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, budget: _Budget, now: datetime | None = None, marks: Mapping[str, str] | None = None) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=budget.checked,
            extensions=[jinja2.ext.loopcontrols, _Generation],
        )
        self._budget = budget
        self._now = now
        self._escaped = {json.dumps(mark)[1:-1]: mark for mark in (marks or {}).values()}
        filters = {name: FILTERS[name] for name in PLAIN_FILTERS}
        filters |= {"format": _format, "indent": _indent, "join": self._join, "replace": _replace, "round": _round}
        filters |= {"e": _escape, "escape": _escape, "safe": str, "sum": _sum, "tojson": self._tojson}
        self.filters = {name: self._bounded(function) for name, function in filters.items()}
        self.filters |= {LOOP: self._loop, MADE: budget.checked, JOINED: self._concatenate}
        self.globals = {name: self.globals[name] for name in ("range", "cycler", "joiner")} | {
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Names,
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime_now,
        }

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._budget.spend()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._budget.spend()
        item = super().getitem(obj, argument)
        return self._budget.checked(item) if isinstance(argument, slice) else item

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # jinja2 gives an undefined value, which is written out as nothing.
        raise jinja2.exceptions.SecurityError(f"chat templates cannot have {attribute} of a {type(obj).__name__}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._budget.spend()
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, bytes, list, tuple)) and isinstance(times, int):
                    _allow(len(many) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _allow_number(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        return self._budget.checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # a name may be `self`
        budget = __self._budget
        for value in (*args, *kwargs.values()):
            budget.checked(value)
        if isinstance(__obj, types.BuiltinMethodType):
            _check_method(__obj, args, kwargs)
        return budget.checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        template = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            # A width may be a field of its own, whose number is not known here.
            if re.search(r":[^{}:]*(\{|\d{4})", template):
                raise RequestError("the chat template formats to a width that is too large, or not known.")
            _allow(len(template) + template.count("{") * self._budget.size([*args, *kwargs.values()]))
            return wrapped(*args, **kwargs)

        return bounded

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._budget.spend()
            return self._budget.checked(function(*args, **kwargs))

        call.__dict__.update(getattr(function, "__dict__", {}))  # jinja2's note of what the filter wants to be passed
        return call

    def _loop(self, items: Iterable[Any], text: int) -> Iterator[Any]:
        """`text`: characters of the loop's body."""
        for item in items:
            self._budget.spend(text)
            yield item

    def _concatenate(self, values: list[Any]) -> str:
        return self._joined("", values)

    def _join(self, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        return self._joined(str(d), value if attribute is None else map(make_attrgetter(self, attribute), value))

    def _joined(self, separator: str, values: Iterable[Any]) -> str:
        parts, size = [], 0
        for value in values:
            parts.append(str(value))
            size += len(parts[-1]) + len(separator)
            _allow(size)
            self._budget.spend(len(parts[-1]) + len(separator))
        return separator.join(parts)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        if (len(indent) if isinstance(indent, str) else indent or 0) > 16:
            raise RequestError("the chat template indents JSON by more than 16 characters.")
        for separator in separators or ():
            _allow(len(separator) * MAX_WIDTH)
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators and tuple(separators), sort_keys=sort_keys
        )
        text = self._joined("", encoder.iterencode(value))
        # A mark stands for a character that is not escaped.
        return re.sub(r"\\u[ef][0-9a-f]{3}", lambda m: self._escaped.get(m[0], m[0]), text) if ensure_ascii else text

    def _strftime_now(self, format: str) -> str:
        if not isinstance(format, str) or len(format) > 100:
            raise RequestError("the chat template asks for the date in a format of more than 100 characters.")
        return (datetime.now() if self._now is None else self._now).strftime(format)


def _raise_exception(message: Any) -> None:
    raise _Refusal(str(message)[:500])


def _check_method(method: types.BuiltinMethodType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises for methods that templates do not have, and before those that would make too large a value."""
    owner, name = method.__self__, method.__name__
    if not any(isinstance(owner, kind) and name in names for kind, names in METHODS.items()):
        raise jinja2.exceptions.SecurityError(f"chat templates cannot call {name} of a {type(owner).__name__}")
    if name in ("center", "expandtabs", "ljust", "rjust", "zfill"):
        for width in (*args, *kwargs.values()):
            if isinstance(width, int) and width > MAX_WIDTH:
                raise RequestError(f"the chat template pads to more than {MAX_WIDTH} characters.")
        _allow(len(owner) * (MAX_WIDTH if name == "expandtabs" and "\t" in owner else 1))
    elif name == "replace" and len(args) >= 2:
        _allow_replacing(owner, *args[:2])
    elif name == "join" and args and isinstance(args[0], (str, list, tuple, dict)):
        _allow(len(owner) * len(args[0]))
    elif name == "join":
        raise RequestError("the chat template joins what is no list; it would have to make one by the filter `list`.")


def _allow_number(bits: int) -> None:
    if bits > MAX_VALUE_INT_BITS:
        raise RequestError("the chat template makes numbers that are too large.")


def _allow_replacing(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        _allow(len(text) + text.count(old) * len(new))


def _check_format(template: str, values: Any) -> None:
    """Raises for printf's formats when what they make may be too large."""
    if re.search(r"%[^a-zA-Z%]*(\d{4}|\*)", template):
        raise RequestError("the chat template formats to a width that is too large, or not known.")
    values = values if isinstance(values, (tuple, list)) else [values]
    _allow(len(template) + sum(len(str(value)) for value in values) * max(1, template.count("%(")))


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    template = str(value)
    _check_format(template, [*args, *kwargs.values()])
    return template % (kwargs or args)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    size = len(width) if isinstance(width, str) else width
    if size > MAX_WIDTH:
        raise RequestError(f"the chat template indents by more than {MAX_WIDTH} characters.")
    _allow(len(str(s)) + size * (len(str(s).splitlines()) + 1))
    return FILTERS["indent"](str(s), width, first, blank)


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    s, old, new = str(s), str(old), str(new)
    _allow_replacing(s, old, new)
    return s.replace(old, new, -1 if count is None else count)


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > 100:
        raise RequestError("the chat template rounds to more than 100 digits.")
    return FILTERS["round"](value, precision, method)


def _escape(value: Any) -> str:
    return str(escape(str(value)))


@jinja2.pass_environment
def _sum(environment: Any, iterable: Iterable[Any], attribute: str | int | None = None, start: float = 0) -> float:
    # Lists could be added up as well, in a time that is quadratic.
    if not isinstance(start, (int, float)):
        raise RequestError("the chat template sums up what is no number.")
    return sum(iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable), start)


# Files.


def _sources(folder: Path) -> tuple[dict[str, str], Path]:
    """Name -> text of the templates in a folder, and the file or folder that they are from."""
    files = {"default": folder / "chat_template.jinja"} if (folder / "chat_template.jinja").is_file() else {}
    more = folder / "additional_chat_templates"
    files |= {file.stem: file for file in sorted(more.glob("*.jinja"))[: MAX_TEMPLATES + 1]} if more.is_dir() else {}
    if len(files) > MAX_TEMPLATES:
        raise TokenizerError(f"{more} has more than {MAX_TEMPLATES} chat templates.")
    if files:
        return {name: _read_text(file) for name, file in files.items()}, files.get("default", more)
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = folder / name
        templates = read_json_object(file, TokenizerError).get("chat_template") if file.is_file() else None
        if templates is not None:
            return _named(templates, file), file
    return {}, folder


def _named(templates: Any, file: Path) -> dict[str, str]:
    """Templates as a JSON file holds them: a text, a list of {"name", "template"}, or an object of name: text."""
    if isinstance(templates, str):
        return {"default": templates}
    if isinstance(templates, list) and all(isinstance(t, dict) for t in templates):
        templates = {t.get("name"): t.get("template") for t in templates}
    if not isinstance(templates, dict) or not 0 < len(templates) <= MAX_TEMPLATES:
        raise TokenizerError(f"{file}: chat_template must be a text, or 1 to {MAX_TEMPLATES} named ones.")
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in templates.items()):
        raise TokenizerError(f"{file}: each item of chat_template must have a name and a template, both texts.")
    return templates


def _read_text(file: Path) -> str:
    try:
        if not file.is_file():
            raise TokenizerError(f"{file} is not a file; expected a chat template.")
        with open(file, "rb") as stream:
            content = stream.read(4 * MAX_TEMPLATE_CHARS + 1)
        # As Python's text files give it, and jinja2 in its turn.
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError) as e:
        raise TokenizerError(f"{file} cannot be read as text in UTF-8: {e}.") from None


def _token_variables(folder: Path) -> dict[str, str]:
    """The special tokens that a folder's files name. As in transformers, the newer file goes first."""
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        content = read_json_object(file, TokenizerError) if file.is_file() else {}
        named |= {key: content[key] for key in TOKEN_VARIABLES if content.get(key)}
    tokens = {}
    for key, token in named.items():
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str) or len(text) > MAX_TOKEN_CHARS:
            raise TokenizerError(f"{folder}: {key} must be a text of at most {MAX_TOKEN_CHARS} characters.")
        tokens[key] = text
    return tokens


def _is_meta_llama3(folder: Path) -> bool:
    model = folder / "tokenizer.model"
    return (folder / "params.json").is_file() and model.is_file() and not is_sentencepiece(model)
