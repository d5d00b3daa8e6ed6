"""Which drafted tokens are judged, when the target is asked, and its verdict: pure functions.

What greedy decoding decides is decided row by row in plain numbers, which costs less than the calls of as many tensor operations;
what sampling decides needs whole distributions, and is decided over all rows at once.

Shapes: B rows, K pending tokens (in tensors padded on the right), J = K + 1 rows of the target, V vocab, R gathered rows.

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
class Verdict:
    """What a target pass decided about a row.

    Attributes:
        num_kept: drafted tokens kept, trusted ones included; fewer than were pending when one was rejected.
        next_token: the target's token after them: the correction of a rejected token, or the bonus.
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


def greedy_verdict(drafted_K: Sequence[int], judged_J: Sequence[bool], target_token_R: Sequence[int]) -> Verdict:
    """A judged token is rejected when it is not the target's argmax.

    Args:
        judged_J: from `judged_rows`.
        target_token_R: argmax of each judged row, in order.
    """
    chosen = iter(target_token_R)
    for k, token in enumerate(drafted_K):
        if judged_J[k] and (correction := next(chosen)) != token:
            return Verdict(k, correction)
    return Verdict(len(drafted_K), next(chosen))


def sampled_verdict(
    drafted_BK: Tensor,
    judged_BJ: Tensor,
    num_pending_B: Tensor,
    target_prob_RV: Tensor,
    draft_prob_BKV: Tensor,
    accept_uniform_BK: Tensor,
    next_uniform_B: Tensor,
) -> list[Verdict]:
    """A judged token x is accepted with probability min(1, p(x) / q(x)); the first one rejected is replaced by a sample of the
    normalised max(0, p - q) (Leviathan et al. 2023, arXiv:2211.17192). The output has the target's distribution p.

    A greedy row takes part with one-hot distributions, and gets `greedy_verdict`.

    Args:
        target_prob_RV: p of the judged rows, in row-major order of `judged_BJ`.
        draft_prob_BKV: q that each token was drawn from.
        accept_uniform_BK, next_uniform_B: uniform random numbers in [0, 1).
    """
    row_BJ = (judged_BJ.flatten().cumsum(0) - 1).view_as(judged_BJ).clamp(min=0)
    p_BK = target_prob_RV[row_BJ[:, :-1], drafted_BK]
    q_BK = draft_prob_BKV.gather(2, drafted_BK[:, :, None])[:, :, 0]
    # u < p / q, without dividing by a q of zero.
    rejected_BK = judged_BJ[:, :-1] & (accept_uniform_BK * q_BK >= p_BK)
    num_kept_B, rejected_B = _first_rejection(rejected_BK, num_pending_B)
    p_BV = target_prob_RV[row_BJ.gather(1, num_kept_B[:, None])[:, 0]]
    if not drafted_BK.shape[1]:
        return _verdicts(num_kept_B, draw(p_BV, next_uniform_B))
    last_B = num_kept_B.clamp(max=drafted_BK.shape[1] - 1)
    residual_BV = (p_BV - draft_prob_BKV[torch.arange(len(last_B)), last_B]).clamp(min=0)
    # p == q leaves no residual; rounding aside, nothing is rejected then.
    has_residual_B = rejected_B & (residual_BV.sum(dim=1) > 0)
    next_BV = torch.where(has_residual_B[:, None], residual_BV, p_BV)
    return _verdicts(num_kept_B, draw(next_BV, next_uniform_B))


def draw(weight_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """A sample of each row's distribution by inversion, int64 [R].

    Args:
        weight_RV: non-negative, not necessarily normalised, with a positive sum.
        uniform_R: in [0, 1).
    """
    cumulative_RV = weight_RV.double().cumsum(dim=1)
    threshold_R = uniform_R.double() * cumulative_RV[:, -1]
    index_R = torch.searchsorted(cumulative_RV, threshold_R[:, None], right=True)[:, 0]
    # Rounding may carry the threshold past the last token that has weight.
    last_R = (weight_RV > 0).int().cumsum(dim=1).argmax(dim=1)
    return torch.minimum(index_R, last_R)


def _verdicts(num_kept_B: Tensor, next_token_B: Tensor) -> list[Verdict]:
    return [Verdict(*each) for each in zip(num_kept_B.tolist(), next_token_B.tolist(), strict=True)]


def _first_rejection(rejected_BK: Tensor, num_pending_B: Tensor) -> tuple[Tensor, Tensor]:
    column_K = torch.arange(rejected_BK.shape[1], device=rejected_BK.device)
    if not len(column_K):
        return num_pending_B, torch.zeros_like(num_pending_B, dtype=torch.bool)
    first_B = torch.where(rejected_BK, column_K, len(column_K)).amin(dim=1)
    rejected_B = first_B < num_pending_B
    return torch.minimum(first_B, num_pending_B), rejected_B
