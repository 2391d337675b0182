"""Stop strings in a text that comes in pieces: what can be given out already, and where the first of them ends."""

from collections.abc import Iterable


class StopStrings:
    """The automaton of Aho and Corasick (1975) of several strings: one pass over a text finds all of them.

    A state stands for the longest end of the text so far that begins one of the strings; 0 is the empty one. Building
    takes time and memory linear in the strings. All answers to a request share one.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._next: dict[tuple[int, str], int] = {}
        self.lengths = [0]  # of the text that each state stands for
        self.found: list[str | None] = [None]  # the longest string that ends in each state
        for string in strings:
            state = 0
            for length, char in enumerate(string, 1):
                state = self._next.setdefault((state, char), len(self.lengths))
                if state == len(self.lengths):
                    self.lengths.append(length)
                    self.found.append(None)
            self.found[state] = string
        self._shorter = [0] * len(self.lengths)  # the state of the longest proper end that begins a string
        for (before, char), state in sorted(self._next.items(), key=lambda edge: self.lengths[edge[1]]):
            if before:
                self._shorter[state] = self.step(self._shorter[before], char)
            self.found[state] = self.found[state] or self.found[self._shorter[state]]

    def step(self, state: int, char: str) -> int:
        """The state after one more character; constant time, averaged over a text."""
        while state and (state, char) not in self._next:
            state = self._shorter[state]
        return self._next.get((state, char), 0)


class StopMatcher:
    """Looks for the first stop string in one text.

    `found` is the string whose end comes first, of those that end there the longest; None so far. What `push` returned
    and then `flush`, put together, is the text, up to before `found` or, with `include`, to its end.
    """

    def __init__(self, strings: StopStrings, include: bool = False) -> None:
        self._strings, self._include = strings, include
        self._state, self._held = 0, ""
        self.found: str | None = None

    def push(self, text: str, counts: bool = True) -> str:
        """The text that is safe to give out: what can still become a stop string is held back.

        A string that ends in this piece is found if the piece `counts`; it may begin before. Nothing comes after the
        string that was found.
        """
        if self.found is not None:
            return ""
        strings, state = self._strings, self._state
        for end, char in enumerate(text, 1):
            state = strings.step(state, char)
            if counts and strings.found[state] is not None:
                self.found = strings.found[state]
                whole = self._held + text[:end]
                self._held = ""
                return whole if self._include else whole[: -len(self.found)]
        self._state = state
        whole = self._held + text
        safe = len(whole) - strings.lengths[state]
        self._held = whole[safe:]
        return whole[:safe]

    def flush(self) -> str:
        """The rest of the text, when no more comes."""
        rest, self._held = self._held, ""
        return rest
