"""Which drafted tokens are judged, when the target is asked, and what its choices say of them: pure functions on plain numbers, which cost
less than the calls of as many tensor operations.

Shapes: K pending tokens of a row, J = K + 1 rows of the target.

Target row j of a pass judges drafted token j; row K is the bonus row, which gives the next token when nothing is rejected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ssv.bundle.policy import Policy


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target decided about a row.

    Attributes:
        num_kept: drafted tokens that are kept, trusted ones included.
        next_token: the target's choice after them: in place of a rejected one, or the bonus.
    """

    num_kept: int
    next_token: int


def asks_for_pass(reject_prob_K: Sequence[float], policy: Policy, max_pending: int) -> bool:
    """Whether a row's pending tokens ask for a target pass now.

    Args:
        reject_prob_K: of the pending tokens, at least one.
        max_pending: the policy's, or less where the output ends before.
    """
    judged = [r for r in reject_prob_K if not r < policy.accept_below]
    risk = 1 - math.prod(1 - r for r in judged)
    is_critical = bool(judged) and max(judged) > policy.verify_above
    return is_critical or risk > policy.risk_budget or len(reject_prob_K) >= max_pending


def judged_rows(reject_prob_K: Sequence[float], accept_below: float) -> list[bool]:
    """Which target rows of a pass are judged, J = K + 1 of them: those of the tokens that are not trusted, and the bonus row."""
    return [not r < accept_below for r in reject_prob_K] + [True]


def walk(pending_K: Sequence[int], judged_J: Sequence[bool], choices: Sequence[int]) -> Verdict:
    """Goes along the drafted tokens while they are the target's own choices; trusted ones are passed without asking.

    Args:
        judged_J: from `judged_rows`.
        choices: of the target, one for each judged row.
    """
    choice = iter(choices)
    for k, (token, is_judged) in enumerate(zip(pending_K, judged_J, strict=False)):
        if is_judged and (chosen := next(choice)) != token:
            return Verdict(k, chosen)
    return Verdict(len(pending_K), next(choice))
