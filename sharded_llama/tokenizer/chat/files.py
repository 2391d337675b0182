"""The chat template of a checkpoint folder."""

import os
from pathlib import Path
from typing import Any

from ...errors import TokenizerError
from ...json_file import read_json_object
from ..convert import is_sentencepiece
from ..llama3 import BOS
from .builtin import LLAMA3_TEMPLATE
from .template import MAX_TEMPLATE_CHARS, TOKEN_VARIABLES, ChatTemplate, compile_chat_template

MAX_TEMPLATES = 32  # in one folder
MAX_TOKEN_CHARS = 256  # of a special token that tokenizer_config.json names


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
