"""What drafters share that find their tokens in the text itself: each row's text, in a form of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from ssv.bundle.policy import Policy
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

    def __init__(self, eos_ids: frozenset[int], new_text: Callable[[int, Policy], T]) -> None:
        """Begins without texts.

        Args:
            new_text: makes the text of a row whose prompt has so many tokens, and which has this policy.
        """
        self._eos_ids, self._new_text = eos_ids, new_text
        self._texts: dict[int, T] = {}

    def join(self, b: int, row: Row) -> None:
        self._texts[b] = self._new_text(row.counters.prompt_tokens, row.policy)

    def move(self, source: int, dest: int, row: Row) -> None:
        self._texts[dest] = self._texts.pop(source)

    def propose(self, rows: Sequence[Row], limits: Sequence[int], prices: Prices | None = None) -> None:
        priced = []
        for b, (row, limit) in enumerate(zip(rows, limits, strict=True)):
            if limit > 0:
                self._texts[b].extend(row.tokens)
                self.draft(row, self._texts[b], limit)
                if row.params.grammar is not None:
                    row.tree = _grammatical(row)
                if row.policy.pays and len(row.tree):
                    priced.append(b)
        if prices is not None and priced:
            others = [s for b, row in enumerate(rows) if b not in priced for s in _survival(row.tree)]
            _keep_what_pays([rows[b] for b in priced], others, prices)

    def draft(self, row: Row, text: T, limit: int) -> None:
        """Gives a row its tree of at most `limit` nodes, whatever they cost."""
        raise NotImplementedError


def _keep_what_pays(priced: Sequence[Row], others: Sequence[float], prices: Prices) -> None:
    """Leaves rows the nodes of their trees that are worth their places in the pass, which they share.

    Args:
        others: survival of the nodes of other rows' trees.
    """
    found = [(-survival, r, node) for r, row in enumerate(priced) for node, survival in enumerate(_survival(row.tree))]
    found.sort()  # a parent survives at least as probably as its children, and stands before them
    count = prices.worth_together([-survival for survival, _, _ in found], others)
    if count == len(found):
        return
    kept = {(r, node) for _, r, node in found[:count]}
    for r, row in enumerate(priced):
        row.tree = _part(row.tree, lambda node, *_, r=r: (r, node) in kept)


def _survival(tree: Tree) -> list[float]:
    """The probability of each node that it and all before it are right."""
    found: list[float] = []
    for risk, parent in zip(tree.risks, tree.parents, strict=True):
        found.append((1 - risk) * (1.0 if parent == ROOT else found[parent]))
    return found


def _grammatical(row: Row) -> Tree:
    """A row's tree without the nodes that its grammar does not allow, and what is behind them."""
    processor, tree = row.processor, row.tree
    assert processor is not None
    return _part(tree, lambda node, part, above: processor.allows(row.tokens, part.text(above), tree.tokens[node]))


def _part(tree: Tree, keeps: Callable[[int, Tree, int], bool]) -> Tree:
    """A tree without some of its nodes, and what is behind them.

    Args:
        keeps: whether to keep a node, given the part so far and its parent in that.
    """
    part, node_of = Tree(), {ROOT: ROOT}
    for node, (token, risk, parent) in enumerate(zip(tree.tokens, tree.risks, tree.parents, strict=True)):
        above = node_of.get(parent)
        if above is not None and keeps(node, part, above):
            node_of[node] = part.add(token, risk, above)
    return part
