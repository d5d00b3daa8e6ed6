"""How often a repetition goes on: what those who find their tokens in the text think these are worth.

The more of the text's last tokens stand at an earlier place too, the more probable it is that the next one does. How
probable depends on the text: a summary repeats, a story does not. So a row learns it from its own output, token by
token, drafted or not.
"""

from __future__ import annotations

PRIOR = (0.15, 0.45, 0.6, 0.7, 0.75, 0.8, 0.8, 0.8)
"""Probability that a match of 1, 2, 3 ... tokens goes on, before anything is known of the text: SmolLM2-135M's greedy
answers to `benchmarks/prompts/demo.jsonl`."""

PRIOR_WEIGHT = 4.0
"""Tokens of the output that count as much as the prior."""

LONGEST = len(PRIOR)
"""Tokens of a match beyond which it makes no difference how many there are."""


class MatchRates:
    """What a row has learnt of its own text."""

    def __init__(self) -> None:
        self._tried = [PRIOR_WEIGHT] * LONGEST
        self._held = [PRIOR_WEIGHT * rate for rate in PRIOR]

    def note(self, length: int, goes_on: bool) -> None:
        """A token has been chosen behind a match of `length` tokens, at least one."""
        i = min(length, LONGEST) - 1
        self._tried[i] += 1
        self._held[i] += goes_on

    def rate(self, length: int) -> float:
        """Probability that a match of `length` tokens, at least one, goes on."""
        i = min(length, LONGEST) - 1
        return self._held[i] / self._tried[i]
