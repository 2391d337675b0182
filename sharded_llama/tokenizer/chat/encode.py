"""A conversation to its text and token ids."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ...errors import RequestError
from ..base import Tokenizer
from ..common import with_bos
from .continuation import end_of, with_end
from .forging import Piece, SpecialTokens, cut_pieces, free_marks, special_tokens, with_marks
from .messages import checked_chat, strings
from .template import ChatTemplate, run_template


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
    chat = checked_chat(messages, tools, variables, template, special.names)
    if continue_final_message and add_generation_prompt:
        raise RequestError("continue_final_message needs add_generation_prompt=False: the answer has begun already.")
    if template.for_tools is not None and tools is not None:
        template = template.for_tools
    now = datetime.now() if date is None else date
    used = set(template.source).union(*strings(chat), *special.ways)
    end = ""
    if continue_final_message:
        if not (free := free_marks(used)):
            raise RequestError("continue_final_message: the messages have every character of U+E000 to U+F8FF.")
        end = free[0]
        chat = with_end(chat, template, end)
    run = functools.partial(run_template, template, now=now, add_generation_prompt=add_generation_prompt)
    text = run(chat)
    free = free_marks(used | set(text))
    for chars in special.ways:
        marks = dict(zip(sorted(chars), free, strict=False))
        if len(marks) < len(chars):
            continue
        try:
            marked = run(with_marks(chat, marks, special.names), marks=marks)
        except RequestError:
            continue  # a template that understands the marked messages less than the others
        if marked.translate(str.maketrans({mark: c for c, mark in marks.items()})) == text:
            stop = end_of(text, end, chat) if end else len(text)
            return cut_pieces(text[:stop], marked[:stop], special.pattern)
    raise RequestError(
        "the messages have characters of special tokens, and the chat template works on the texts in a way that leaves "
        f"open which special tokens are its own; leave out texts like {min(special.ids, default='')!r}."
    )
