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
from .hf import HFTokenizer
from .stream import StreamDecoder

__all__ = ["StreamDecoder", "TokenKind", "Tokenizer", "load_tokenizer"]


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a checkpoint folder, read from its tokenizer.json.

    Raises TokenizerError, naming the folder, when there is none that can be read.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return HFTokenizer(folder)
    if (folder / "tokenizer.model").is_file():
        raise TokenizerError(
            f"{folder} has only a tokenizer.model, which is not supported yet; convert it to a tokenizer.json "
            "with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    if not folder.is_dir():
        raise TokenizerError(f"{folder} is not a folder; expected that of a checkpoint, with a tokenizer.json.")
    raise TokenizerError(f"{folder} has no tokenizer.json; copy it there from the checkpoint's source.")
