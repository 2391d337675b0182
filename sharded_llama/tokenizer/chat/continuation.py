"""A last message that the model is to continue: its end is marked, and the rendered text is cut there."""

from typing import Any

from ...errors import RequestError
from .template import ChatTemplate


def with_end(chat: dict[str, Any], template: ChatTemplate, end: str) -> dict[str, Any]:
    """The chat with a character at the end of its last message, and a space to tell whether the template trims.

    Raises RequestError when there is nothing to be continued.
    """
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


def end_of(text: str, end: str, chat: dict[str, Any]) -> int:
    """Where the text of a chat `with_end` is to be cut. Raises RequestError when the template rewrote the message."""
    content = chat["messages"][-1]["content"]
    said = (content[-1]["text"] if isinstance(content, list) else content)[:-2]
    at = text.rfind(end)
    if at < 0 or said.strip() not in text:
        raise RequestError("continue_final_message: the template leaves out the last message, or rewrites it.")
    return at if text.startswith(end + " ", at) else len(text[:at].rstrip())
