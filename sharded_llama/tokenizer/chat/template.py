"""A compiled chat template, and running it."""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from os import PathLike
from typing import Any

import jinja2

from ...errors import RequestError, ShardedLlamaError, TokenizerError
from .budget import Budget
from .sandbox import Refusal, Sandbox
from .syntax import Bounding

MAX_TEMPLATE_CHARS = 1 << 17  # published ones have up to about 20,000
TOKEN_VARIABLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template; instances are immutable and may be shared by threads."""

    source: str
    tokens: Mapping[str, str]  # variables of the template: `bos_token`, ... -> the token's text
    code: types.CodeType = field(repr=False, compare=False)
    for_tools: "ChatTemplate | None" = None  # taken instead when a request has tools


def compile_chat_template(
    source: str,
    tokens: Mapping[str, str] | None = None,
    where: str | PathLike = "the chat template",
    for_tools: ChatTemplate | None = None,
) -> ChatTemplate:
    """A template from its text; `where` is for messages. Raises TokenizerError when it is none."""
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE_CHARS:
        raise TokenizerError(f"{where}: a chat template must be a text of at most {MAX_TEMPLATE_CHARS} characters.")
    environment = Sandbox(Budget())
    try:
        tree = Bounding().visit(environment.parse(source))
        tree.set_environment(environment)
        code = environment.compile(tree)
    except jinja2.TemplateSyntaxError as e:
        raise TokenizerError(f"{where}, line {e.lineno}: {e.message}; expected a jinja2 template.") from None
    except ShardedLlamaError as e:
        raise TokenizerError(f"{where} cannot be compiled: {e}") from None
    except Exception as e:  # nested too deeply, numbers too long: whatever parser and compiler stumble over
        raise TokenizerError(f"{where} cannot be compiled: {type(e).__name__}: {e}.") from e
    return ChatTemplate(source, dict(tokens or {}), code, for_tools)


def run_template(
    template: ChatTemplate,
    chat: Mapping[str, Any],
    *,
    now: datetime,
    add_generation_prompt: bool,
    marks: Mapping[str, str] | None = None,
) -> str:
    """What the template makes of a checked chat, whose strings may have `marks`' values for its keys.

    Raises RequestError when the template refuses the chat, fails, or exceeds its budget.
    """
    budget = Budget()
    environment = Sandbox(budget, now, marks or {})
    variables = {**template.tokens, **chat, "add_generation_prompt": add_generation_prompt}
    try:
        for value in variables.values():
            budget.checked(value)
        compiled = jinja2.Template.from_code(environment, template.code, environment.make_globals(None))
        return budget.output(compiled.generate(variables))
    except ShardedLlamaError:
        raise
    except Refusal as e:
        raise RequestError(f"the chat template refuses the messages: {e}.") from None
    except Exception as e:  # whatever a template can do wrong
        raise RequestError(f"the chat template failed: {type(e).__name__}: {str(e)[:500]}.") from e
