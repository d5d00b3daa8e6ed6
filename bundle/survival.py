"""How far what a draft says of its guesses is to be trusted, as it was found on prompts kept for that."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from ssv.support.strict import Strict

LEAST = 1e-4
"""Shares are taken to lie between this and 1 less this: their log odds are finite."""


class Survival(Strict):
    """Corrections of the share that a draft gives its first, second, ... guess for a token: log odds become offset +
    slope * log odds.

    Attributes:
        greedy, sampled: (offset, slope) by rank, of rows that choose the likeliest token and of rows that sample; the
            last one is that of all further ranks. Nothing is corrected where there are none.
    """

    greedy: tuple[tuple[float, Annotated[float, Field(gt=0)]], ...] = ()
    sampled: tuple[tuple[float, Annotated[float, Field(gt=0)]], ...] = ()

    def corrected(self, share: float, rank: int, *, greedy: bool) -> float:
        """The probability that the target chooses a guess of a rank (0 is the first) that the draft gives this
        share."""
        table = self.greedy if greedy else self.sampled
        if not table:
            return share
        offset, slope = table[min(rank, len(table) - 1)]
        return 1 / (1 + math.exp(-(offset + slope * log_odds(share))))


class Reliability(Strict):
    """What came true of guesses of one rank and depth, on prompts that were kept for that.

    Attributes:
        rows: whether the likeliest token was chosen, or tokens were sampled.
        rank: which guess for its place each was, the first being 0.
        depth: tokens from the text to them: 1 of what follows the text.
        guesses: how many there were whose parents were right.
        said, corrected: mean share that the draft gave them, and that they are given now.
        chosen: share that the target chose.
    """

    rows: Literal["greedy", "sampled"]
    rank: Annotated[int, Field(ge=0)]
    depth: Annotated[int, Field(ge=1)]
    guesses: Annotated[int, Field(ge=1)]
    said: Annotated[float, Field(ge=0, le=1)]
    corrected: Annotated[float, Field(ge=0, le=1)]
    chosen: Annotated[float, Field(ge=0, le=1)]


def log_odds(share: float) -> float:
    """The log of a share's odds; shares of 0 and 1 are held a little away from there."""
    share = min(max(share, LEAST), 1 - LEAST)
    return math.log(share / (1 - share))
