"""The ops wherever their tensors are: by Triton kernels on CUDA, by the definition elsewhere. The one place that chooses.

    from ssv.plugins import ops
    verdicts = ops.on(logits.device).verify_greedy(logits, rows, starts, drafted)

May import: ssv.plugins.contract, .launch, .reference.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ssv.plugins import reference
from ssv.plugins.contract import Judged, Score, Verdicts


class Ops(Protocol):
    """The ops; `ssv.plugins.reference` describes and defines them."""

    def score(self, hidden_RH: Tensor, logits_RV: Tensor, weight_F: Tensor, bias_1: Tensor) -> Score: ...

    def gather_norm(self, hidden_MH: Tensor, row_R: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    def sparse_gather(
        self, hidden_BTH: Tensor, zone_BT: Tensor, length_B: Tensor, weight_H: Tensor, eps: float
    ) -> Judged: ...

    def verify_greedy(self, logits_RV: Tensor, row_R: Tensor, start_B1: Tensor, drafted_BK: Tensor) -> Verdicts: ...

    def verify_sampled(
        self,
        target_prob_RV: Tensor,
        draft_prob_BKV: Tensor,
        row_R: Tensor,
        start_B1: Tensor,
        drafted_BK: Tensor,
        accept_uniform_BK: Tensor,
        next_uniform_B: Tensor,
    ) -> Verdicts: ...

    def draw(self, prob_RV: Tensor, uniform_R: Tensor) -> Tensor: ...


def on(device: torch.device) -> Ops:
    """The ops for tensors on a device.

    Raises:
        ImportError: CUDA without Triton, which PyTorch's CUDA builds bring along.
    """
    if device.type != "cuda":
        return reference
    from ssv.plugins import launch  # where there is no GPU there need be no Triton

    return launch
