"""The ops wherever their tensors are: Triton kernels on CUDA, the definition elsewhere.

This is the one place that chooses.

    from ssv.plugins import ops
    chosen = ops.on(logits.device).choose(logits, seeds, positions)
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ssv.plugins import reference
from ssv.plugins.contract import Score


class Ops(Protocol):
    """The ops; `ssv.plugins.reference` describes and defines them."""

    def score(self, hidden_RH: Tensor, logits_RV: Tensor, weight_F: Tensor, bias_1: Tensor) -> Score: ...

    def sparse_gather(
        self, hidden_MH: Tensor, row_R: Tensor, weight_H: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...

    def choose(self, x_RV: Tensor, seed_R: Tensor, position_R: Tensor, token_V: Tensor | None = None) -> Tensor: ...


def on(device: torch.device) -> Ops:
    """The ops for tensors on a device.

    Raises:
        ImportError: CUDA without Triton, which PyTorch's CUDA builds bring along.
    """
    if device.type != "cuda":
        return reference
    from ssv.plugins import launch  # where there is no GPU there need be no Triton

    return launch
