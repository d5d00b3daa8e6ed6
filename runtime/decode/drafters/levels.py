"""How deep trees are worth growing where an engine grows them without asking between their levels: by what levels
brought, as far as the survival of their nodes tells, against costs that were measured before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.pace import WEIGHT, Patience
from ssv.runtime.engines.contract import GAIN_SIZES

FIRST_SURVIVAL, FIRST_NODES, FADING = 0.8, 2.0, 0.8
"""What a level is taken to bring before anything is known: the first one's nodes and the sum of their survivals, and
what of it each further level has."""

STAYING = 1.03
"""A tree of another shape has to be better by so much: a new one is captured when it is first run."""


def beam_for(nodes: int) -> int:
    """Nodes of a level that get children, in a tree of so many: more would find little that is kept."""
    return min(max((nodes + 1) // 2, 1), 8)


class Levels:
    """Running means, by depth, of the nodes that trees kept and of what these were worth."""

    def __init__(self, most: int) -> None:
        """Begins with guesses of what a draft is worth.

        Args:
            most: levels.
        """
        self._most, self._patience = most, Patience()
        # Of trees that are no deeper than a level, from the first on, and of so many nodes: what they bring.
        by_rank = np.cumsum(FIRST_SURVIVAL / np.arange(1, GAIN_SIZES[-1] + 1) ** 1.3)[[n - 1 for n in GAIN_SIZES]]
        by_level = np.cumsum(FIRST_SURVIVAL * FADING ** np.arange(most))
        self._gains = np.minimum(by_rank, by_level[:, None])
        self._faded = np.cumsum(FADING ** np.arange(1, most + 1))[:, None]
        self._nodes = [FIRST_NODES] * most
        self._survival = [FIRST_SURVIVAL * FADING**depth for depth in range(most)]

    def worth(self, prices: Prices, most: int, width: int) -> int:
        """Levels with the most tokens per second; 0 where plain decoding has more.

        Args:
            prices: `sharing` being the rows whose trees grow.
            most: levels that are possible.
            width: nodes of a level and row.
        """
        best, best_rate = 0, 1 / prices.of_round(0, 0, width)
        nodes, gain = 0.0, 1.0
        for level in range(min(most, self._most)):
            nodes, gain = nodes + self._nodes[level], gain + self._survival[level]
            if (rate := gain / prices.of_round(nodes, level + 1, width)) > best_rate:
                best, best_rate = level + 1, rate
        return max(best, 1) if most and self._is_tried(prices.num_rows, bool(best)) else 0

    def worth_nodes(
        self,
        num_rows: int,
        seconds_LN: NDArray[np.float64],
        plain_seconds: float,
        current: tuple[int, int] | None = None,
    ) -> tuple[int, int]:
        """Levels and nodes of the trees with the most tokens per second, where as many nodes are verified as a pass has
        room for, whatever they promise; (0, 0) where plain decoding has more.

        Args:
            seconds_LN: of a round over trees of 1, 2, ... levels, and of as many nodes as `GAIN_SIZES` has; infinite
                where there is no room for them.
            plain_seconds: of a round of plain decoding.
            current: the trees of the rounds before, which stay unless others are better by some.
        """
        rate_LN = (1 + self._gains[: len(seconds_LN)]) / seconds_LN[: self._most]
        if not rate_LN.any():
            return 0, 0
        level, i = divmod(int(rate_LN.argmax()), len(GAIN_SIZES))
        if current is not None and current[1] in GAIN_SIZES and current[0] <= len(rate_LN):
            at = current[0] - 1, GAIN_SIZES.index(current[1])
            if rate_LN[at] * STAYING >= rate_LN[level, i]:
                level, i = at
        pays = bool(rate_LN[level, i] * plain_seconds > 1)
        if not self._is_tried(num_rows, pays):
            return 0, 0
        return (level + 1, GAIN_SIZES[i]) if pays else (1, 1)

    def _is_tried(self, num_rows: int, pays: bool) -> bool:
        """Whether a round drafts: where it pays, and now and then where it did not."""
        if pays:
            self._patience.renew()
        return pays or self._patience.is_over(num_rows)

    def note(self, levels: int, kept: Sequence[Sequence[tuple[int, float]]]) -> None:
        """What trees of so many levels kept: nodes and the sum of their survivals by depth, from 1 on."""
        for depth in range(levels):
            found = [tree[depth] if depth < len(tree) else (0, 0.0) for tree in kept]
            for means, values in ((self._nodes, [n for n, _ in found]), (self._survival, [s for _, s in found])):
                means[depth] += WEIGHT * (sum(values) / len(values) - means[depth])
        for depth in range(max(levels, 1), self._most):  # not seen: what the level above has, faded
            self._survival[depth] = FADING * self._survival[depth - 1]
            self._nodes[depth] = max(FADING * self._nodes[depth - 1], 1.0)

    def note_gains(self, levels: int, gains: Sequence[NDArray[np.float32]]) -> None:
        """What the candidates of trees of so many levels are worth, of each row; see `RoundResult.gains`."""
        levels = min(levels, self._most)
        found = sum(gains[1:], gains[0]) / len(gains)
        self._gains[:levels] += WEIGHT * (found[:levels] - self._gains[:levels])
        if levels < self._most:  # not seen: what the level above adds, faded
            last = self._gains[levels - 1]
            added = last - (self._gains[levels - 2] if levels > 1 else 0)
            self._gains[levels:] = last + self._faded[: self._most - levels] * added
