"""Which drafted tokens are judged, and when the target is asked: pure functions on plain numbers, which cost less than the calls of as many tensor
operations. The verdict on what is judged is an op of `ssv.plugins`.

Shapes: B rows, K pending tokens, J = K + 1 rows of the target, R gathered rows.

Target row j of a pass judges drafted token j; row `num_pending` is the bonus row, which gives the next token when nothing is rejected.

May import: ssv.builder.tiers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssv.builder.tiers import Policy


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """The judged rows of a pass, as the verdict takes them (`ssv.plugins.reference.verify_greedy`).

    Attributes:
        row_R: int32, where each stands among the B * J rows of the step.
        start_B1: int32 [B + 1], first judged row of each row in use.
        drafted_BK: int32, drafted tokens, padded on the right.
    """

    row_R: Tensor
    start_B1: Tensor
    drafted_BK: Tensor

    def to(self, device: torch.device) -> JudgedRows:
        return JudgedRows(self.row_R.to(device), self.start_B1.to(device), self.drafted_BK.to(device))


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


def judged_tensors(judged: Sequence[Sequence[bool]], pending: Sequence[Sequence[int]], width: int) -> JudgedRows:
    """What is judged of a pass, as tensors.

    Args:
        judged: of each row in use, from `judged_rows`.
        pending: its drafted tokens.
        width: columns that drafted tokens are padded to.
    """
    places, starts = [], [0]
    for b, flags in enumerate(judged):
        places += [b * (width + 1) + j for j, is_judged in enumerate(flags) if is_judged]
        starts.append(len(places))
    padded = [[*tokens, *[0] * (width - len(tokens))] for tokens in pending]
    row_R, start_B1 = torch.tensor(places, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)
    return JudgedRows(row_R, start_B1, torch.tensor(padded, dtype=torch.int32).view(len(pending), width))
