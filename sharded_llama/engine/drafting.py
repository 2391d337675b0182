"""Where guesses at the next tokens come from: the sequence itself, or a smaller model.

Whatever they are, the answer is that of plain decoding: a guess only decides how much of it one step finds.
"""

from collections.abc import Callable, Sequence as Seq

import numpy as np

from ..sampling import Mode, Sampled, SamplingParams
from .options import EngineOptions
from .packing import Packer
from .prompt_lookup import PromptLookup
from .runner import Work
from .scheduler import Plan
from .sequence import Sequence


class Drafter:
    """Whoever makes guesses. `propose` is all that one must do."""

    def propose(self, sequences: Seq[Sequence]) -> None:
        """Before a step is planned: sets the drafts of sequences whose tokens are all known."""
        raise NotImplementedError

    def complete(self, plan: Plan) -> None:
        """Before a step with drafts is packed: what the device has to be asked for."""

    def follow(self, work: Work, has_prompts: bool) -> None:
        """Is told of what the model is about to execute, and whether prompts are among the rows."""


def may_speculate(params: SamplingParams) -> bool:
    """Whether the distribution of a token depends on nothing but the tokens before it, as the model sees them.

    Penalties and constraints would have to be brought up to date between the guesses of one step.
    """
    return not (params.has_penalties or params.has_mask or params.entropy)


class LookupDrafter(Drafter):
    """Prompt lookup, on the host."""

    def __init__(self, options: EngineOptions):
        self._options = options

    def propose(self, sequences: Seq[Sequence]) -> None:
        o = self._options
        for seq in sequences:
            lookup: PromptLookup | None = seq.params.lookup
            if lookup is None:
                lookup = seq.params.lookup = PromptLookup(seq.tokens, o.prompt_lookup_min, o.prompt_lookup_max)
            lookup.extend(seq.tokens[len(lookup) :])
            seq.draft = lookup.propose(o.num_speculative_tokens)


class ModelDrafter(Drafter):
    """A smaller model of the same vocabulary, over pages with the same numbers.

    It draws with the noise that the large model will draw with: where both distributions are alike so are the tokens.
    """

    def __init__(self, options: EngineOptions, packer: Packer, execute: Callable[[Work], Sampled | None]):
        """execute: runs a work on the small model, in every process."""
        self._n = options.num_speculative_tokens
        self._packer, self._execute = packer, execute
        self._catches_up = False  # the next step's decode rows are computed by this model too

    def propose(self, sequences: Seq[Sequence]) -> None:
        for seq in sequences:
            seq.draft = [0] * self._n  # so many are to be found

    def complete(self, plan: Plan) -> None:
        speculating = [
            (seq, start, drafts, i)
            for decode, starts, drafts in zip(plan.decode, plan.decode_starts, plan.drafts, strict=True)
            for i, (seq, start) in enumerate(zip(decode, starts, strict=True))
            if seq.speculates
        ]
        # Rows for which there was no room have no drafts; their tokens are computed here all the same.
        self._catches_up = bool(speculating) and not any(drafts[i] for _, _, drafts, i in speculating)
        if not speculating or self._catches_up:
            return
        # One step more than there are guesses: the last one's key and value are needed when all are right.
        rows = [(seq, start) for seq, start, _, _ in speculating]
        works, columns = self._packer.pack_drafting(plan, rows, self._n + 1)
        for work in works:
            sampled = self._execute(work)
        tokens = np.asarray(sampled.tokens_R)
        for (_, _, drafts, i), column in zip(speculating, columns, strict=True):
            drafts[i] = tokens[: len(drafts[i]), column].tolist()

    def follow(self, work: Work, has_prompts: bool) -> None:
        """Prompts are computed by both models; so are changes of tables and pages."""
        if work.shape is not None and (has_prompts or self._catches_up):
            self._execute(work._replace(slots_UX=None, known_UX=None, chooses=False, mode=Mode.GREEDY))
        elif work.tables_U3 is not None or work.copies_C2 is not None:
            self._execute(Work(tables_U3=work.tables_U3, copies_C2=work.copies_C2))
