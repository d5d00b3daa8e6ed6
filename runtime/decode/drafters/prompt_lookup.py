"""Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): what followed the same words before follows them again.

Needs no model. It wins where an answer repeats its prompt or itself: code that is edited, summaries, retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.drafters.contract import Drafter
from ssv.runtime.decode.row import Row

LONGEST = 3
"""Tokens of the longest n-gram that is looked up, the published default."""


class PromptLookup(Drafter):
    """Proposes what followed the earliest occurrence of the longest n-gram that the text ends with."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self._eos_ids = eos_ids

    def propose(self, rows: Sequence[Row], limits: Sequence[int], prices: Prices | None = None) -> None:
        for row, limit in zip(rows, limits, strict=True):
            for token in continuation(row.tokens, limit):
                row.tree.add(token)
                if row.asks_for_pass(limit, self._eos_ids):
                    break


def continuation(tokens: Sequence[int], count: int) -> list[int]:
    """At most `count` tokens that followed the text's last ones where these stood first; of several n-grams the longest counts."""
    text = np.asarray(tokens)
    for length in range(min(LONGEST, len(text) - 1) if count else 0, 0, -1):
        # All that end before the text does: the last ones follow themselves with nothing.
        windows = sliding_window_view(text[:-1], length)
        (found,) = (windows == text[-length:]).all(axis=1).nonzero()
        if len(found):
            start = int(found[0]) + length
            return list(tokens[start : start + count])
    return []
