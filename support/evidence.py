"""Evidence that a share is above a limit, gathered unit by unit, which may be looked at after each of them.

Units and shares are those of `ssv.support.intervals`: units, as prompts, of parts, as tokens, some of which are events.
A unit weighs as many parts as it has, and no more than `most`: of a longer one the events count as `most` parts' worth.

The evidence is what a wager against the claim "the share is at most the limit" has come to (an e-process). With x = d /
(s m) - t / m of a unit of t parts and d events at a limit s with m for `most`, who puts a part f < 1 of what they have
on it has 1 + f x times as much. x is at least -1 and, if the claim is right, at most 0 on average, whatever the units
before it were. So who begins with 1 ever has 1 / alpha with a chance of at most alpha (Ville 1939; Waudby-Smith and
Ramdas 2024, arXiv:2010.09686).

A wager that begins with the first unit loses nearly everything while the claim is right by far, and is slow to notice
that it has become wrong. So what there is at the beginning is shared out: among all units as places to begin at, and
among several f, from bold to timid. A sum of wagers is one too. (A mixture over changepoints, as in Shin, Ramdas and
Rinaldo 2022, "E-detectors: a nonparametric framework for sequential change detection", arXiv:2203.03532; here with a
prior, which bounds the chance that there ever is an alarm.) After t units 1 / (1 + log(1 + t)) is kept for later ones.

Shapes: R wagers side by side, F bets. R may be left out.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

BETS = tuple(0.96 * 2.0**-i for i in range(6))
"""Parts of the capital that are put on a unit."""

_ENOUGH = 1e100
"""What a wager comes to, at most: nobody needs more, and numbers stay finite."""


class Evidence:
    """Wagers against one limit.

    Attributes:
        units: how many have been seen.
        capital_RF: what the wagers that have begun have come to, summed over where they began.
    """

    def __init__(self, limit: float, most: int, num_wagers: tuple[int, ...] = ()) -> None:
        """Begins with nothing seen.

        Args:
            most: parts that a unit weighs, at most.
            num_wagers: (R,), or () for a single one.

        Raises:
            ValueError: a limit not in (0, 1), or `most` below 1.
        """
        if not 0 < limit < 1 or most < 1:
            raise ValueError(f"limit {limit}, most {most}: give a share between 0 and 1, and at least one part")
        self.limit, self.most = limit, most
        self.units = 0
        self.capital_RF: Values = np.zeros((*num_wagers, len(BETS)))

    @property
    def value_R(self) -> Values:
        """The evidence: at the beginning 1. Of a right claim it ever reaches 1 / alpha with a chance of at most
        alpha."""
        value: Values = _kept(self.units) + self.capital_RF.mean(axis=-1)
        return value

    def add(self, events_R: npt.ArrayLike, parts_R: npt.ArrayLike) -> None:
        """Takes a unit of each wager.

        Raises:
            ValueError: counts that cannot be.
        """
        events, parts = np.asarray(events_R, np.float64), np.asarray(parts_R, np.float64)
        if events.shape != self.capital_RF.shape[:-1] or parts.shape != events.shape:
            raise ValueError(f"events have the shape {events.shape}, parts {parts.shape}: give one of each a wager")
        if np.any(events < 0) or np.any(events > parts):
            raise ValueError(f"a unit has {events} events of {parts} parts")
        weight = np.minimum(self.most / np.maximum(parts, 1), 1)
        x = weight * (events / self.limit - parts) / self.most
        begins = _kept(self.units) - _kept(self.units + 1)
        self.units += 1
        self.capital_RF = np.minimum((self.capital_RF + begins) * (1 + np.array(BETS) * x[..., None]), _ENOUGH)


def _kept(units: int) -> float:
    """What has not been put on any unit after so many."""
    return 1 / (1 + math.log1p(units))
