"""Answers as a model at high temperature would draw them: any token that the mask permits."""

import random

import numpy as np

from sharded_llama.constraints import Grammar
from sharded_llama.tokenizer import Tokenizer

# Once an answer is long enough, the first of these that is permitted; they close what is open.
CLOSING = ('"', "}", "]", ")", ",", ":")
LONGEST = 300


def tokens_of(words_W: np.ndarray) -> list[int]:
    """The tokens of a mask."""
    return np.flatnonzero(np.unpackbits(words_W.astype("<u4").view(np.uint8), bitorder="little")).tolist()


def random_answer(
    grammar: Grammar, tokenizer: Tokenizer, vocab_size: int, eos: int, rng: random.Random, free: int = 25
) -> str | None:
    """The text of an answer that `eos` ended: `free` tokens drawn evenly, then closing ones. None: it got too long."""
    closing = [ids[0] for text in CLOSING if len(ids := tokenizer.encode(text)) == 1]
    matcher = grammar.start()
    words_W = np.zeros(-(-vocab_size // 32), np.uint32)
    answer: list[int] = []
    while len(answer) < LONGEST:
        matcher.mask(words_W)
        permitted = tokens_of(words_W)
        token = rng.choice(permitted)
        # Now and then early too, or an even draw from the vocabulary would hardly ever leave the first string.
        if len(answer) >= free or rng.random() < 0.3:
            token = next((t for t in (eos, *closing) if t in permitted), token)
        matcher.accept(token)
        if token == eos:
            assert matcher.finished
            return tokenizer.decode(answer)
        answer.append(token)
    return None
