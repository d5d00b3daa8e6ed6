"""How a row's tree grows: which nodes get children, which of these are kept, and when it ends.

One rule with four numbers of a policy (`children`, `beam`, `max_depth`, `max_pending`) gives a chain, a static
expansion (SpecInfer, Miao et al. 2023, arXiv:2305.09781) and a dynamic tree of a fixed size (EAGLE-2, Li et al. 2024,
arXiv:2406.16858). With `pays` the tree ends where more of it would cost more time than it saves
(`ssv.runtime.decode.costs`).

Survival of a node is the probability that the target chooses it and all before it: the product of that along its path.
On the first path, that of the draft's likeliest tokens, a trusted token is as good as chosen, and has no siblings:
nobody will ask for them.

A tree may begin with what was found in the text: candidates that took no step of the draft. They are kept where they
survive more probably than what the draft offers, and the draft is asked for what they leave over.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.tree import ROOT, Tree
from ssv.runtime.engines.contract import Grown, TreeShape


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
        candidates: each after its parent, what was found first.
        candidate_of: of each node of the tree, once it was made.
        open: those that get children next; [ROOT] in the beginning, none once it has ended.
    """

    def __init__(
        self,
        policy: Policy,
        limit: int,
        max_depth: int,
        ends: Collection[int],
        prices: Prices | None = None,
        found: Sequence[Candidate] = (),
    ) -> None:
        """Begins a tree.

        Args:
            limit: most nodes of the tree.
            max_depth: most tokens of a path, if the policy does not say fewer.
            ends: tokens that end the output: they get no children.
            prices: what a policy that pays goes by.
            found: candidates to begin with, no deeper than `max_depth`.
        """
        self._policy, self._limit, self._ends, self._prices = policy, limit, ends, prices
        self._max_depth = min(max_depth, policy.max_depth or max_depth)
        self._num_expanded = 0
        self._spent = 0.0
        self._num_found = len(found)
        self._taken: dict[int, int] = {}
        self._first_path: set[int] = {ROOT}
        self.candidates: list[Candidate] = list(found)
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
        if self._prices is not None:
            if self._policy.lossless:  # the text of others must not depend on their company
                self._prices = replace(self._prices, sharing=sharing)
            self._spent += self._prices.of_draft(len(self.open))
        level: list[int] = []
        for parent, guessed in zip(self.open, guesses, strict=True):
            children = self._trusting(parent, guessed[: self.num_children(parent)])
            known = self._weigh_found(parent, guessed)
            level += known.values()
            survival, depth = self._place(parent)
            for rank, guess in enumerate(children):
                if guess.token not in known:
                    self._add(parent, rank, Candidate(guess, parent, depth + 1, survival * guess.share))
                    level.append(len(self.candidates) - 1)
        self._value_found()
        self.open = self._next(level)

    def take(self, groups: Sequence[tuple[int, Sequence[tuple[int, Guess]]]]) -> dict[int, int]:
        """Takes candidates that an engine has grown by itself; the tree grows no further here.

        Args:
            groups: a parent, or ROOT, with its children, the likeliest first; all by their numbers there. Parents come
                before their children.

        Returns:
            Which candidates all that were taken are. What follows the end of the output, or is too deep, is left out.
        """
        self.open = []
        for parent, children in groups:
            above = ROOT if parent == ROOT else self._taken.get(parent)
            if above is None or (above != ROOT and self.candidates[above].guess.token in self._ends):
                continue
            survival, depth = self._place(above)
            if depth >= self._max_depth:
                continue
            known = self._weigh_found(above, [guess for _, guess in children])
            guesses = self._trusting(above, [guess for _, guess in children])
            for rank, ((number, _), guess) in enumerate(zip(children, guesses, strict=False)):
                if (i := known.get(guess.token)) is None:
                    i = len(self.candidates)
                    self._add(above, rank, Candidate(guess, above, depth + 1, survival * guess.share))
                self._taken[number] = i
        self._value_found()
        return self._taken

    def _add(self, parent: int, rank: int, candidate: Candidate) -> None:
        if not rank and parent in self._first_path:
            self._first_path.add(len(self.candidates))
        self.candidates.append(candidate)

    def _trusting(self, parent: int, guesses: Sequence[Guess]) -> Sequence[Guess]:
        """A node's children, or the one that is trusted."""
        if guesses and parent in self._first_path and guesses[0].risk < self._policy.accept_below:
            return [replace(guesses[0], share=1.0)]
        return guesses

    def _weigh_found(self, parent: int, guesses: Sequence[Guess]) -> dict[int, int]:
        """Corrects what was found behind a candidate by what the draft says of it; returns these candidates by token.

        Where both say the same token first, the larger share stands. Another token of share t is right beside a first
        guess of share q as if both erred by themselves: t (1 - q) / (1 - t q), or what the draft gives it, if that is
        more.
        """
        found = {self.candidates[i].guess.token: i for i in self._found_behind(parent)}
        if found and guesses:  # a grammar may leave a draft none
            said = {guess.token: guess.share for guess in guesses}
            first = guesses[0]
            for token, i in found.items():
                share = self.candidates[i].guess.share
                if token != first.token:
                    share *= (1 - first.share) / (1 - share * first.share)
                share = max(share, said.get(token, 0.0))
                self.candidates[i] = replace(self.candidates[i], guess=Guess(token, share, 1 - share))
        return found

    def _value_found(self) -> None:
        """Gives what was found the survivals that follow from its shares."""
        for i in range(self._num_found):
            each = self.candidates[i]
            survival = self._place(each.parent)[0] * each.guess.share
            if survival != each.survival:
                self.candidates[i] = replace(each, survival=survival)

    def _found_behind(self, parent: int) -> list[int]:
        return [i for i in range(self._num_found) if self.candidates[i].parent == parent]

    def left_over(self, candidate: int) -> float:
        """Probability that all up to a candidate is right, and nothing that was found behind it."""
        found = sum(self.candidates[i].guess.share for i in self._found_behind(candidate))
        return self._place(candidate)[0] * max(1 - found, 0.0)

    def _place(self, candidate: int) -> tuple[float, int]:
        if candidate == ROOT:
            return 1.0, 0
        found = self.candidates[candidate]
        return found.survival, found.depth

    def text(self, candidate: int) -> list[int]:
        """The tokens of the path to a candidate, its own last; none for ROOT."""
        tokens = []
        while candidate != ROOT:
            tokens.append(self.candidates[candidate].guess.token)
            candidate = self.candidates[candidate].parent
        return tokens[::-1]

    def _next(self, level: Sequence[int]) -> list[int]:
        """Those of the last level that get children."""
        policy, candidates = self._policy, self.candidates
        if not level or candidates[level[0]].depth >= self._max_depth:
            return []
        # Each takes a slot of the draft's cache.
        beam = min(policy.beam, MAX_PENDING - self._num_expanded)
        going = [i for i in level if candidates[i].guess.token not in self._ends]
        left = {i: self.left_over(i) for i in going}
        best = sorted(going, key=lambda i: -left[i])[:beam]
        if self._prices is not None:
            kept = self.kept_survival()
            best = best[: self._prices.worth_opening(kept, [left[i] for i in best], self._spent) if kept else 0]
        self._num_expanded += len(best)
        return sorted(best)

    def _kept(self) -> list[int]:
        """The candidates that are kept: those that survive most probably, the best first. A parent does so more than
        its children."""
        best = sorted(range(len(self.candidates)), key=lambda i: -self.candidates[i].survival)[: self._limit]
        if self._prices is None:
            return best
        return best[: self._prices.worth_verifying([self.candidates[i].survival for i in best])]

    def kept_survival(self) -> list[float]:
        """Survival of the nodes that the tree has so far, the largest first."""
        return [self.candidates[i].survival for i in self._kept()]

    def survival_by_depth(self) -> list[tuple[int, float]]:
        """How many of the tree's nodes each depth has, and the sum of their survivals, from depth 1 on."""
        found: list[tuple[int, float]] = []
        for candidate in sorted((self.candidates[i] for i in self.candidate_of), key=lambda c: c.depth):
            while len(found) < candidate.depth:
                found.append((0, 0.0))
            count, total = found[candidate.depth - 1]
            found[candidate.depth - 1] = count + 1, total + candidate.survival
        return found

    def tree(self) -> Tree:
        """The tree of the candidates that are kept, in their order: the first path is that of the likeliest tokens."""
        tree, node_of = Tree(), {ROOT: ROOT}
        self.candidate_of = sorted(self._kept())
        for i in self.candidate_of:
            guess, parent = self.candidates[i].guess, node_of[self.candidates[i].parent]
            node_of[i] = tree.add(guess.token, guess.risk, parent)
        return tree


def likely_groups(
    grown: Grown, shape: TreeShape, ends: Collection[int], most: int, max_depth: int, accept_below: float = 0.0
) -> list[list[tuple[int, list[tuple[int, Guess]]]]]:
    """The candidates that survive most probably of all that an engine has grown, by level, each node's together.

    A tree of an engine has some hundred candidates, of which a few dozen may be kept: the others are told apart before
    they become objects.

    Args:
        ends: tokens that get no children.
        most: candidates, beside all that follow the text.
        max_depth: most tokens of a path.
        accept_below: trusts tokens of the first path, see `Policy`.
    """
    survival_N, going_N = np.zeros(len(grown.tokens)), np.ones(len(grown.tokens), dtype=bool)
    for token in ends:
        going_N &= grown.tokens != token
    firsts = shape.firsts[: max_depth + 1]
    last_of_path = ROOT
    for first, last in pairwise(firsts):
        at, parents = slice(first, last), grown.parents[first:last]
        above_N = survival_N[parents] * going_N[parents] if first else np.ones(last)
        survival_N[at] = above_N * grown.shares[at]
        on_path = np.flatnonzero(parents == last_of_path)
        if not len(on_path):
            last_of_path = len(grown.tokens)  # no one's parent
            continue
        last_of_path = first + int(on_path[0])
        if grown.risks[last_of_path] < accept_below:
            survival_N[first + on_path] = 0.0
            survival_N[last_of_path] = above_N[last_of_path - first]
    survival_N[grown.tokens < 0] = 0.0
    kept_N = survival_N > 0
    best = np.argsort(-survival_N, kind="stable")
    kept_N[best[most:]] = False
    kept_N[: shape.children] = survival_N[: shape.children] > 0
    numbers = np.flatnonzero(kept_N)
    columns = (x[numbers].tolist() for x in (grown.tokens, grown.parents, grown.shares, grown.risks))
    groups: list[dict[int, list[tuple[int, Guess]]]] = [{} for _ in firsts[1:]]
    levels = np.searchsorted(firsts, numbers, side="right") - 1
    for number, level, token, parent, share, risk in zip(numbers.tolist(), levels.tolist(), *columns, strict=True):
        groups[level].setdefault(parent, []).append((number, Guess(token, share, risk)))
    return [list(by_parent.items()) for by_parent in groups]
