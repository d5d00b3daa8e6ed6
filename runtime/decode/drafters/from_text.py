"""What drafters share that find their tokens in the text itself: each row's text, in a form of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.drafters.contract import Drafter
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.tree import ROOT, Tree


class Text(Protocol):
    """A text that grows."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes what the text has more now; `tokens` is all of it."""
        ...


T = TypeVar("T", bound=Text)


class TextDrafter(Drafter, Generic[T]):
    """Keeps a text for each row, and has `draft` find a tree in it."""

    def __init__(self, eos_ids: frozenset[int], new_text: Callable[[int], T]) -> None:
        """Begins without texts.

        Args:
            new_text: makes the text of a row whose prompt has so many tokens.
        """
        self._eos_ids, self._new_text = eos_ids, new_text
        self._texts: dict[int, T] = {}

    def join(self, b: int, row: Row) -> None:
        self._texts[b] = self._new_text(row.counters.prompt_tokens)

    def move(self, source: int, dest: int, row: Row) -> None:
        self._texts[dest] = self._texts.pop(source)

    def propose(self, rows: Sequence[Row], limits: Sequence[int], prices: Prices | None = None) -> None:
        for b, (row, limit) in enumerate(zip(rows, limits, strict=True)):
            if limit > 0:
                self._texts[b].extend(row.tokens)
                self.draft(row, self._texts[b], limit, prices if row.policy.pays else None)
                if row.params.grammar is not None:
                    row.tree = _grammatical(row)

    def draft(self, row: Row, text: T, limit: int, prices: Prices | None) -> None:
        """Gives a row its tree of at most `limit` nodes.

        Args:
            prices: None where the row's policy does not ask what pays, or nobody knows.
        """
        raise NotImplementedError


def _grammatical(row: Row) -> Tree:
    """A row's tree without the nodes that its grammar does not allow, and what is behind them."""
    tree, node_of = Tree(), {ROOT: ROOT}
    assert row.processor is not None
    for node, (token, parent) in enumerate(zip(row.tree.tokens, row.tree.parents, strict=True)):
        above = node_of.get(parent)
        if above is not None and row.processor.allows(row.tokens, tree.text(above), token):
            node_of[node] = tree.add(token, row.tree.risks[node], above)
    return tree
