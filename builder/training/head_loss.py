"""The loss of an LM head against a target's distribution, with its gradient made in the same pass.

At some ten thousand rows of as many logits training is bound by memory traffic. So logits are made a part of the rows
at a time; each is read once, its gradient takes its place, and what is kept for the backward pass is as wide as the
hidden state.

Shapes: N rows, H hidden, X = H + rank of a trained correction, V LM head rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 8192
"""Rows whose logits are there at a time: at 16,384 LM head rows in bf16, 268 MB, and as much of labels."""


def head_loss_(
    logits_RV: Tensor, label_RV: Tensor, weight_R: Tensor, loss_R: Tensor, agrees_R: Tensor, tv_share: float
) -> None:
    """Loss of each row, whether both have the same argmax, and in place of the logits the loss's gradient.

    The loss is `tv_share` of total variation, 1 - sum min(p, q), which is what a draft loses of being accepted, and the
    rest of cross-entropy, both to the labels' softmax p.

    Args:
        logits_RV, label_RV: logits, contiguous.
        weight_R: fp32, that loss and gradient of a row are multiplied by.
        loss_R, agrees_R: fp32 and int8, written.
    """
    if logits_RV.is_cuda:
        from ssv.builder.training import kernels  # where there is no GPU there need be no Triton

        kernels.head_loss_(logits_RV, label_RV, weight_R, loss_R, agrees_R, tv_share)
        return
    p_RV, log_q_RV = label_RV.float().softmax(-1), logits_RV.float().log_softmax(-1)
    q_RV = log_q_RV.exp()
    is_below_RV = q_RV < p_RV
    variation_R = 1 - torch.minimum(p_RV, q_RV).sum(-1)
    loss_R.copy_(weight_R * (tv_share * variation_R - (1 - tv_share) * (p_RV * log_q_RV).sum(-1)))
    agrees_R.copy_(logits_RV.argmax(-1) == label_RV.argmax(-1))
    below_R1 = (q_RV * is_below_RV).sum(-1, keepdim=True)
    gradient_RV = (1 - tv_share) * (q_RV - p_RV) + tv_share * q_RV * (below_R1 - is_below_RV.float())
    logits_RV.copy_(weight_R[:, None] * gradient_RV)


class HeadLoss(torch.autograd.Function):
    """Sum of the rows' losses, and for each whether draft and target have the same argmax."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NX: Tensor,
        fixed_VH: Tensor,
        trained_VR: Tensor | None,
        label_NV: Tensor,
        weight_N: Tensor,
        tv_share: float,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and int8 [N].

        Args:
            x_NX: what the LM head sees; beside the normed hidden state what `trained_VR` sees.
            fixed_VH: rows that are not trained, of the type that the logits get.
            trained_VR: columns that are.
            label_NV: the target's logits.
            weight_N: fp32.
        """
        dtype = fixed_VH.dtype
        head_VX = fixed_VH if trained_VR is None else torch.cat((fixed_VH, trained_VR.to(dtype)), dim=1)
        x = x_NX.to(dtype)
        grad_NX = torch.empty_like(x)
        grad_VR = None if trained_VR is None else torch.zeros_like(trained_VR, dtype=torch.float32)
        loss_N = torch.empty(len(x), device=x.device)
        agrees_N = torch.empty(len(x), dtype=torch.int8, device=x.device)
        for start in range(0, len(x), _CHUNK):
            rows = slice(start, start + _CHUNK)
            logits_RV = x[rows] @ head_VX.T
            head_loss_(logits_RV, label_NV[rows], weight_N[rows], loss_N[rows], agrees_N[rows], tv_share)
            torch.mm(logits_RV, head_VX, out=grad_NX[rows])
            if grad_VR is not None:
                grad_VR += logits_RV.T @ x[rows, fixed_VH.shape[1] :]
        ctx.save_for_backward(grad_NX, grad_VR)
        ctx.dtypes = (x_NX.dtype, None if trained_VR is None else trained_VR.dtype)
        ctx.mark_non_differentiable(agrees_N)
        return loss_N.sum(), agrees_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_NX, grad_VR = ctx.saved_tensors
        x_dtype, trained_dtype = ctx.dtypes
        of_trained = None if grad_VR is None else (grad_VR * grad).to(trained_dtype)
        return (grad_NX * grad.to(grad_NX.dtype)).to(x_dtype), None, of_trained, None, None, None
