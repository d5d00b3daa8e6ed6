"""What steps cost here, and what of a draft is worth its cost.

Drafting pays if it raises the tokens per second. A tree whose nodes survive with probabilities s gives 1 + sum s tokens a round; the round
costs its draft steps and one pass over 1 + nodes tokens. Something more is worth it if its tokens over its seconds are more than the
whole's so far.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of a step by its tokens, measured at some sizes, a straight line between them and on from the last two.

    Attributes:
        tokens: ascending.
        seconds: of each, not falling.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, tokens: float) -> float:
        i = min(max(bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        t0, t1 = self.tokens[i - 1], self.tokens[i]
        s0, s1 = self.seconds[i - 1], self.seconds[i]
        return s0 + (s1 - s0) * (tokens - t0) / (t1 - t0)


@dataclass(frozen=True, slots=True)
class Costs:
    """What steps of a target and its draft cost.

    Attributes:
        target: seconds of a pass by its tokens, all rows together.
        draft: seconds of a draft step, everything around it included.
    """

    target: Curve
    draft: Curve

    def prices(self, num_rows: int) -> Prices:
        """For rounds of so many rows."""
        return Prices(self, num_rows)


FIRST_GUESS = 0.7
"""What is taken for the share of a node's first child before it is drafted: about what a draft's first guess is worth."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What is worth drafting and verifying, for one of the rows that share a round, each of which is taken to do as this one does."""

    costs: Costs
    num_rows: int

    def _pass(self, nodes: int) -> float:
        """A row's part of a pass over root and nodes."""
        return self.costs.target.at(self.num_rows * (1 + nodes)) / self.num_rows

    def of_draft(self, width: int) -> float:
        """A row's part of a draft step of so many nodes of each row."""
        return self.costs.draft.at(self.num_rows * width) / self.num_rows

    def worth_verifying(self, survival: Sequence[float]) -> int:
        """How many nodes are worth a place in the pass, once they have been drafted.

        Args:
            survival: of the nodes, the largest first.
        """
        best, best_rate, gain = 0, 1 / self._pass(0), 1.0
        for count, s in enumerate(survival, start=1):
            gain += s
            if (rate := gain / self._pass(count)) > best_rate:
                best, best_rate = count, rate
        return best

    def worth_opening(self, kept: Sequence[float], survival: Sequence[float], spent: float = 0.0) -> int:
        """How many nodes are worth a further step of the draft, which gives them children.

        Args:
            kept: survival of the nodes that are worth verifying so far.
            survival: of those that may get children, the largest first.
            spent: seconds of the draft steps so far.
        """
        nodes = len(kept)
        rate = (1 + sum(kept)) / (self._pass(nodes) + spent)
        best, best_surplus, gain = 0, 0.0, 0.0
        for count, s in enumerate(survival, start=1):
            gain += FIRST_GUESS * s
            cost = self.of_draft(count) + self._pass(nodes + count) - self._pass(nodes)
            if (surplus := gain - rate * cost) > best_surplus:
                best, best_surplus = count, surplus
        return best
