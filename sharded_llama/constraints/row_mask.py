"""The mask of one sequence: its grammar, its allowed tokens, its bad words and its least length together."""

from collections.abc import Iterable

import numpy as np

from ..errors import ConstraintError, RequestError
from ..sampling.params import SamplingParams
from ..tokenizer import Tokenizer
from . import bits
from .grammar import Grammar

NOTHING_LEFT = "no token is left: structured_outputs, allowed_token_ids and bad_words together permit none here."


def row_mask(
    params: SamplingParams,
    *,
    vocab_size: int,
    stop_ids: frozenset[int],
    tokenizer: Tokenizer | None,
    grammar: Grammar | None,
) -> "RowMask | None":
    """The mask of a sequence with these parameters, None when every token is always permitted.

    Args:
        params: allowed_token_ids, bad_words and min_tokens are read.
        vocab_size: of the model.
        stop_ids: tokens that end the answer: end-of-sequence and stop_token_ids.
        tokenizer: for bad_words.
        grammar: of structured_outputs.

    Raises RequestError for ids that the model does not have, bad words without a tokenizer, and where it is plain that
    no token would be left.
    """
    words = _bad_sequences(params.bad_words, tokenizer)
    single = [word[0] for word in words if len(word) == 1]
    usual_W = _allowed(params.allowed_token_ids, vocab_size) & ~bits.of_ids(single, vocab_size)
    early_W = usual_W & ~bits.of_ids(stop_ids if params.min_tokens else (), vocab_size)
    least = params.min_tokens if (early_W != usual_W).any() else 0
    if grammar is None and not words and params.allowed_token_ids is None and not least:
        return None
    if grammar is None and not early_W.any():
        raise RequestError("allowed_token_ids without any that bad_words and min_tokens permit.")
    if grammar is not None and not (usual_W & grammar.first_W).any():
        raise RequestError("allowed tokens without any that the grammar permits at the start of the answer.")
    sequences = [word for word in words if len(word) > 1 and max(word) < vocab_size]
    return RowMask(usual_W, early_W, least, sequences, grammar)


class RowMask:
    """What may come next in one sequence. Made by `row_mask`; belongs to that sequence alone.

    With a grammar, an answer ends where the grammar ends. Where nothing is left but to end it, the end-of-sequence
    tokens are permitted, whatever min_tokens, allowed_token_ids and ignore_eos say.
    """

    def __init__(
        self,
        usual_W: np.ndarray,
        early_W: np.ndarray,
        least: int,
        sequences: list[tuple[int, ...]],
        grammar: Grammar | None,
    ) -> None:
        """Words are those of `bits`: permitted from `least` generated tokens on, and before. Sequences are of two
        tokens or more, and never completed."""
        self._usual_W, self._early_W, self._least = usual_W, early_W, least
        self._sequences = sequences
        self._grammar = grammar
        self._matcher = grammar.start() if grammar is not None else None
        self._n_seen = 0  # generated tokens that the matcher has seen
        usual_W.setflags(write=False)
        early_W.setflags(write=False)

    def another(self) -> "RowMask":
        """The same for another answer to the same request."""
        return RowMask(self._usual_W, self._early_W, self._least, self._sequences, self._grammar)

    @property
    def is_dynamic(self) -> bool:
        """Whether the next mask depends on which tokens came, rather than on how many."""
        return self._matcher is not None or bool(self._sequences)

    @property
    def switch_at(self) -> int:
        """Generated tokens from which the mask of a sequence that is not dynamic changes; 0: it never does."""
        return 0 if self.is_dynamic else self._least

    @property
    def finished(self) -> bool:
        """Whether the grammar, as far as `mask` has shown it the answer, permits nothing but its end."""
        return self._matcher is not None and self._matcher.finished

    def mask(self, generated: list[int]) -> np.ndarray:
        """The mask (W,) uint32 of the token that follows `generated`, which goes on from that of the call before.

        Do not write to it. Raises ConstraintError when no token is left, when the grammar has hit a limit, and for a
        generated token that the grammar did not permit; ValueError when tokens were taken back.
        """
        words_W = self._early_W if len(generated) < self._least else self._usual_W
        if not self.is_dynamic:
            return words_W
        words_W = words_W.copy()
        for *before, last in self._sequences:
            if generated[-len(before) :] == before:
                bits.clear(words_W, last)
        if self._matcher is None:
            if not words_W.any():
                raise ConstraintError(NOTHING_LEFT)
            return words_W
        return self._within_grammar(words_W, generated)

    def _within_grammar(self, words_W: np.ndarray, generated: list[int]) -> np.ndarray:
        if len(generated) < self._n_seen:
            raise ValueError(f"{len(generated)} generated tokens, but the grammar has seen {self._n_seen} already.")
        for token in generated[self._n_seen :]:
            self._matcher.accept(token)
            self._n_seen += 1
        permitted_W = np.empty_like(words_W)
        self._matcher.mask(permitted_W)
        words_W &= permitted_W
        if words_W.any():
            return words_W
        if not self._matcher.may_end:
            raise ConstraintError(NOTHING_LEFT)
        return permitted_W & self._matcher.end_W


def _allowed(ids: Iterable[int] | None, vocab_size: int) -> np.ndarray:
    if ids is None:
        return bits.all_of(vocab_size)
    for i in ids:
        if i >= vocab_size:
            raise RequestError(
                f"allowed_token_ids has {i}, but the model has {vocab_size} tokens: 0 to {vocab_size - 1}."
            )
    return bits.of_ids(ids, vocab_size)


def _bad_sequences(bad_words: Iterable[str], tokenizer: Tokenizer | None) -> list[tuple[int, ...]]:
    """The tokens of every word, as it stands at the start of a text and after a space; each once."""
    if bad_words and tokenizer is None:
        raise RequestError("bad_words need a tokenizer, and the model was loaded without one.")
    texts = [text for word in bad_words for text in ((word.lstrip(), " " + word.lstrip()) if word.strip() else (word,))]
    return [word for word in dict.fromkeys(tuple(tokenizer.encode(text)) for text in texts) if word]
