"""Weights as the kernels of `ssv.plugins.cuda` read them.

Shapes: N output channels, K input channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE, PAIR = 16, 32
"""Output channels of a block, and input channels that two products of a tensor core (m16n8k16) take."""


def pack(weight_NK: Tensor) -> Tensor:
    """A weight as A fragments of mma.m16n8k16, bf16 [N / 16, K / 32, 2, 32, 8], N padded with zeros.

    A lane's eight values of a fragment are those of its two rows and of input channels that lie together: lane q of
    four multiplies channels 8 q to 8 q + 7 of a pair, so that it reads the other operand in pieces of 16 bytes.

    Args:
        weight_NK: K a multiple of 32.
    """
    outputs, inputs = weight_NK.shape
    assert inputs % PAIR == 0
    padded = F.pad(weight_NK.to(torch.bfloat16), (0, 0, 0, -outputs % TILE))
    # [tile, half of its rows, row, pair, lane, product, half of its channels, channel]
    parts = padded.view(-1, 2, 8, inputs // PAIR, 4, 2, 2, 2)
    return parts.permute(0, 3, 5, 2, 4, 6, 1, 7).contiguous().view(-1, inputs // PAIR, 2, 32, 8)


def interleave(gate_up_NK: Tensor) -> Tensor:
    """Gate's and up's rows by turns of eight, so that a lane has both of a channel. Also of a bias."""
    gate, up = (half.unflatten(0, (-1, 8)) for half in gate_up_NK.chunk(2))
    return torch.stack((gate, up), dim=1).flatten(0, 2)
