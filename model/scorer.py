"""The criticality scorer: one linear layer and a sigmoid over what the draft's forward pass already has.

Features of a drafted token, in this order: the draft's hidden state (before its final norm, divided by its root mean
square), then log(1 - p1), entropy in nats, and log p1 - log p2, with p1 and p2 the two largest of the draft's
probabilities at temperature 1. The op `score` of `ssv.plugins` computes them, and defines what degenerate logits give.

Shapes: R drafted tokens, H hidden of the draft, V draft vocab, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ssv.model.checkpoint import CheckpointError, read_safetensors
from ssv.plugins.contract import Score
from ssv.plugins.ops import on
from ssv.support.files import save_whole

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

    def __call__(self, hidden_RH: Tensor, logits_RV: Tensor) -> Score:
        """What is read off a draft's output: each row's argmax, how sure it is, and its reject probability."""
        return on(logits_RV.device).score(hidden_RH, logits_RV, self.weight_F, self.bias.reshape(1))

    def to(self, device: torch.device | str) -> Scorer:
        """The same scorer with its weights on a device."""
        return Scorer(self.weight_F.to(device), self.bias.to(device), self.uses_hidden)


def save_scorer(scorer: Scorer, path: Path) -> None:
    """Writes weight and bias; the feature list goes to the metadata."""
    features = (["hidden"] if scorer.uses_hidden else []) + list(CONFIDENCE_FEATURES)
    save_whole(
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
        raise CheckpointError(f"{path} is not a scorer of known features", "build one with `ssv-build scorer`")
    expected = len(CONFIDENCE_FEATURES) + (hidden_size if uses_hidden else 0)
    if state["weight"].shape != (expected,):
        raise CheckpointError(
            f"{path}: scorer over {state['weight'].numel()} features, the draft's hidden size {hidden_size} gives "
            f"{expected}"
        )
    return Scorer(state["weight"].float(), state["bias"].float().reshape(()), uses_hidden)
