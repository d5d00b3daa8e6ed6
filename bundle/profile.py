"""What steps cost on a machine, as it was measured there: what a draft is worth depends on it."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from ssv.support.strict import Strict


class Curve(Strict):
    """Seconds of a step by its tokens, measured at some sizes; a straight line between them, and on from the last two.

    Attributes:
        tokens: ascending.
        seconds: of each, not falling.
    """

    tokens: Annotated[tuple[PositiveInt, ...], Field(min_length=2)]
    seconds: tuple[PositiveFloat, ...]

    @model_validator(mode="after")
    def _rises(self) -> Curve:
        if len(self.tokens) != len(self.seconds):
            raise ValueError(f"{len(self.tokens)} sizes have {len(self.seconds)} times")
        if any(a >= b for a, b in pairwise(self.tokens)) or any(a > b for a, b in pairwise(self.seconds)):
            raise ValueError("sizes must ascend, and times must not fall")
        return self

    def at(self, tokens: float) -> float:
        """Seconds of a step of so many tokens."""
        i = min(max(bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        t0, t1 = self.tokens[i - 1], self.tokens[i]
        s0, s1 = self.seconds[i - 1], self.seconds[i]
        return s0 + (s1 - s0) * (tokens - t0) / (t1 - t0)


MOST_MISSING = 0.2
"""Of a core: with less than that missing, what is measured is what the machine gives. The kernel counts in hundredths
of a second, and a fifth of a second is measured where nobody waits for a profile."""

MOST_SPREAD = 1.5
"""The middle of a step's repeats, over the least of them. On two idle cores it is 1.02 to 1.15."""


class Conditions(Strict):
    """What costs were measured under.

    Attributes:
        missing_cores: of the cores that the engines have threads for, so much was taken by others, on average; None
            where the system does not tell.
        spread: the middle of a step's repeats over the least of them; of all steps the middle one's.
    """

    missing_cores: NonNegativeFloat | None
    spread: Annotated[float, Field(ge=1.0)]

    @property
    def doubts(self) -> str | None:
        """What was seen that makes the costs doubtful, in words; None of a quiet machine.

        A machine that is busy all the time shows no spread, and one that others slow down from outside, as a virtual
        one, no missing cores.
        """
        seen = []
        if self.missing_cores is not None and self.missing_cores > MOST_MISSING:
            seen.append(f"other processes took {self.missing_cores:.1f} of the cores that the engines have threads for")
        if self.spread > MOST_SPREAD:
            seen.append(f"the same step took {self.spread:.1f} times its least")
        return " and ".join(seen) or None


_NOTHING = Curve(tokens=(1, 2), seconds=(1e-12, 1e-12))


class Costs(Strict):
    """What steps of a target and its draft cost.

    Attributes:
        target: a pass, by the tokens of all its rows together.
        draft: a draft step, by the tokens after which it guesses, with what the round does around it.
        text: of a draft step, for each token of a text that it only has to take in.
        begin: of a draft beside its steps, where an engine grows trees by itself: `draft` is a level of them then.
        conditions: under which it was measured; None of costs that were kept before that was noted.
    """

    target: Curve
    draft: Curve
    text: NonNegativeFloat = 0.0
    begin: NonNegativeFloat = 0.0
    conditions: Conditions | None = None

    def with_free_draft(self) -> Costs:
        """The same of a draft whose steps cost nothing: one that has been made, as by heads, or the best there could
        be."""
        return self.model_copy(update={"draft": _NOTHING, "text": 0.0, "begin": 0.0})
