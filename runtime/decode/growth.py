"""How a row's tree grows: which nodes get children, which of these are kept, and when it ends.

One rule with four numbers of a policy (`children`, `beam`, `max_depth`, `max_pending`) gives a chain, a static
expansion (SpecInfer, Miao et al. 2023, arXiv:2305.09781) and a dynamic tree of a fixed size (EAGLE-2, Li et al. 2024,
arXiv:2406.16858). With `pays` the tree ends where more of it would cost more time than it saves
(`ssv.runtime.decode.costs`).

Survival of a node is the probability that the target chooses it and all before it: the product of that along its path.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.tree import ROOT, Tree


@dataclass(frozen=True, slots=True)
class Guess:
    """A token that may be a child of a node.

    Attributes:
        share: probability that the target chooses it, given that all before it is right.
        risk: 1 - share; of a first guess, the scorer's.
    """

    token: int
    share: float
    risk: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A guess with its place in the tree: its parent is an earlier candidate, or ROOT."""

    guess: Guess
    parent: int
    depth: int
    survival: float


class Growth:
    """Candidates of a row's tree, a level at a time.

    Attributes:
        candidates: each after its parent.
        candidate_of: of each node of the tree, once it was made.
        open: those that get children next; [ROOT] in the beginning, none once it has ended.
    """

    def __init__(
        self, policy: Policy, limit: int, max_depth: int, ends: Collection[int], prices: Prices | None = None
    ) -> None:
        """Args:
        limit: most nodes of the tree.
        max_depth: most tokens of a path, if the policy does not say fewer.
        ends: tokens that end the output: they get no children.
        prices: what a policy that pays goes by.
        """
        self._policy, self._limit, self._ends, self._prices = policy, limit, ends, prices
        self._max_depth = min(max_depth, policy.max_depth or max_depth)
        self._num_expanded = 0
        self._spent = 0.0
        self.candidates: list[Candidate] = []
        self.candidate_of: list[int] = []
        self.open: list[int] = [ROOT] if limit > 0 else []

    def num_children(self, candidate: int) -> int:
        """Most children that a candidate gets."""
        depth = 0 if candidate == ROOT else self.candidates[candidate].depth
        return self._policy.children_of(depth)

    def add(self, guesses: Sequence[Sequence[Guess]], sharing: int = 1) -> None:
        """Adds the children of the open candidates and opens the next ones.

        Args:
            guesses: for each open candidate, the likeliest first.
            sharing: rows that were drafted for in the same step.
        """
        first = len(self.candidates)
        if self._prices is not None:
            self._prices = replace(self._prices, sharing=sharing)
            self._spent += self._prices.of_draft(len(self.open))
        for parent, children in zip(self.open, guesses, strict=True):
            survival, depth = (1.0, 0) if parent == ROOT else self._place(parent)
            self.candidates += [
                Candidate(guess, parent, depth + 1, survival * guess.share)
                for guess in children[: self.num_children(parent)]
            ]
        self.open = self._next(range(first, len(self.candidates)))

    def _place(self, candidate: int) -> tuple[float, int]:
        found = self.candidates[candidate]
        return found.survival, found.depth

    def text(self, candidate: int) -> list[int]:
        """The tokens of the path to a candidate, its own last; none for ROOT."""
        tokens = []
        while candidate != ROOT:
            tokens.append(self.candidates[candidate].guess.token)
            candidate = self.candidates[candidate].parent
        return tokens[::-1]

    def _next(self, level: range) -> list[int]:
        """Those of the last level that get children."""
        policy, candidates = self._policy, self.candidates
        if not level or candidates[level[0]].depth >= self._max_depth:
            return []
        # Each takes a slot of the draft's cache.
        beam = min(policy.beam, MAX_PENDING - self._num_expanded)
        going = [i for i in level if candidates[i].guess.token not in self._ends]
        best = sorted(going, key=lambda i: -candidates[i].survival)[:beam]
        if self._prices is not None:
            kept, survival = self._survival(self._kept()), self._survival(best)
            best = best[: self._prices.worth_opening(kept, survival, self._spent) if kept else 0]
        self._num_expanded += len(best)
        return sorted(best)

    def _kept(self) -> list[int]:
        """The candidates that are kept: those that survive most probably, the best first. A parent does so more than
        its children."""
        best = sorted(range(len(self.candidates)), key=lambda i: -self.candidates[i].survival)[: self._limit]
        return best if self._prices is None else best[: self._prices.worth_verifying(self._survival(best))]

    def _survival(self, candidates: Sequence[int]) -> list[float]:
        return [self.candidates[i].survival for i in candidates]

    def tree(self) -> Tree:
        """The tree of the candidates that are kept."""
        tree, node_of = Tree(), {ROOT: ROOT}
        self.candidate_of = self._kept()
        for i in self.candidate_of:
            guess, parent = self.candidates[i].guess, node_of[self.candidates[i].parent]
            node_of[i] = tree.add(guess.token, guess.risk, parent)
        return tree
