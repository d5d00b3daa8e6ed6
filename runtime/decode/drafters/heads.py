"""Medusa's heads (Cai et al. 2024, arXiv:2401.10774) propose a tree from the target's own last hidden state.

Head d guesses the nodes of depth d + 1. It knows nothing of the nodes before them: all nodes of a depth get the same
children, and a node's survival is the product of what the heads give the tokens of its path. So a whole tree costs one
small product and no draft model.

Shapes: R rows that draft, H hidden, D heads, V LM head rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssv.runtime.decode.choice import check_ranked, ranking
from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.drafters.contract import Drafter
from ssv.runtime.decode.growth import Growth, Guess
from ssv.runtime.decode.logits_processor import Columns
from ssv.runtime.decode.row import Row
from ssv.runtime.engines.contract import HeadsEngine


class HeadsDrafter(Drafter):
    """Proposes trees of the heads' likeliest tokens, in the shape that each row's policy says, no deeper than there are
    heads."""

    needs_hidden = True

    def __init__(self, heads: HeadsEngine, eos_ids: Tensor) -> None:
        """Proposes by heads that have been loaded.

        Args:
            eos_ids: int64.
        """
        self._heads, self._eos_ids = heads, frozenset(eos_ids.tolist())
        self._columns = Columns(heads.token_ids_V)
        # Of each row, what the target's last choice was made of.
        self._hidden: dict[int, Tensor] = {}

    def see(self, b: int, hidden_H: Tensor) -> None:
        self._hidden[b] = hidden_H.clone()  # an engine may use its buffer again

    def move(self, source: int, dest: int, row: Row) -> None:
        self._hidden[dest] = self._hidden.pop(source)

    def propose(self, rows: Sequence[Row], limits: Sequence[int], prices: Prices | None = None) -> None:
        drafting, depths = [b for b, limit in enumerate(limits) if limit > 0], range(self._heads.num_heads)
        if not drafting:
            return
        logits_RDV = self._heads.logits(torch.stack([self._hidden[b] for b in drafting]))
        ahead = [(b, depth) for b in drafting for depth in depths]
        most = max(rows[b].policy.children_of(depth) for b, depth in ahead)
        ranked = ranking(rows, logits_RDV.flatten(0, 1), ahead, self._columns, most)
        check_ranked(rows, ahead, ranked)
        guesses = [
            [Guess(token, share, 1 - share) for token, share in zip(tokens, shares, strict=True) if token >= 0]
            for tokens, shares in ranked
        ]
        for r, b in enumerate(drafting):
            self._grow(rows[b], limits[b], guesses[r * len(depths) : (r + 1) * len(depths)], prices)

    def _grow(self, row: Row, limit: int, guesses: Sequence[Sequence[Guess]], prices: Prices | None) -> None:
        """Gives a row the tree of each depth's guesses."""
        if prices is not None:  # a further level costs nothing: the heads have guessed all of them at once
            prices = replace(prices, costs=prices.costs.with_free_draft()) if row.policy.pays else None
        growth = Growth(row.policy, limit, min(row.rest, len(guesses)), row.ends(self._eos_ids), prices)
        for children in guesses:
            if not growth.open:
                break
            growth.add([children] * len(growth.open))
            row.tree = growth.tree()
            # Of a chain the policy may want no more; a tree has its full shape at no further cost.
            if row.tree.is_chain and row.asks_for_pass(limit, self._eos_ids):
                break
