"""From logits to the distribution that is sampled: temperature, top-k, top-p.

Shapes: R rows, V vocab.

May import: nothing else of ssv.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_SELECTED = 256
"""Tokens of a row that are selected at first: as a rule more than top-k or top-p keep."""


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """Settings, one per row: fp32 [R] temperature (0 is greedy) and top_p (1 keeps all), int64 [R] top_k (0 keeps all)."""

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor

    def to(self, device: torch.device) -> SamplingTensors:
        return SamplingTensors(self.temperature_R.to(device), self.top_k_R.to(device), self.top_p_R.to(device))


def probabilities(logits_RV: Tensor, params: SamplingTensors) -> Tensor:
    """Distribution of each row after temperature, then top-k, then top-p, fp32 [R, V]; one-hot for greedy rows.

    Top-p keeps the most likely tokens whose mass, without the least likely of them, is below top_p: always at least one. Of
    equal logits the lower token id comes first, at the edges of top-k and top-p too. A row does not depend on the others.
    """
    vocab = logits_RV.shape[1]
    logits_RV = logits_RV.float()
    greedy_R = params.temperature_R == 0
    # A floor: a tiny temperature must not divide into infinities.
    temperature_R1 = params.temperature_R.clamp(min=1e-6).where(~greedy_R, 1.0)[:, None]
    keeps_some_R = ((params.top_k_R > 0) & (params.top_k_R < vocab)) | (params.top_p_R < 1)
    filtered_R = keeps_some_R & ~greedy_R
    if bool(filtered_R.all()):
        return _filtered(logits_RV, temperature_R1, params.top_k_R, params.top_p_R)
    probability_RV = _softmax(logits_RV, logits_RV.amax(dim=1, keepdim=True), temperature_R1)
    if bool(filtered_R.any()):
        rows = filtered_R.nonzero()[:, 0]
        probability_RV[rows] = _filtered(
            logits_RV[rows], temperature_R1[rows], params.top_k_R[rows], params.top_p_R[rows]
        )
    if bool(greedy_R.any()):
        rows = greedy_R.nonzero()[:, 0]
        probability_RV[rows] = 0.0
        probability_RV[rows, logits_RV[rows].argmax(dim=1)] = 1.0
    return probability_RV


def _softmax(logits_RV: Tensor, largest_R1: Tensor, temperature_R1: Tensor) -> Tensor:
    # Differences to the largest: finite however small the temperature is.
    return ((logits_RV - largest_R1) / temperature_R1).softmax(dim=1)


def _filtered(logits_RV: Tensor, temperature_R1: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """`probabilities` of rows that do not keep all tokens.

    Few of many thousand tokens are kept: to put only the C most likely in order takes a tenth of the time of sorting all. C grows until
    it holds what every row keeps, and all equals of the least likely of these.
    """
    rows, vocab = logits_RV.shape
    top_k_R1, top_p_R1 = top_k_R.where(top_k_R > 0, vocab).clamp(max=vocab)[:, None], top_p_R[:, None]
    of_all_R1 = top_k_R1 == vocab
    most = int(top_k_R1.where(~of_all_R1, 0).max())
    all_mass_R1: Tensor | None = None
    count = max(FIRST_SELECTED, most + 1)
    while True:
        count = min(count, vocab)
        value_RC, token_RC = logits_RV.topk(count, dim=1)
        weight_RC = ((value_RC - value_RC[:, :1]) / temperature_R1).double().exp()
        mass_RC = weight_RC.cumsum(dim=1)  # one after the other, so that C does not change it
        rank_C = torch.arange(count, device=logits_RV.device)
        mass_R1 = mass_RC.gather(1, (top_k_R1 - 1).clamp(max=count - 1))
        if bool(of_all_R1.any()):
            if all_mass_R1 is None:
                # 1 over the largest probability is the sum of exp: that of a row is the same beside any other rows.
                probability_RV = _softmax(logits_RV, value_RC[:, :1], temperature_R1)
                all_mass_R1 = 1 / probability_RV.gather(1, token_RC[:, :1]).double()
            mass_R1 = torch.where(of_all_R1, all_mass_R1, mass_R1)
        # A top_p of 1 keeps all, also where rounding has the mass before the last tokens reach the whole.
        kept_RC = (mass_RC - weight_RC < top_p_R1 * mass_R1) | (rank_C == 0) | (top_p_R1 == 1)
        num_kept_R1 = (kept_RC & (rank_C < top_k_R1)).sum(dim=1, keepdim=True)
        edge_R1 = value_RC.gather(1, num_kept_R1 - 1)
        if count == vocab or bool((value_RC[:, -1:] < edge_R1).all()):
            break
        count *= 8
    above_RC, equal_RC = value_RC > edge_R1, value_RC == edge_R1
    # The selection is in no order among equals.
    equals_RC = token_RC.where(equal_RC, vocab).sort(dim=1).values
    last_R1 = equals_RC.gather(1, num_kept_R1 - above_RC.sum(dim=1, keepdim=True) - 1)
    kept_RC = above_RC | (equal_RC & (token_RC <= last_R1))
    probability_RC = (weight_RC / mass_RC.gather(1, num_kept_R1 - 1)).where(kept_RC, 0.0).float()
    return logits_RV.new_zeros(rows, vocab).scatter_(1, token_RC, probability_RC)


def without_tokens(logits_RV: Tensor, is_banned_R: Tensor, token_ids: Tensor) -> Tensor:
    """Logits of which some rows, bool [R] on the CPU, cannot choose some tokens (columns, int64)."""
    columns_V = torch.zeros(logits_RV.shape[1], dtype=torch.bool)
    columns_V[token_ids] = True
    banned_RV = is_banned_R[:, None] & columns_V
    return logits_RV.masked_fill(banned_RV.to(logits_RV.device), -torch.inf)
