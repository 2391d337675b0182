"""Chat templates: messages to the token ids that a chat model was trained on.

template = load_chat_template(checkpoint_folder)
ids = encode_chat(tokenizer, template, [{"role": "user", "content": "Hello"}])

Text and ids are those of transformers' `apply_chat_template`, but for two things. What a caller wrote never becomes a
special token, and BOS comes exactly once.

Where a template comes from: files, builtin. What it is and what it may do: template, syntax, sandbox, filters, budget.
What a caller may send: messages, continuation. Whose the special tokens are: forging. All together: encode.
"""

from .encode import encode_chat, render
from .files import load_chat_template
from .forging import Piece, SpecialTokens, special_tokens
from .template import ChatTemplate, compile_chat_template

__all__ = [
    "ChatTemplate",
    "Piece",
    "SpecialTokens",
    "compile_chat_template",
    "encode_chat",
    "load_chat_template",
    "render",
    "special_tokens",
]
