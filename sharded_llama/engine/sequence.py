"""One sequence of tokens that is being generated, as the scheduler sees it."""

import dataclasses
from typing import Any


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A prompt, what has been generated after it, and where it is.

    Positions count from 0; the token at position p is `tokens[p]` once it is known. A token is pending from the moment
    at which the step that samples it has been scheduled until it has been read. Compared and hashed by identity.
    """

    request_id: str
    index: int = 0  # which of the request's sequences
    prompt: list[int]
    max_tokens: int  # generated tokens at most
    stop_token_ids: frozenset[int] = frozenset()  # end the sequence, and are kept
    priority: int = 0  # smaller comes first
    arrival: int = 0  # smaller comes first among equal priorities
    params: Any = None  # of the engine; the scheduler does not look at it
    leader: "Sequence | None" = None  # a sequence of the same prompt, whose computed prompt this one shares
    one_by_one: bool = False  # its steps are not joined to several of one dispatch
    # Its decode rows carry `draft`, and each waits until the tokens of the one before are read.
    speculates: bool = False
    caches_answer: bool = True  # pages of generated tokens can be found by others, as those of prompts always can
    # What follows each prompt token is looked at: every one is a row of its own, and none is taken from the cache.
    scores_prompt: bool = False

    draft: list[int] = dataclasses.field(init=False, default_factory=list)  # guesses at the next tokens, the caller's
    n_drafted: int = dataclasses.field(init=False, default=0)  # guesses that were looked at
    n_accepted: int = dataclasses.field(init=False, default=0)  # of these, right ones
    tokens: list[int] = dataclasses.field(init=False)  # the prompt and the generated tokens that are known
    finish_reason: str | None = dataclasses.field(init=False, default=None)  # "stop", "length" or "abort"

    # The scheduler's own.
    shard: int = dataclasses.field(init=False, default=-1)  # -1: not running
    slot: int = dataclasses.field(init=False, default=-1)  # of the shard; -1: not running
    pages: list[int] = dataclasses.field(init=False, default_factory=list)  # of the shard, in order of position
    n_computed: int = dataclasses.field(init=False, default=0)  # positions that scheduled steps write to the pages
    n_pending: int = dataclasses.field(init=False, default=0)
    n_cached: int = dataclasses.field(init=False, default=0)  # prompt tokens found cached at the first admission
    order: tuple[int, int, int] = dataclasses.field(init=False, default=(0, 0, 0))  # priority, arrival, order of adding
    limit: int = dataclasses.field(init=False, default=0)  # tokens at most, the prompt's included
    n_reserved: int = dataclasses.field(init=False, default=0)  # positions that its pages hold
    digests: list[bytes] = dataclasses.field(init=False, default_factory=list, repr=False)  # of its first full pages
    n_registered: int = dataclasses.field(init=False, default=0)  # of its pages, those that the prefix cache has seen
    admitted: bool = dataclasses.field(init=False, default=False)  # has been running at some time

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def n_generated(self) -> int:
        """Generated tokens that are known."""
        return len(self.tokens) - len(self.prompt)
