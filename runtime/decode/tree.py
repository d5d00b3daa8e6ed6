"""Drafted tokens as a tree, and what its nodes see of the cache.

A chain is a tree without branches. The text before the tree ends with one token that the target has not seen: the root.
It is no node.

Shapes: B rows, T tokens of a step, D the longest path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ssv.runtime.engines.contract import Branches

ROOT = -1
"""The parent of a node that follows the text."""


@dataclass(slots=True)
class Tree:
    """Drafted tokens that follow a text, each after its parent.

    Attributes:
        tokens, parents: of each node; a parent is the index of an earlier node, or ROOT.
        risks: of each node, the probability that the target does not choose it although all before it are right.
        depths: tokens of each node's path, itself included.
        first_path: from the root the first child of each: what would be the text if all first guesses are right.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    risks: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    first_path: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, risk: float = 0.0, parent: int | None = None) -> int:
        """Adds a node, behind the last one unless a parent is named; returns its index."""
        node = len(self.tokens)
        parent = node - 1 if parent is None else parent
        if parent == (self.first_path[-1] if self.first_path else ROOT):
            self.first_path.append(node)
        self.tokens.append(token)
        self.parents.append(parent)
        self.risks.append(risk)
        self.depths.append(1 if parent == ROOT else self.depths[parent] + 1)
        return node

    @property
    def is_chain(self) -> bool:
        """Whether it has no branches."""
        return len(self.first_path) == len(self.tokens)

    def path(self, node: int) -> list[int]:
        """The nodes that lead to a node, itself last; none for ROOT."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def text(self, node: int) -> list[int]:
        """The tokens of the path to a node, its own last; none for ROOT."""
        return [self.tokens[each] for each in self.path(node)]

    def child(self, node: int, token: int) -> int | None:
        """The child of a node (or of ROOT) that is a token."""
        for child in range(node + 1, len(self.tokens)):
            if self.parents[child] == node and self.tokens[child] == token:
                return child
        return None


def branches_of(prefixes: Sequence[int], paths: Sequence[Sequence[Sequence[int]]], ends: Sequence[int]) -> Branches:
    """What the tokens of a step see, as the engines take it.

    Args:
        prefixes: slots of each row that all its tokens see.
        paths: of each token of each row, the slots beyond the prefix that it sees, its own last.
        ends: the first slot of each row's step: where rows have fewer tokens than others, padding lies behind them.
    """
    width = max(len(row) for row in paths)
    depth = max(1, *(len(path) for row in paths for path in row))
    padded = [
        [[*path, *[-1] * (depth - len(path))] for path in row]
        + [[end + t, *[-1] * (depth - 1)] for t in range(len(row), width)]
        for row, end in zip(paths, ends, strict=True)
    ]
    return Branches(torch.tensor(prefixes, dtype=torch.int32), torch.tensor(padded, dtype=torch.int32))
