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


class Costs(Strict):
    """What steps of a target and its draft cost.

    Attributes:
        target: a pass, by the tokens of all its rows together.
        draft: a draft step, by the tokens after which it guesses, with what the round does around it.
        text: of a draft step, for each token of a text that it only has to take in.
    """

    target: Curve
    draft: Curve
    text: NonNegativeFloat = 0.0
