"""FP8 and INT4 weights as the kernels read them: unpacked as decoder.cu does it, they are the quantized layer's."""

from __future__ import annotations

import pytest
import torch
from quantized_weights import pack_int4 as rounded_int4
from torch import Tensor, nn

from ssv.model.quantized import AwqLinear, Fp8Linear
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.engines.cuda.packing import GROUP_SIZES, interleave, misfit, pack, packed
from ssv.runtime.engines.cuda.weights import Linear

SHAPES = [(16, 128), (48, 384), (22, 640)]


def awq(outputs: int, inputs: int, group: int, factor_I: Tensor | None = None) -> AwqLinear:
    torch.manual_seed(outputs + inputs + group)
    values, scale_OG = rounded_int4(torch.randn(outputs, inputs) * torch.rand(outputs, 1), group)
    return AwqLinear(values, scale_OG, factor_I, None)


def fp8(outputs: int, inputs: int) -> Fp8Linear:
    torch.manual_seed(outputs + inputs)
    codes = torch.randint(0, 256, (outputs, inputs), dtype=torch.uint8)  # subnormals and both zeros among them
    codes[codes & 0x7F == 0x7F] = 0x7E
    return Fp8Linear(codes.view(torch.float8_e4m3fn), torch.rand(outputs) + 0.1, torch.tensor(0.05), None)


def bf16_of(bits: Tensor) -> Tensor:
    """Numbers from their 16 bits, as int32."""
    return (bits << 16).view(torch.float32)


def halves(word: Tensor) -> Tensor:
    """The lower and the upper 16 bits of words, [..., 2]."""
    return torch.stack((word & 0xFFFF, word >> 16 & 0xFFFF), dim=-1)


def words(pieces: Tensor) -> Tensor:
    """Bytes of lanes as 32-bit words, in int64."""
    return pieces.contiguous().view(torch.int32).long() & 0xFFFFFFFF


def widened_fp8(weight: Tensor) -> Tensor:
    """Fragments [tile, pair, product, lane, register, 2], as `fragment` makes them."""
    word = words(weight).unflatten(-1, (2, 2))  # [tile, pair, lane, product, half of K]
    registers = torch.stack(
        [
            (word << 8 & 0x80008000) | (word << 4 & 0x07F007F0),
            (word & 0x80008000) | (word >> 4 & 0x07F007F0),
        ],
        dim=-1,
    ).flatten(-2)
    return (bf16_of(halves(registers).int()) * 2.0**120).permute(0, 1, 3, 2, 4, 5)


def widened_int4(weight: Tensor) -> Tensor:
    word = words(weight).unflatten(-1, (2, 2))  # [tile, two pairs, lane, pair, product]
    registers = torch.stack([(word >> 4 * r & 0x000F000F) | 0x43004300 for r in range(4)], dim=-1)
    return (bf16_of(halves(registers).int()) - 136).permute(0, 1, 3, 4, 2, 5, 6).flatten(1, 2)


def unpacked(fragments: Tensor) -> Tensor:
    """The weight [N, K] of fragments [tile, pair, product, lane, register, 2]: what `pack` undoes."""
    tiles, pairs = fragments.shape[:2]
    parts = fragments.reshape(tiles, pairs, 2, 8, 4, 2, 2, 2)  # [.., row, quarter, half of K, half of rows, channel]
    return parts.permute(0, 6, 3, 1, 4, 2, 5, 7).reshape(tiles * 16, pairs * 32)


def test_unpacking_undoes_packing() -> None:
    weight = torch.arange(64 * 96).view(64, 96) % 251
    fragments = pack(weight.float()).float()
    assert torch.equal(unpacked(fragments.view(*fragments.shape[:4], 4, 2)), weight.float())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (32, 96)])
def test_fp8(shape: tuple[int, int], gated: bool) -> None:
    if gated and shape[0] % 16:
        return
    layer = fp8(*shape)
    found = packed(layer, gated=gated)
    assert found.scale is not None and found.macros["BITS"] == 8
    weight = unpacked(widened_fp8(found.weight)) * found.scale[:, None]
    expected = layer.dequantized()
    assert torch.equal(weight[: shape[0]], interleave(expected) if gated else expected)
    assert not weight[shape[0] :].any()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("shape", [*SHAPES, (32, 96), (16, 1056)])
def test_int4(shape: tuple[int, int], group: int, gated: bool) -> None:
    if shape[1] % group or (gated and shape[0] % 16):
        return
    layer = awq(*shape, group)
    found = packed(layer, gated=gated)
    assert found.scale is not None and found.groups == shape[1] // group
    assert found.macros["GROUP_PAIRS"] == group // 32
    # [tile, group, row, half of the rows]
    scale_NG = found.scale.permute(0, 3, 2, 1).reshape(-1, found.groups)
    values_NK = unpacked(widened_int4(found.weight))
    weight = values_NK[:, : shape[1]] * scale_NG.repeat_interleave(group, dim=1)
    expected = layer.dequantized()
    assert torch.equal(weight[: shape[0]], interleave(expected) if gated else expected)
    assert not weight[shape[0] :].any() and not values_NK[: shape[0], shape[1] :].any()


@pytest.mark.parametrize("inputs", [32, 64, 576, 1536, 2048, 4096, 14336])
@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4"])
def test_every_pair_is_one_warps_and_groups_are_not_cut(kind: str, inputs: int) -> None:
    group = next(size for size in reversed(GROUP_SIZES) if inputs % size == 0)
    layer = {"bf16": lambda: nn.Linear(inputs, 16), "fp8": lambda: fp8(16, inputs)}.get(
        kind, lambda: awq(16, inputs, group)
    )()
    found = Linear(layer)
    pairs = inputs // 32
    assert found.share * (found.warps - 1) < pairs <= found.share * found.warps
    assert found.warps <= 16
    if kind == "int4":
        assert found.share % (group // 32) == 0 and found.share % 2 == 0


def test_factors_of_inputs_go_into_the_norm_before() -> None:
    factor_I = torch.rand(64) + 0.5
    layer = Linear(awq(16, 64, 32, factor_I))
    assert torch.equal(layer.scaled(torch.full((64,), 2.0)), 2 * factor_I)
    assert torch.equal(Linear(awq(16, 64, 32)).scaled(torch.ones(64)), torch.ones(64))


def test_what_cannot_be_packed_is_told_by_name() -> None:
    assert "scales of 16 INT4 weights" in str(misfit(awq(16, 64, 16)))
    assert "48 inputs" in str(misfit(nn.Linear(48, 16)))
    assert misfit(fp8(16, 64)) is None and misfit(awq(16, 96, 32)) is None
    with pytest.raises(EngineError, match="scales of 256"):
        packed(awq(16, 256, 256))
    damaged = fp8(16, 64)
    damaged.values_OI.view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(EngineError, match="no number"):
        packed(damaged)
