"""The ops in plain PyTorch: the definition that every kernel and every lowering is compared with, and what runs on the CPU.

Shapes: see `contract.py`.

May import: ssv.plugins.contract.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssv.plugins.contract import (
    Judged,
    Score,
    Verdicts,
    check_draw,
    check_gather_norm,
    check_score,
    check_sparse_gather,
    check_verify_greedy,
    check_verify_sampled,
)

TRUSTED, GRAY, CRITICAL = 0, 1, 2
"""Zones of a drafted token: what is trusted is not judged."""

MIN_BELOW = -1e4
"""Logits count as at most this far below the largest: e to it is 0 in fp32, and products with it are finite where those with -inf are not."""

MAX_LOGIT = 2e38
"""A row whose largest logit is not within this has no distribution: times log2(e) it would be no fp32 number."""

MIN_REST = 1e-7
"""1 - p1 counts as at least this, so that its logarithm is finite."""

DRAW_BITS, UNIFORM_BITS = 38, 24
"""Probabilities are summed in units of 2^-38, uniform numbers count in units of 2^-24: sums of integers are the same in any order, and a
product of both fits in 63 bits."""


def score(hidden_RH: Tensor, logits_RV: Tensor, weight_F: Tensor, bias_1: Tensor) -> Score:
    """Top-1 token, how sure it is, and the scorer's r = sigmoid(weight . features + bias).

    The features are the hidden state over its root mean square (if F = H + 3), log(1 - p1), entropy, and margin of the two largest logits
    (`ssv.builder.scorer`).

    A row with NaN, or whose largest logit is infinite or beyond 2e38 either way, has no distribution: all but its token is NaN, and its token is any.

    Args:
        hidden_RH, logits_RV: fp16, bf16 or fp32.
        weight_F, bias_1: fp32.

    Raises:
        OpError: an argument's shape, dtype, device or memory layout.
    """
    check_score(hidden_RH, logits_RV, weight_F, bias_1)
    token_R, prob_R, feature_R3 = confidence(logits_RV)
    uses_hidden = len(weight_F) > feature_R3.shape[1]
    features = torch.cat((normalized(hidden_RH), feature_R3), dim=1) if uses_hidden else feature_R3
    reject_prob_R = torch.sigmoid(features @ weight_F + bias_1)
    return Score(token_R, prob_R, feature_R3[:, 1], feature_R3[:, 2], reject_prob_R)


def confidence(logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Top-1 token int32 [R], its probability fp32 [R], and log(1 - p1), entropy and margin, fp32 [R, 3]."""
    logits_RV = logits_RV.float()
    token_R = most_likely(logits_RV)
    index_R1 = token_R.long()[:, None]
    top_R1 = logits_RV.gather(1, index_R1)
    below_RV = (logits_RV - top_R1).clamp(min=MIN_BELOW)
    # The top-1's own summand is left out: taking it from the sum would lose what is left once its probability is near 1.
    exp_RV = below_RV.exp().scatter(1, index_R1, 0.0)
    others_R = exp_RV.sum(dim=1).where(top_R1[:, 0].abs() < MAX_LOGIT, torch.nan)
    total_R = 1 + others_R
    log_rest_R = (others_R / total_R).clamp(min=MIN_REST).log()
    entropy_R = total_R.log() - torch.linalg.vecdot(exp_RV, below_RV) / total_R
    margin_R = -below_RV.scatter(1, index_R1, MIN_BELOW).amax(dim=1).where(others_R.isfinite(), torch.nan)
    return token_R, 1 / total_R, torch.stack((log_rest_R, entropy_R, margin_R), dim=1)


def normalized(hidden_RH: Tensor) -> Tensor:
    """Rows divided by their root mean square, fp32: the residual stream's scale differs by an order between tokens."""
    hidden_RH = hidden_RH.float()
    return hidden_RH * torch.rsqrt(hidden_RH.square().mean(dim=-1, keepdim=True) + 1e-6)


def most_likely(logits_RV: Tensor) -> Tensor:
    """Index of each row's largest logit, the first of equals, int32 [R]."""
    if logits_RV.device.type == "cpu" and logits_RV.dtype == torch.float32:
        # NumPy's is vectorised, and ten times as fast as torch's on a row of fifty thousand.
        return torch.from_numpy(logits_RV.numpy().argmax(axis=1)).int()
    return logits_RV.argmax(dim=1).int()


def gather_norm(hidden_MH: Tensor, row_R: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows of hidden states, and the same after RMSNorm.

    Args:
        hidden_MH: fp16, bf16 or fp32.
        row_R: int32; one that is not among 0 to M - 1 gives zeros.
        weight_H: of the norm; its dtype is that of the normed rows.

    Returns:
        [R, H] in the states' dtype, [R, H] in the norm's.

    Raises:
        OpError: an argument's shape, dtype, device or memory layout.
    """
    check_gather_norm(hidden_MH, row_R, weight_H, eps)
    known_R1 = ((row_R >= 0) & (row_R < len(hidden_MH)))[:, None]
    if not len(hidden_MH):
        gathered_RH = hidden_MH.new_zeros(len(row_R), hidden_MH.shape[1])
    else:
        gathered_RH = hidden_MH[row_R.long().clamp(0, len(hidden_MH) - 1)].where(known_R1, 0)
    return gathered_RH, _rms_norm(gathered_RH, weight_H, eps)


def sparse_gather(hidden_BTH: Tensor, zone_BT: Tensor, length_B: Tensor, weight_H: Tensor, eps: float) -> Judged:
    """The rows that the target judges, compacted and normed: those whose zone is not TRUSTED, and each sequence's last, which gives the
    bonus token. Padding, at and beyond a sequence's length, is left out.

    Args:
        hidden_BTH: fp16, bf16 or fp32, before the final norm.
        zone_BT: int32, zone of the token that each row judges; the last row's does not matter.
        length_B: int32, rows of each sequence, 0 for none.
        weight_H: of the norm; its dtype is that of the result.

    Raises:
        OpError: an argument's shape, dtype, device or memory layout.
    """
    check_sparse_gather(hidden_BTH, zone_BT, length_B, weight_H, eps)
    batch, tokens, hidden = hidden_BTH.shape
    column_T, length_B1 = torch.arange(tokens, device=zone_BT.device), length_B[:, None]
    judged_BT = (column_T < length_B1) & ((zone_BT != TRUSTED) | (column_T == length_B1 - 1))
    start_B1 = torch.zeros(batch + 1, dtype=torch.int32, device=zone_BT.device)
    start_B1[1:] = judged_BT.sum(dim=1).cumsum(dim=0)
    row_M = torch.full((batch * tokens,), -1, dtype=torch.int32, device=zone_BT.device)
    judged_R = judged_BT.flatten().nonzero()[:, 0].int()
    row_M[: len(judged_R)] = judged_R
    _, normed_MH = gather_norm(hidden_BTH.view(-1, hidden), row_M, weight_H, eps)
    return Judged(normed_MH, row_M, start_B1)


def verify_greedy(logits_RV: Tensor, row_R: Tensor, start_B1: Tensor, drafted_BK: Tensor) -> Verdicts:
    """A judged token is rejected when it is not the target's argmax: the first such token ends what is kept.

    Args:
        logits_RV: of the judged rows, fp16, bf16 or fp32.
        row_R, start_B1: int32, as `sparse_gather` gives them: where each stands among the B * (K + 1) rows, and each sequence's first.
            Row k of a sequence judges its drafted token k; a sequence's last judged row is its bonus row.
        drafted_BK: int32.

    Raises:
        OpError: an argument's shape, dtype, device or memory layout.
    """
    check_verify_greedy(logits_RV, row_R, start_B1, drafted_BK)
    return greedy_verdicts(most_likely(logits_RV), row_R, start_B1, drafted_BK)


def greedy_verdicts(token_R: Tensor, row_R: Tensor, start_B1: Tensor, drafted_BK: Tensor) -> Verdicts:
    """`verify_greedy` where the target's argmax of each row is known, int32 [R]."""
    tokens, rows, starts, drafted = token_R.tolist(), row_R.tolist(), start_B1.tolist(), drafted_BK.tolist()
    width = drafted_BK.shape[1] + 1
    num_kept, next_token = [0] * len(drafted), [-1] * len(drafted)
    for b, drafted_K in enumerate(drafted):
        last = starts[b + 1] - 1
        for r in range(starts[b], starts[b + 1]):
            k = rows[r] - b * width
            if r == last or tokens[r] != drafted_K[k]:
                num_kept[b], next_token[b] = k, tokens[r]
                break
    return _verdicts(num_kept, next_token, token_R.device)


def verify_sampled(
    target_prob_RV: Tensor,
    draft_prob_BKV: Tensor,
    row_R: Tensor,
    start_B1: Tensor,
    drafted_BK: Tensor,
    accept_uniform_BK: Tensor,
    next_uniform_B: Tensor,
) -> Verdicts:
    """A judged token x is accepted with probability min(1, p(x) / q(x)); the first one rejected is replaced by a sample of the
    normalised max(0, p - q) (Leviathan et al. 2023, arXiv:2211.17192). What comes out has the target's distribution p.

    Args:
        target_prob_RV: fp32, p of the judged rows, each summing to 1.
        draft_prob_BKV: fp32, q that each token was drawn from.
        row_R, start_B1, drafted_BK: see `verify_greedy`; what is no token of the vocabulary is rejected.
        accept_uniform_BK, next_uniform_B: fp32, uniform random numbers in [0, 1): of each acceptance, and of each sample.

    Raises:
        OpError: an argument's shape, dtype, device or memory layout.
    """
    check_verify_sampled(target_prob_RV, draft_prob_BKV, row_R, start_B1, drafted_BK, accept_uniform_BK, next_uniform_B)
    rows, starts, drafted, uniforms = (x.tolist() for x in (row_R, start_B1, drafted_BK, accept_uniform_BK))
    width = drafted_BK.shape[1] + 1
    num_kept, next_token = [0] * len(drafted), [-1] * len(drafted)
    for b, drafted_K in enumerate(drafted):
        for r in range(starts[b], starts[b + 1]):
            k = rows[r] - b * width
            is_last = r == starts[b + 1] - 1
            if not is_last and 0 <= drafted_K[k] < target_prob_RV.shape[1]:
                # u < p / q, without dividing by a q of zero.
                p, q = target_prob_RV[r, drafted_K[k]], draft_prob_BKV[b, k, drafted_K[k]]
                if uniforms[b][k] * q < p:
                    continue
            weight_1V = target_prob_RV[r : r + 1]
            if not is_last:
                # NumPy's: a row is too short to be worth sharing among torch's threads.
                residual_1V = weight_1V.cpu().numpy() - draft_prob_BKV[b, k].cpu().numpy()
                weight_1V = torch.from_numpy(residual_1V).to(next_uniform_B.device)
            num_kept[b], next_token[b] = k, int(draw(weight_1V, next_uniform_B[b : b + 1]))
            if next_token[b] < 0:
                # p = q leaves no residual; rounding aside, nothing is rejected then.
                next_token[b] = int(draw(target_prob_RV[r : r + 1], next_uniform_B[b : b + 1]))
            break
    return _verdicts(num_kept, next_token, target_prob_RV.device)


def draw(prob_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """A sample of each row's distribution by inversion, int32 [R]: the first token at which the running sum exceeds u times the whole.

    Args:
        prob_RV: fp32, summing to at most 1, not necessarily to 1; what is negative or NaN counts as none, and a row whose sum is 0
            gives -1.
        uniform_R: fp32, in [0, 1).

    Raises:
        OpError: an argument's shape, dtype, device or memory layout.
    """
    check_draw(prob_RV, uniform_R)
    # What is uniform as a double may be 1 as a float.
    uniforms = (uniform_R * 2.0**UNIFORM_BITS).long().clamp(max=2**UNIFORM_BITS - 1).tolist()
    rows = prob_RV.cpu().numpy()
    tokens = [_drawn(prob_V, uniform) for prob_V, uniform in zip(rows, uniforms, strict=True)]
    return torch.tensor(tokens, dtype=torch.int32).to(prob_RV.device)


def _drawn(prob_V: np.ndarray, uniform: int) -> int:
    """See `draw`; the uniform number in its units."""
    # Few tokens have any probability after top-k or top-p, and NaN counts as none.
    token_P = np.flatnonzero(prob_V > 0)
    cumulative_P = (prob_V[token_P] * np.float32(2.0**DRAW_BITS)).astype(np.int64).cumsum()
    total = int(cumulative_P[-1]) if len(cumulative_P) else 0
    if not total:
        return -1
    return int(token_P[cumulative_P.searchsorted(uniform * total >> UNIFORM_BITS, side="right")])


def _rms_norm(x_RH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    wide_RH = x_RH.float()
    normal_RH = wide_RH * torch.rsqrt(wide_RH.square().mean(dim=1, keepdim=True) + eps)
    return (normal_RH * weight_H.float()).to(weight_H.dtype)


def _verdicts(num_kept: list[int], next_token: list[int], device: torch.device) -> Verdicts:
    both = torch.tensor((num_kept, next_token), dtype=torch.int32).to(device)
    return Verdicts(both[0], both[1])
