"""Bounds on a share that hold for any number of units, however the units differ from each other.

A unit, as a prompt, has a count of parts, as tokens, and some of them are events. Parts of a unit are not independent
of each other, units are. The share is that of all parts: units weigh by how many they have.

The bound comes of a wager (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting",
Journal of the Royal Statistical Society B 86:1-27, arXiv:2010.09686). Against the claim that the share is `s` or more,
a unit of t parts and d events pays (s t - d) / m, where m is the most parts that a unit can have: at least -1 and, if
the claim is right, at most 0 on average. Who begins with 1 and puts a part of at most 0.99 of what they have on each
unit, chosen by the units before it, then has 1 / alpha or more at any time with a chance of at most alpha (Ville).

Shapes: R repetitions, N units. R may be left out.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

_MOST_BET = 0.99
"""Of the capital: a unit of nothing but events takes all of what is put on it."""

MOST_UNITS = 1 << 20
"""No more are looked at where it is asked how many are needed."""


def is_below(events_RN: npt.ArrayLike, parts_RN: npt.ArrayLike, limit: float, *, most: int, alpha: float) -> Flags:
    """Whether the units show that the share is below a limit, bool [R]: wrongly with a chance of at most `alpha`.

    Args:
        events_RN, parts_RN: of each unit, in an order that says nothing of its counts.
        most: parts that a unit can have.

    Raises:
        ValueError: counts that cannot be, or a limit or alpha not in (0, 1).
    """
    events, parts = _checked(events_RN, parts_RN, most)
    _check_share("limit", limit)
    shown: Flags = _capital(events, parts, limit, _bets(events, most, alpha), most) >= -math.log(alpha)
    return shown


def upper_bound(events_N: npt.ArrayLike, parts_N: npt.ArrayLike, *, most: int, alpha: float) -> float:
    """The least limit that the units show the share to be below: wrongly with a chance of at most `alpha`.

    Args and errors as for `is_below`. Returns 1 of units that are too few to show anything.
    """
    events, parts = _checked(events_N, parts_N, most)
    bets, enough = _bets(events, most, alpha), -math.log(alpha)
    low, high = 0.0, 1.0
    while high - low > 1e-9:  # what a wager comes to rises with the limit
        middle = (low + high) / 2
        low, high = (low, middle) if _capital(events, parts, middle, bets, most) >= enough else (middle, high)
    return high


def units_needed(
    limit: float, *, most: int, alpha: float, events_N: npt.ArrayLike = (0,), parts_N: npt.ArrayLike | None = None
) -> int | None:
    """How many units it takes to show that the share is below a limit.

    Args:
        events_N, parts_N: of units that the others are like; without them, of units of `most` parts and no events.

    Returns:
        None where `MOST_UNITS` do not show it.

    Raises:
        ValueError: as for `is_below`.
    """
    events, parts = _checked(events_N, np.full(np.shape(events_N), most) if parts_N is None else parts_N, most)

    def suffice(num_units: int) -> bool:
        return bool(is_below(np.resize(events, num_units), np.resize(parts, num_units), limit, most=most, alpha=alpha))

    enough = 1
    while not suffice(enough):
        if enough >= MOST_UNITS:
            return None
        enough *= 2
    return bisect_left(range(enough), True, lo=enough // 2, key=suffice)


def _bets(events_RN: Counts, most: int, alpha: float) -> Values:
    """What part of the capital is put on each unit, by the units before it: the predictable plug-in of the paper's
    section 4, which is as good as the best constant part if units are many."""
    _check_share("alpha", alpha)
    num_units = events_RN.shape[-1]
    x_RN, count_N = events_RN / most, np.arange(2, num_units + 2)
    mean_RN = (0.5 + np.cumsum(x_RN, axis=-1)) / count_N
    variance_RN = (0.25 + np.cumsum((x_RN - mean_RN) ** 2, axis=-1)) / count_N
    before_RN = np.concatenate([np.full((*x_RN.shape[:-1], 1), 0.25), variance_RN[..., :-1]], axis=-1)
    return np.minimum(np.sqrt(-2 * math.log(alpha) / (num_units * before_RN)), _MOST_BET)


def _capital(events_RN: Counts, parts_RN: Counts, limit: float, bets_RN: Values, most: int) -> Values:
    """Logarithm of the most that the wager ever comes to, [R]."""
    grown_RN = np.cumsum(np.log1p(bets_RN * (limit * parts_RN - events_RN) / most), axis=-1)
    largest: Values = grown_RN.max(axis=-1)
    return largest


def _checked(events_RN: npt.ArrayLike, parts_RN: npt.ArrayLike, most: int) -> tuple[Counts, Counts]:
    events, parts = np.asarray(events_RN, np.int64), np.asarray(parts_RN, np.int64)
    if events.shape != parts.shape or not events.size:
        raise ValueError(f"events have the shape {events.shape}, parts {parts.shape}: give both for each unit")
    if np.any(events < 0) or np.any(events > parts) or np.any(parts > most):
        raise ValueError(f"a unit has fewer than 0 events, more than parts, or more than {most} parts")
    return events, parts


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}: give a number between 0 and 1")
