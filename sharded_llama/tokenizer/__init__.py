"""Tokenizers: text to token ids, and token ids to text as they come.

tokenizer = load_tokenizer(checkpoint_folder)
ids = tokenizer.encode("Hello", bos=tokenizer.adds_bos)

decoder = StreamDecoder(tokenizer)
text = decoder.push(ids) + decoder.flush()
"""

import os
from pathlib import Path

from ..errors import TokenizerError
from .base import Tokenizer, TokenKind
from .chat import ChatTemplate, encode_chat, load_chat_template, special_tokens
from .convert import is_sentencepiece
from .hf import HFTokenizer
from .llama2 import Llama2Tokenizer
from .llama3 import Llama3Tokenizer
from .stream import StreamDecoder

__all__ = [
    "ChatTemplate",
    "StreamDecoder",
    "TokenKind",
    "Tokenizer",
    "encode_chat",
    "load_chat_template",
    "load_tokenizer",
    "special_tokens",
    "tokenizer_files",
]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a checkpoint folder, from its tokenizer.json or else from its tokenizer.model.

    A folder with Meta's params.json may also have the tokenizer.model beside it, in the parent folder, where Meta's
    download of Llama 2 puts it. Raises TokenizerError, naming the folder, when there is none that can be read.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return HFTokenizer(folder)
    for file in tokenizer_files(folder):
        if file.name == "tokenizer.model":
            return Llama2Tokenizer(file) if is_sentencepiece(file) else Llama3Tokenizer(file)
    if not folder.is_dir():
        raise TokenizerError(
            f"{folder} is not a folder; expected that of a checkpoint, with a tokenizer.json or tokenizer.model."
        )
    raise TokenizerError(
        f"{folder} has no tokenizer.json and no tokenizer.model; copy one there from the checkpoint's source."
    )


def tokenizer_files(folder: str | os.PathLike) -> list[Path]:
    """The files of a checkpoint folder that belong to its tokenizer; of Meta's Llama 2 that in the parent folder."""
    folder = Path(folder)
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    has_vocabulary = any(file.name in ("tokenizer.json", "tokenizer.model") for file in files)
    beside = folder.parent / "tokenizer.model"
    if not has_vocabulary and (folder / "params.json").is_file() and beside.is_file():
        files.append(beside)
    return files
