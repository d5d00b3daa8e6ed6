"""Lookahead decoding (Fu et al. 2024, arXiv:2402.02057): the target itself guesses several tokens ahead, in the passes
that it runs anyway.

Needs no model. Each pass runs a window of guessed tokens beside the text. What the target chooses behind them are
better guesses for the next pass (Jacobi iteration), and the tokens of one column over the passes are an n-gram. N-grams
that begin with the text's last token are drafted. It wins where passes cost about the same whatever their size: not on
a CPU.

The window has N - 1 levels of W columns. Column 0 of level 0 is the root, and level 0 is a chain. A token of a further
level follows the token above it, so it sees the root, level 0 up to its column, and its own column. That is a tree, so
the window is nodes of the row's tree like any other, shared with the drafted n-grams where these begin alike. Where the
target chooses one, it is right, and is kept: the article passes over these.

A policy's `beam` is W, its `max_depth` N - 1, and its first `children` are G, the most n-grams that are drafted, and
kept, of a token.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from torch import Tensor

from ssv.runtime.decode.choice import check_chosen
from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.drafters.contract import Drafter
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.tree import ROOT, Tree

MAX_DEPTH = 4
"""N - 1 where the policy does not say it; the published default."""


class Lookahead(Drafter):
    """Proposes n-grams that the target made in earlier passes, and makes new ones."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self._eos_ids = eos_ids
        self._windows: dict[int, Window] = {}

    def join(self, b: int, row: Row) -> None:
        policy, prompt = row.policy, row.tokens[: row.counters.prompt_tokens]
        seeds = [token for token in prompt if token not in self._eos_ids] or prompt
        self._windows[b] = Window(seeds, policy.beam, policy.max_depth or MAX_DEPTH, policy.children_of(0))

    def move(self, source: int, dest: int, row: Row) -> None:
        self._windows[dest] = self._windows.pop(source)

    def propose(self, rows: Sequence[Row], limits: Sequence[int], prices: Prices | None = None) -> None:
        for b, (row, limit) in enumerate(zip(rows, limits, strict=True)):
            if limit > 0:
                row.tree = self._windows[b].tree(row.tokens[-1], limit, row.rest, row.ends(self._eos_ids))

    def observe(self, b: int, row: Row, path: Sequence[int], chosen: Sequence[int], features_TF: Tensor | None) -> None:
        self._windows[b].advance(chosen)


class Window:
    """The window of a row, and the n-grams that it has made.

    Attributes:
        levels: tokens of each level by column; the first is the oldest. All have the same number of columns.
        ngrams: what followed a token, the latest last.
    """

    def __init__(self, seeds: Sequence[int], width: int, num_levels: int, num_guesses: int) -> None:
        """Fills the first level with guesses.

        Args:
            seeds: tokens from which the first guesses are drawn; at least one.
            width: W.
            num_levels: N - 1.
            num_guesses: G.
        """
        self._num_levels, self._num_guesses = num_levels, num_guesses
        self._seeds, self._random = seeds, random.Random(0)
        # Levels are added one by one, and each takes a column.
        self.levels = [[self._seed() for _ in range(width + num_levels - 1)]]
        self.ngrams: dict[int, list[tuple[int, ...]]] = {}
        # Nodes of the last level, by column, in the tree that was made last; None of a column that it has not.
        self._nodes: list[int | None] = []

    def tree(self, root: int, limit: int, max_depth: int, ends: Collection[int]) -> Tree:
        """The window and the n-grams that begin with a token.

        Args:
            limit: most nodes. If they are few, the window has fewer columns, and takes half of them at the most.
            max_depth: most tokens of a path.
            ends: tokens that nothing follows.
        """
        tree = Tree()
        node_of: dict[tuple[int, int], int] = {}

        def place(token: int, parent: int | None) -> int | None:
            """The node of a token behind a node; None where there can be none."""
            if parent is None or (parent != ROOT and (tree.depths[parent] == max_depth or tree.tokens[parent] in ends)):
                return None
            if (parent, token) not in node_of:
                node_of[parent, token] = tree.add(token, parent=parent)
            return node_of[parent, token]

        self.levels[0][0] = root
        columns = min(len(self.levels[0]), (limit // 2 + 1) // len(self.levels))
        num_guesses = (limit - max(columns * len(self.levels) - 1, 0)) // self._num_levels
        for ngram in self.ngrams.get(root, [])[: -1 - num_guesses : -1]:
            node: int | None = ROOT
            for token in ngram:
                node = place(token, node)
        nodes: list[int | None] = [ROOT] * min(columns, 1)
        for token in self.levels[0][1:columns]:
            nodes.append(place(token, nodes[-1]))
        for level in self.levels[1:]:
            nodes = [place(token, above) for token, above in zip(level, nodes, strict=False)]
        self._nodes = nodes
        return tree

    def advance(self, choices: Sequence[int]) -> None:
        """Takes what the target chose in the pass over the last tree.

        Args:
            choices: behind root and nodes.

        Raises:
            EngineError: some are no tokens.
        """
        if not self._nodes:
            return
        chosen = [None if node is None else choices[node + 1] for node in self._nodes]
        self._nodes = []
        if known := [token for token in chosen if token is not None]:
            check_chosen(known)
        is_full = len(self.levels) == self._num_levels
        if is_full:
            for *column, token in zip(*self.levels, chosen, strict=False):
                if token is not None:
                    self._keep(column[0], (*column[1:], token))
        # Columns that were not run begin anew.
        chosen += [None] * (len(self.levels[0]) - len(chosen))
        made = [self._seed() if token is None else token for token in chosen]
        # The text has one more token at least: what stood one behind the root is the root now.
        self.levels = [*self.levels[1:], made] if is_full else [level[1:] for level in (*self.levels, made)]

    def _seed(self) -> int:
        return self._random.choice(self._seeds)

    def _keep(self, token: int, ngram: tuple[int, ...]) -> None:
        found = self.ngrams.setdefault(token, [])
        if ngram in found:
            found.remove(ngram)
        found.append(ngram)
        del found[: -self._num_guesses]
