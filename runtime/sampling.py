"""From logits to the distribution that is sampled: temperature, top-k, top-p.

Shapes: R rows, V vocab.

May import: nothing else of ssv.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    equal logits the lower token id comes first.
    """
    greedy_R = params.temperature_R == 0
    # Differences to the largest, and a floor: a tiny temperature must not divide into infinities.
    scaled_RV = logits_RV.float() - logits_RV.float().amax(dim=1, keepdim=True)
    scaled_RV = scaled_RV / torch.where(greedy_R, 1.0, params.temperature_R.clamp(min=1e-6))[:, None]
    vocab = logits_RV.shape[1]
    if bool(((params.top_k_R > 0) | (params.top_p_R < 1)).any()):
        ordered_RV, index_RV = scaled_RV.sort(dim=1, descending=True, stable=True)
        rank_V = torch.arange(vocab, device=logits_RV.device)
        top_k_R = torch.where(params.top_k_R > 0, params.top_k_R, vocab)
        kept_RV = rank_V < top_k_R[:, None]
        probability_RV = ordered_RV.masked_fill(~kept_RV, -torch.inf).softmax(dim=1)
        before_RV = probability_RV.cumsum(dim=1) - probability_RV
        # A top_p of 1 keeps all, also where rounding has the mass before the last tokens reach 1.
        kept_RV &= (before_RV < params.top_p_R[:, None]) | (rank_V == 0) | (params.top_p_R == 1)[:, None]
        dropped_RV = torch.zeros_like(kept_RV).scatter_(1, index_RV, ~kept_RV)
        scaled_RV = scaled_RV.masked_fill(dropped_RV, -torch.inf)
    probability_RV = scaled_RV.softmax(dim=1)
    one_hot_RV = torch.zeros_like(probability_RV).scatter_(1, logits_RV.argmax(dim=1, keepdim=True), 1.0)
    return torch.where(greedy_R[:, None], one_hot_RV, probability_RV)


def without_tokens(logits_RV: Tensor, is_banned_R: Tensor, token_ids: Tensor) -> Tensor:
    """Logits of which some rows, bool [R] on the CPU, cannot choose some tokens (columns, int64)."""
    columns_V = torch.zeros(logits_RV.shape[1], dtype=torch.bool)
    columns_V[token_ids] = True
    banned_RV = is_banned_R[:, None] & columns_V
    return logits_RV.masked_fill(banned_RV.to(logits_RV.device), -torch.inf)
