"""Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): what followed the same words before
follows them again.

Needs no model. It wins where an answer repeats its prompt or itself: code that is edited, summaries, retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssv.runtime.decode.drafters import match_rates
from ssv.runtime.decode.drafters.from_text import TextDrafter
from ssv.runtime.decode.drafters.match_rates import MatchRates
from ssv.runtime.decode.row import Row


class PromptLookup(TextDrafter["NgramText"]):
    """Proposes what followed the earliest occurrence of the longest n-gram that the text ends with."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        super().__init__(eos_ids, lambda given, policy: NgramText(given, *policy.lengths_of_match))

    def draft(self, row: Row, text: NgramText, limit: int) -> None:
        for token, rate in zip(*text.continuation(min(limit, row.rest, row.policy.max_depth or limit)), strict=True):
            row.tree.add(token, 1 - rate)
            if row.asks_for_pass(limit, self._eos_ids):
                break


class NgramText:
    """A text, where each of its n-grams stood first, and how often what followed there followed again.

    Attributes:
        rates: learnt from what follows the first `num_given` tokens.
    """

    def __init__(self, num_given: int, shortest: int, longest: int) -> None:
        """Begins without tokens.

        Args:
            shortest, longest: tokens of the n-grams that are looked up.
        """
        self.rates = MatchRates()
        self._num_given, self._shortest, self._longest = num_given, shortest, longest
        self._tokens: list[int] = []
        # Index of the token behind the first occurrence of an n-gram that has one.
        self._behind: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes what the text has more now; `tokens` is all of it."""
        known = self._tokens
        for i in range(len(known), len(tokens)):
            if i >= self._num_given and (place := self._place()) is not None:
                self.rates.note(self._match_length(place), known[place] == tokens[i])
            for length in range(self._shortest, min(self._longest, i) + 1):
                self._behind.setdefault(tuple(known[i - length :]), i)
            known.append(tokens[i])

    def continuation(self, count: int) -> tuple[list[int], list[float]]:
        """At most `count` tokens that followed the text's last ones where these stood first, and the rates that each
        follows again.

        Of several n-grams the longest counts.
        """
        if (place := self._place()) is None:
            return [], []
        length, tokens = self._match_length(place), self._tokens[place : place + count]
        return tokens, [self.rates.rate(length + i) for i in range(len(tokens))]

    def _place(self) -> int | None:
        """Index of the token that followed the longest n-gram."""
        tokens = self._tokens
        for length in range(min(self._longest, len(tokens)), self._shortest - 1, -1):
            if (place := self._behind.get(tuple(tokens[-length:]))) is not None:
                return place
        return None

    def _match_length(self, place: int) -> int:
        """How many tokens before a place are also the text's last ones, as far as it matters."""
        tokens, length = self._tokens, 0
        while length < min(match_rates.LONGEST, place) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        return length
