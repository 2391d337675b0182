"""The tokens that a comparison runs on."""

import numpy as np

from ..config import LlamaConfig
from ..engine.loading import encode_text
from ..errors import ParityError
from ..tokenizer import Tokenizer

DEFAULT_PROMPTS = (
    "The quick brown fox jumps over the lazy dog, 3.14159 times a day.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1)",
)
RANDOM_SHAPE = (2, 24)


def encode_rows(prompts: tuple[str, ...] | list[str], tokenizer: Tokenizer, config: LlamaConfig) -> np.ndarray:
    """Token ids (B, L) of prompts as the engine encodes them; shorter ones go on from their start.

    So every position of every row is an ordinary one, and all are compared.
    """
    rows = [encode_text(tokenizer, config, prompt) for prompt in prompts]
    return np.stack([np.resize(row, max(map(len, rows))) for row in rows])


def random_tokens(config: LlamaConfig) -> np.ndarray:
    """Token ids (B, L) for a model that has no tokenizer, always the same."""
    return np.random.default_rng(0).integers(0, config.vocab_size, RANDOM_SHAPE)


def check_tokens(config: LlamaConfig, tokens_BL: np.ndarray, new_tokens: int) -> None:
    """Raises ParityError for tokens that the model cannot take, or that leave no room for `new_tokens` more."""
    if tokens_BL.ndim != 2 or not tokens_BL.size:
        raise ParityError(f"expected a (rows, length) array of tokens, got shape {tokens_BL.shape}.")
    wrong = tokens_BL[(tokens_BL < 0) | (tokens_BL >= config.vocab_size)]
    if wrong.size:
        raise ParityError(f"{wrong[0]} is no token id of the model; they are 0 to {config.vocab_size - 1}.")
    length = tokens_BL.shape[1]
    if length + new_tokens > config.max_seq_len:
        raise ParityError(
            f"the prompt of {length} tokens and {new_tokens} new ones do not fit the model's context of "
            f"{config.max_seq_len}: shorten the prompt or the continuation."
        )
