"""How far what a draft says of its guesses is to be trusted, as it was found on prompts kept for that."""

from __future__ import annotations

import math
from typing import Annotated

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


def log_odds(share: float) -> float:
    """The log of a share's odds; shares of 0 and 1 are held a little away from there."""
    share = min(max(share, LEAST), 1 - LEAST)
    return math.log(share / (1 - share))
