"""How deep trees are worth growing where an engine grows them without asking between their levels.

Two things decide: what levels brought by their survival, against costs that were measured before; and what rounds with
and without a draft really gave, in tokens per second, with all that the host does around them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssv.bundle.policy import MAX_PENDING
from ssv.runtime.decode.costs import Prices

FIRST_SURVIVAL, FIRST_NODES, FADING = 0.8, 2.0, 0.8
"""What a level is taken to bring before anything is known: the first one's nodes and the sum of their survivals, and
what of it each further level has."""

WEIGHT = 0.1
"""Of a round in the running means."""

RETRY = 64
"""Rounds after which what did not pay is tried again: texts change, and the load does."""

TRIALS = 8
"""Rounds before their rate is believed."""

INTERRUPTED = 4.0
"""A round that took so many times the mean was not only a round: a prompt came, or the machine did something else."""


@dataclass(slots=True)
class _Rate:
    """Running means of rounds: tokens of all rows, and seconds."""

    tokens: float = 0.0
    seconds: float = 0.0
    count: int = 0

    def note(self, tokens: float, seconds: float) -> None:
        if self.count and seconds > INTERRUPTED * self.seconds:
            return
        self.count += 1
        weight = max(WEIGHT, 1 / self.count)
        self.tokens += weight * (tokens - self.tokens)
        self.seconds += weight * (seconds - self.seconds)

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds


class Levels:
    """Running means, by depth, of the nodes that trees kept and of what these were worth; and of whole rounds."""

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Args:
        most: levels.
        clock: seconds.
        """
        self._most, self._clock = most, clock
        self._waited = 0
        self._nodes = [FIRST_NODES] * most
        self._survival = [FIRST_SURVIVAL * FADING**depth for depth in range(most)]
        # By rows side by side, and whether they drafted.
        self._rates: dict[tuple[int, bool], _Rate] = {}
        self._last: tuple[int, int, bool, float] | None = None

    def begin(self, num_rows: int, num_tokens: int) -> None:
        """A round begins.

        Args:
            num_rows: side by side.
            num_tokens: of their texts together.
        """
        now = self._clock()
        if self._last is not None:
            rows, tokens, drafted, then = self._last
            gained = num_tokens - tokens
            if rows == num_rows and 0 < gained <= rows * (1 + MAX_PENDING):  # the same rows, as far as can be seen
                self._rates.setdefault((rows, drafted), _Rate()).note(gained, now - then)
        self._last = num_rows, num_tokens, False, now

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
        if not most:
            return 0
        if not best or self._loses(prices):
            self._waited += 1
            if self._waited < RETRY:
                return 0
            self._waited = 0
            self._rates.pop((prices.num_rows, True), None)
            best = max(best, 1)
        if self._last is not None:
            rows, tokens, _, then = self._last
            self._last = rows, tokens, True, then
        return best

    def _loses(self, prices: Prices) -> bool:
        """Whether rounds with a draft had fewer tokens per second than those without, or than a pass alone has."""
        drafted = self._rates.get((prices.num_rows, True))
        if drafted is None or drafted.count < TRIALS:
            return False
        plain = self._rates.get((prices.num_rows, False))
        known = plain.per_second if plain is not None and plain.count >= TRIALS else 1 / prices.of_round(0, 0, 1)
        return drafted.per_second < known

    def note(self, levels: int, kept: Sequence[Sequence[tuple[int, float]]]) -> None:
        """What trees of so many levels kept: nodes and the sum of their survivals by depth, from 1 on."""
        for depth in range(levels):
            found = [tree[depth] if depth < len(tree) else (0, 0.0) for tree in kept]
            for means, values in ((self._nodes, [n for n, _ in found]), (self._survival, [s for _, s in found])):
                means[depth] += WEIGHT * (sum(values) / len(values) - means[depth])
        for depth in range(max(levels, 1), self._most):  # not seen: what the level above has, faded
            self._survival[depth] = FADING * self._survival[depth - 1]
            self._nodes[depth] = max(FADING * self._nodes[depth - 1], 1.0)
