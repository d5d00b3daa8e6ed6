"""Tokens drawn on the GPU from any logits, by the kernel that draws in rounds which the engines run by themselves."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from ssv.runtime.engines.cuda import places
from ssv.runtime.engines.cuda.launching import SAMPLING, Draw, address, kernels_of


@torch.inference_mode()
def drawn(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    seed_R: Tensor,
    position_R: Tensor,
    token_V: Tensor | None,
) -> Tensor:
    """The column that each row chooses; see `choose` of `ssv.runtime.decode.sampling`, whose settings these are.

    Args:
        logits_RV: on the GPU; fp16, bf16 or fp32.
        temperature_R, top_k_R, top_p_R, seed_R, position_R: on the CPU.
        token_V: int64, on the GPU.

    Returns:
        int32 [R] on the GPU; -1 where logits are no distribution.

    Raises:
        CompileError: NVRTC is not found.
    """
    logits_RV = logits_RV.float().contiguous()
    # Each is a row of a cache, and sees one key.
    settings = places.settings(*(x.numpy() for x in (temperature_R, top_k_R, top_p_R, seed_R, position_R - 1)))
    settings_RS = torch.from_numpy(settings).to(logits_RV.device)
    column_R = torch.empty(len(logits_RV), dtype=torch.int64, device=logits_RV.device)
    kernel = kernels_of(logits_RV.device, "sample", SAMPLING)["draw"]
    stream = torch.cuda.current_stream(logits_RV.device).cuda_stream
    for first in range(0, len(logits_RV), places.TOKENS):
        rows = slice(first, first + places.TOKENS)
        argument = Draw(
            _step_of(len(logits_RV[rows]), logits_RV.device).data_ptr(), logits_RV[rows].data_ptr(), address(token_V),
            settings_RS[rows].data_ptr(), column_R[rows].data_ptr(), logits_RV.shape[1], 1,
        )  # fmt: skip
        kernel.launch(argument, (len(logits_RV[rows]), 1, 1), 1024, stream, overlaps=False)
    return column_R.int()


@cache
def _step_of(num: int, device: torch.device) -> Tensor:
    """The numbers of a step of so many rows of one token."""
    numbers, rows = np.zeros(places.SIZE, dtype=np.int32), range(num)
    (block,) = places.blocks([1] * num)
    places.write(numbers, block, np.zeros((num, 1), dtype=np.int64), [0] * num, 0, rows, None, 1)
    return torch.from_numpy(numbers).to(device)
