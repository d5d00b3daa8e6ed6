"""How deep trees are worth growing where an engine grows them without asking between their levels."""

from __future__ import annotations

from collections.abc import Sequence

from ssv.runtime.decode.costs import Prices

FIRST_SURVIVAL, FIRST_NODES, FADING = 0.8, 2.0, 0.8
"""What a level is taken to bring before anything is known: the first one's nodes and the sum of their survivals, and
what of it each further level has."""

WEIGHT = 0.1
"""Of a round in the running means."""

RETRY = 64
"""Rounds after which what did not pay is tried again: texts change, and the load does."""


class Levels:
    """Running means, by depth, of the nodes that trees kept and of what these were worth."""

    def __init__(self, most: int) -> None:
        """Args:
        most: levels.
        """
        self._most = most
        self._waited = 0
        self._begin()

    def _begin(self) -> None:
        self._nodes = [FIRST_NODES] * self._most
        self._survival = [FIRST_SURVIVAL * FADING**depth for depth in range(self._most)]

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
        if best or not most:
            return best
        self._waited += 1
        if self._waited < RETRY:
            return 0
        self._waited = 0
        self._begin()
        return 1

    def note(self, levels: int, kept: Sequence[Sequence[tuple[int, float]]]) -> None:
        """What trees of so many levels kept: nodes and the sum of their survivals by depth, from 1 on."""
        if not kept:
            return
        for depth in range(levels):
            found = [tree[depth] if depth < len(tree) else (0, 0.0) for tree in kept]
            for means, values in ((self._nodes, [n for n, _ in found]), (self._survival, [s for _, s in found])):
                means[depth] += WEIGHT * (sum(values) / len(values) - means[depth])
        for depth in range(max(levels, 1), self._most):  # not seen: what the level above has, faded
            self._survival[depth] = FADING * self._survival[depth - 1]
            self._nodes[depth] = max(FADING * self._nodes[depth - 1], 1.0)
