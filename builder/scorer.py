"""The criticality scorer: one linear layer and a sigmoid over what the draft's forward pass already has.

Features of a drafted token, in this order: the draft's hidden state (before its final norm, divided by its root mean square), then
log(1 - p1), entropy in nats, and log p1 - log p2, with p1 and p2 the two largest of the draft's probabilities at temperature 1.

Shapes: R drafted tokens, H hidden of the draft, V draft vocab.

May import: ssv.builder.checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssv.builder.checkpoint import CheckpointError, read_safetensors

CONFIDENCE_FEATURES = ("log_one_minus_p1", "entropy", "margin")


@dataclass(frozen=True, slots=True)
class Scorer:
    """r = sigmoid(weight . features + bias), the probability that the target would reject the token.

    Attributes:
        weight_F: fp32, hidden channels first if `uses_hidden`, then the confidence features.
        bias: fp32 scalar.
    """

    weight_F: Tensor
    bias: Tensor
    uses_hidden: bool

    def __call__(self, hidden_RH: Tensor, logits_RV: Tensor) -> Tensor:
        """Reject probability of each row's argmax, fp32 [R]."""
        confidence = confidence_features(logits_RV)
        features = torch.cat((normalized(hidden_RH), confidence), dim=-1) if self.uses_hidden else confidence
        return torch.sigmoid(features @ self.weight_F + self.bias)

    def to(self, device: torch.device | str) -> Scorer:
        return Scorer(self.weight_F.to(device), self.bias.to(device), self.uses_hidden)


def normalized(hidden_RH: Tensor) -> Tensor:
    """Rows divided by their root mean square, fp32: the residual stream's scale differs by an order between tokens."""
    hidden_RH = hidden_RH.float()
    return hidden_RH * torch.rsqrt(hidden_RH.square().mean(dim=-1, keepdim=True) + 1e-6)


def confidence_features(logits_RV: Tensor) -> Tensor:
    """log(1 - p1), entropy and log p1 - log p2 of each row, fp32 [R, 3]."""
    log_p_RV = logits_RV.float().log_softmax(dim=-1)
    # Twice a maximum: topk of two takes several times as long on a CPU.
    top_R, argmax_R = log_p_RV.max(dim=-1)
    second_R = log_p_RV.scatter(1, argmax_R[:, None], -torch.inf).amax(dim=-1) if log_p_RV.shape[-1] > 1 else top_R
    # 1 - p1 from p1 would lose everything once p1 rounds to 1.
    rest_R = (-torch.expm1(top_R)).clamp(min=1e-7)
    entropy_R = -torch.linalg.vecdot(log_p_RV.exp(), log_p_RV)
    return torch.stack((rest_R.log(), entropy_R, top_R - second_R), dim=-1)


def save_scorer(scorer: Scorer, path: Path) -> None:
    """Writes weight and bias; the feature list goes to the metadata."""
    features = (["hidden"] if scorer.uses_hidden else []) + list(CONFIDENCE_FEATURES)
    save_file(
        {"weight": scorer.weight_F.float().cpu().contiguous(), "bias": scorer.bias.float().cpu().reshape(1)},
        path,
        metadata={"ssv_scorer_features": ",".join(features)},
    )


def load_scorer(path: Path, hidden_size: int) -> Scorer:
    """Reads a scorer for a draft of the given hidden size.

    Raises:
        CheckpointError: damaged, of unknown features, or for another hidden size.
    """
    state = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        features = (file.metadata() or {}).get("ssv_scorer_features", "").split(",")
    uses_hidden = features[0] == "hidden"
    if tuple(features[uses_hidden:]) != CONFIDENCE_FEATURES or set(state) != {"weight", "bias"}:
        raise CheckpointError(f"{path} is not a scorer of known features: build one with `ssv-build scorer`")
    expected = len(CONFIDENCE_FEATURES) + (hidden_size if uses_hidden else 0)
    if state["weight"].shape != (expected,):
        raise CheckpointError(
            f"{path}: scorer over {state['weight'].numel()} features, the draft's hidden size {hidden_size} gives {expected}"
        )
    return Scorer(state["weight"].float(), state["bias"].float().reshape(()), uses_hidden)
