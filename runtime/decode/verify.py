"""Which drafted tokens are judged, when the target is asked, and what its choices say of them: pure functions on plain
numbers, which cost less than the calls of as many tensor operations.

Shapes: N nodes of a row's tree, J = N + 1 rows of the target.

Target row 0 of a pass is the root's and gives the token after the text; row n + 1 is node n's and gives the token after
it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ssv.bundle.policy import Policy
from ssv.runtime.decode.tree import ROOT, Tree


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target decided about a row.

    Attributes:
        path: nodes that are kept, from the root on, trusted ones included.
        num_judged: of these, those that the target judged.
        num_typical: of these, those that are not its own choice, but typical of it.
        next_token: the target's choice after them: in place of what was drafted, or the bonus.
    """

    path: tuple[int, ...]
    num_judged: int
    next_token: int
    num_typical: int = 0

    @property
    def last(self) -> int:
        """The node whose target row gave the next token; ROOT where nothing is kept."""
        return self.path[-1] if self.path else ROOT


def asks_for_pass(risks: Sequence[float], policy: Policy, max_pending: int) -> bool:
    """Whether a row's pending tokens ask for a target pass now.

    Args:
        risks: of the pending tokens.
        max_pending: the policy's, or less where the output ends before.
    """
    judged = [r for r in risks if not r < policy.accept_below]
    risk = 1 - math.prod(1 - r for r in judged)
    is_critical = bool(judged) and max(judged) > policy.verify_above
    return is_critical or risk > policy.risk_budget or len(risks) >= max_pending


def judged_rows(tree: Tree, accept_below: float) -> list[bool]:
    """Which of a pass's J rows are judged: all but those whose next token is trusted. Trusted are nodes of the first
    path alone."""
    judged = [True] * (len(tree) + 1)
    for node in tree.first_path:
        if tree.risks[node] < accept_below:
            judged[tree.parents[node] + 1] = False
    return judged


def choice_by_row(judged_J: Sequence[bool], choices: Sequence[int]) -> list[int | None]:
    """The target's choice in each of a pass's J rows; None in those that are not judged.

    Args:
        judged_J: from `judged_rows`.
        choices: of the target, one for each judged row.
    """
    chosen = iter(choices)
    return [next(chosen) if is_judged else None for is_judged in judged_J]


def walk(tree: Tree, judged_J: Sequence[bool], choices: Sequence[int]) -> Verdict:
    """Goes from the root along the nodes that are the target's own choices; trusted ones are passed without asking.

    Args:
        judged_J, choices: see `choice_by_row`.
    """
    choice_J = choice_by_row(judged_J, choices)
    first_child = dict(zip((ROOT, *tree.first_path), tree.first_path, strict=False))
    path: list[int] = []
    node, num_judged = ROOT, 0
    while True:
        choice = choice_J[node + 1]
        child = first_child[node] if choice is None else tree.child(node, choice)
        if child is None:
            assert choice is not None
            return Verdict(tuple(path), num_judged, choice)
        num_judged += choice is not None
        path.append(child)
        node = child


def walk_typical(
    tree: Tree, is_typical_N: Sequence[bool], log_prob_N: Sequence[float], choices_J: Sequence[int]
) -> Verdict:
    """Keeps the longest path of nodes that are typical of the target or its own choice; of several the likeliest.

    Args:
        is_typical_N, log_prob_N: from `ssv.runtime.decode.typical.judge`.
        choices_J: of the target, behind root and nodes.
    """
    is_own_N = [choices_J[parent + 1] == token for token, parent in zip(tree.tokens, tree.parents, strict=True)]
    likelihood = {ROOT: 0.0}
    for node, parent in enumerate(tree.parents):
        if parent in likelihood and (is_own_N[node] or is_typical_N[node]):
            likelihood[node] = likelihood[parent] + log_prob_N[node]
    last = max(likelihood, key=lambda node: (tree.depths[node] if node != ROOT else 0, likelihood[node]))
    path = tree.path(last)
    return Verdict(tuple(path), len(path), choices_J[last + 1], sum(not is_own_N[node] for node in path))
