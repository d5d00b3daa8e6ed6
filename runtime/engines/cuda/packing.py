"""Weights as the kernels of `ssv.plugins.cuda` read them: bf16, FP8 or INT4, as fragments of tensor cores.

Shapes: N output channels, K input channels, G groups of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssv.model.quantized import AwqLinear, Fp8Linear, QuantizedLinear
from ssv.runtime.engines.contract import EngineError

TILE, PAIR = 16, 32
"""Output channels of a block, and input channels that two products of a tensor core (m16n8k16) take."""

GROUP_SIZES = (32, 64, 128)
"""Input channels that share a scale of INT4 weights."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A layer's weights.

    Attributes:
        weight: fragments, see `pack`, `pack_fp8` and `pack_int4`.
        scale: fp32; of FP8 [N], of INT4 [N / 16, G, 8, 2], N padded to a multiple of 16; None of bf16.
        groups: G; 0 unless INT4.
        macros: what the kernels of products are specialised to for them.
        unit: pairs that the same warp has to take.
    """

    weight: Tensor
    scale: Tensor | None
    groups: int
    macros: Mapping[str, int]
    unit: int


def inputs_of(layer: nn.Module) -> int:
    """K of a linear layer, quantized or not."""
    assert isinstance(layer, (nn.Linear, QuantizedLinear))
    return layer.shape[1] if isinstance(layer, QuantizedLinear) else layer.in_features


def misfit(layer: nn.Module) -> str | None:
    """Why a layer's weights cannot be packed; None if they can."""
    if isinstance(layer, AwqLinear) and layer.group_size not in GROUP_SIZES:
        return f"scales of {layer.group_size} INT4 weights: the kernels have {', '.join(map(str, GROUP_SIZES))}"
    inputs = inputs_of(layer)
    return f"a product of {inputs} inputs, no multiple of {PAIR}" if inputs % PAIR else None


def packed(layer: nn.Module, *, gated: bool = False) -> Packed:
    """The weights of a linear layer, quantized or not, without their bias and without factors of inputs.

    Args:
        gated: gate's rows, and up's behind them, take turns (`interleave`).

    Raises:
        EngineError: `misfit`, or an FP8 weight that is no number.
    """
    if (reason := misfit(layer)) is not None:
        raise EngineError(f"the CUDA kernels cannot run this model: {reason}")

    def ordered(rows: Tensor) -> Tensor:
        return interleave(rows) if gated else rows

    if isinstance(layer, Fp8Linear):
        values_NK = ordered(layer.values_OI.view(torch.uint8))
        if bool((values_NK & 0x7F == 0x7F).any()):
            raise EngineError("an FP8 weight is no number: the checkpoint is damaged")
        return Packed(pack_fp8(values_NK), pad_rows(ordered(layer.scale_O)), 0, {"BITS": 8}, 1)
    if isinstance(layer, AwqLinear):
        scale_NG, pairs = ordered(layer.scale_OG), layer.group_size // PAIR
        weight, groups = pack_int4(ordered(layer.values())), scale_NG.shape[1]
        return Packed(weight, pack_scales(scale_NG), groups, {"BITS": 4, "GROUP_PAIRS": pairs}, 4)
    assert isinstance(layer, nn.Linear)
    return Packed(pack(ordered(layer.weight)), None, 0, {"BITS": 16}, 1)


def pack(weight_NK: Tensor) -> Tensor:
    """A weight as A fragments of mma.m16n8k16, bf16 [N / 16, K / 32, 2, 32, 8], N padded with zeros.

    A lane's eight values of a fragment are those of its two rows and of input channels that lie together: lane q of
    four multiplies channels 8 q to 8 q + 7 of a pair, so that it reads the other operand in pieces of 16 bytes.

    Args:
        weight_NK: K a multiple of 32.
    """
    fragments = _fragments(weight_NK.to(torch.bfloat16))
    return fragments.contiguous().view(*fragments.shape[:3], 32, 8)


def pack_fp8(values_NK: Tensor) -> Tensor:
    """The same of FP8 (E4M3), uint8 [N / 16, K / 32, 32, 16]: a lane has 16 bytes for both products of a pair.

    Of four bytes the first and the third are one register of a fragment, the second and the fourth the next one.

    Args:
        values_NK: uint8, K a multiple of 32.
    """
    parts = _fragments(values_NK).permute(0, 1, 3, 4, 2, 5, 7, 6)
    return parts.contiguous().view(parts.shape[0], parts.shape[1], 32, 16)


def pack_int4(values_NK: Tensor) -> Tensor:
    """The same of INT4, uint8 [N / 16, K / 64, 32, 16]: a lane has 16 bytes for the four products of two pairs.

    Four bytes are a fragment, each number with 8 added; register r of it is bits 4 r to 4 r + 3 of their halves.

    Args:
        values_NK: int8, from -8 to 7; K a multiple of 32, padded to one of 64 with zeros.
    """
    parts = _fragments(F.pad(values_NK, (0, -values_NK.shape[1] % (2 * PAIR))) + 8)
    parts = parts.unflatten(1, (-1, 2)).permute(0, 1, 4, 5, 2, 3, 8, 6, 7).contiguous()
    nibbles = parts.view(torch.uint8).view(parts.shape[0], parts.shape[1], 32, 16, 2)
    return nibbles[..., 0] | nibbles[..., 1] << 4


def pack_scales(scale_NG: Tensor) -> Tensor:
    """Scales of INT4's groups, fp32 [N / 16, G, 8, 2]: those of a lane's two rows lie together; N padded with zeros."""
    return pad_rows(scale_NG).view(-1, 2, 8, scale_NG.shape[1]).permute(0, 3, 2, 1).contiguous()


def pad_rows(rows: Tensor) -> Tensor:
    """With as many rows of zeros behind them as make a multiple of 16."""
    return F.pad(rows, (0,) * (2 * rows.ndim - 1) + (-len(rows) % TILE,)).contiguous()


def interleave(gate_up_NK: Tensor) -> Tensor:
    """Gate's and up's rows by turns of eight, so that a lane has both of a channel. Also of a bias."""
    gate, up = (half.unflatten(0, (-1, 8)) for half in gate_up_NK.chunk(2))
    return torch.stack((gate, up), dim=1).flatten(0, 2)


def _fragments(values_NK: Tensor) -> Tensor:
    """[tile, pair, product, row, lane's quarter of channels, half of these, half of the tile's rows, channel]."""
    inputs = values_NK.shape[1]
    assert inputs % PAIR == 0
    # [tile, half of its rows, row, pair, lane, product, half of its channels, channel]
    parts = pad_rows(values_NK).view(-1, 2, 8, inputs // PAIR, 4, 2, 2, 2)
    return parts.permute(0, 3, 5, 2, 4, 6, 1, 7)
