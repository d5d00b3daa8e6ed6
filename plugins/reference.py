"""The definition of the ops, in plain PyTorch.

Every kernel and every lowering is compared with it, and it is what runs on the CPU. Shapes: see `contract.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssv.plugins.contract import Score, check_choose, check_score, check_sparse_gather

MIN_BELOW = -1e4
"""Logits count as at most this far below the largest.

Then e to it is 0 in fp32, and products with it are finite where those with -inf are not.
"""

MAX_LOGIT = 2e38
"""A row whose largest logit is not within this has no distribution: times log2(e) it would be no fp32 number."""

MIN_REST = 1e-7
"""1 - p1 counts as at least this, so that its logarithm is finite."""

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS, PHILOX_WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
"""Constants of Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""


def score(hidden_RH: Tensor, logits_RV: Tensor, weight_F: Tensor, bias_1: Tensor) -> Score:
    """Top-1 token, how sure it is, and the scorer's r = sigmoid(weight . features + bias).

    The features are the hidden state over its root mean square (if F = H + 3), log(1 - p1), entropy, and margin of the
    two largest logits (`ssv.model.scorer`).

    A row with NaN, or whose largest logit is infinite or beyond 2e38 either way, has no distribution: all but its token
    is NaN, and its token is any.

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
    # The top-1's own summand is left out: taking it from the sum would lose what is left once its probability is near
    # 1.
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


def sparse_gather(hidden_MH: Tensor, row_R: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rows that the LM head is to see, and the same after the final RMSNorm.

    In a pass of the target these are the rows whose tokens are judged. Trusted rows, whose next token is trusted, are
    not among them: they never reach the norm or the LM head, which is what makes verification sparse.

    Args:
        hidden_MH: fp16, bf16 or fp32, before the final norm.
        row_R: int32; one that is not among 0 to M - 1 gives zeros.
        weight_H: of the norm; its dtype is that of the normed rows.

    Returns:
        [R, H] in the states' dtype, [R, H] in the norm's.

    Raises:
        OpError: an argument's shape, dtype, device or memory layout.
    """
    check_sparse_gather(hidden_MH, row_R, weight_H, eps)
    known_R1 = ((row_R >= 0) & (row_R < len(hidden_MH)))[:, None]
    if not len(hidden_MH):
        gathered_RH = hidden_MH.new_zeros(len(row_R), hidden_MH.shape[1])
    else:
        gathered_RH = hidden_MH[row_R.long().clamp(0, len(hidden_MH) - 1)].where(known_R1, 0)
    return gathered_RH, _rms_norm(gathered_RH, weight_H, eps)


def choose(x_RV: Tensor, seed_R: Tensor, position_R: Tensor, token_V: Tensor | None = None) -> Tensor:
    """A sample of each row's softmax by the Gumbel-max trick: the column with the largest x + noise.

    The noise of a token depends on the request's seed, the token's absolute position and the token alone. So a draft
    and a target whose distributions are alike choose alike, and a request's text does not depend on how its tokens were
    proposed (Gumbel coupling).

    It is -log(-log u), in double precision. u = (w + 0.5) / 2^32 and w is word `token % 4` of Philox4x32-10 of the
    counter (token // 4, position, 0, 0) and the key (low half of the seed, high half).

    Args:
        x_RV: fp32, logits over the temperature; -inf for what cannot be chosen.
        seed_R: int64, whose bits are the key.
        position_R: int64, of which the lower 32 bits count.
        token_V: int64, the token of each column, where it is another number than the column's.

    Returns:
        int32 [R], the first of equals; -1 where a row has NaN or infinity, or nothing to choose.

    Raises:
        OpError: an argument's shape, dtype, device or memory layout.
    """
    check_choose(x_RV, seed_R, position_R, token_V)
    if token_V is None:
        token_V = torch.arange(x_RV.shape[1], device=x_RV.device)
    noise_RV = gumbel(token_V[None], position_R[:, None], seed_R[:, None])
    index_R = (x_RV.double() + noise_RV).argmax(dim=1)
    return index_R.where(x_RV.amax(dim=1).isfinite(), -1).int()


def gumbel(token: Tensor, position: Tensor, seed: Tensor) -> Tensor:
    """The noise of `choose`, fp64, of int64 arguments that are broadcast."""
    words = random_words(token, position, seed)
    return -(-((words.double() + 0.5) * 2.0**-32).log()).log()


def random_words(token: Tensor, position: Tensor, seed: Tensor) -> Tensor:
    """The random 32 bits of `choose`, int64, of int64 arguments that are broadcast."""
    low = 0xFFFFFFFF
    token, position, seed = torch.broadcast_tensors(token, position, seed)
    counter = [token >> 2 & low, position & low, torch.zeros_like(token), torch.zeros_like(token)]
    key = [seed & low, seed >> 32 & low]
    for _ in range(PHILOX_ROUNDS):
        # Products of 32 bits overflow int64, but what they leave has the right bits.
        a, b = PHILOX_MULTIPLIERS[0] * counter[0], PHILOX_MULTIPLIERS[1] * counter[2]
        counter = [(b >> 32 & low) ^ counter[1] ^ key[0], b & low, (a >> 32 & low) ^ counter[3] ^ key[1], a & low]
        key = [half + step & low for half, step in zip(key, PHILOX_WEYL, strict=True)]
    return torch.stack(counter).gather(0, (token & 3)[None])[0]


def _rms_norm(x_RH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    wide_RH = x_RH.float()
    normal_RH = wide_RH * torch.rsqrt(wide_RH.square().mean(dim=1, keepdim=True) + eps)
    return (normal_RH * weight_H.float()).to(weight_H.dtype)
