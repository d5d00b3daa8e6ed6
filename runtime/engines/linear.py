"""Linear layers with quantized weights on a CPU: 8 or 4 bits, activations of 8 bits.

Weights of 8 bits have a scale for each output channel; weights of 4 bits a scale and a minimum for each block of 32
input channels, in fp16, as GGUF's Q4_1 has them. Activations have a scale for each row and block of 32 channels: an
outlier costs its block precision, and not its row.

A row's result depends neither on the rows beside it nor on the processor. `multiply_blocks` is the definition;
`_linear_any.c` and its siblings have the kernels, and `SSV_CPU_KERNELS` names those that are used (`avx512_vnni`,
`avx2`, `neon_dot`, `any`; default: the best that run here).

Shapes: M rows, I inputs, O outputs, G blocks of inputs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssv.runtime.engines.contract import EngineError
from ssv.runtime.engines.huge_pages import weight_memory

BLOCK = 32
_TILE = 16
_LEVELS = 127.0
_LEAST = 1e-30
_ROWS = 512
"""Outputs that are packed at a time: in fp32 they stay in the processor's cache."""

if importlib.util.find_spec("ssv.runtime.engines._cpu") is not None:
    from ssv.runtime.engines import _cpu, _linear
else:  # installed where there was no C compiler; one that is there and does not load is an error
    _cpu = _linear = None  # type: ignore[assignment]


# --- The definition -------------------------------------------------------------------------------------------------


def quantize_blocks(x_MI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in whole numbers of at most 127, int8 [M, G, BLOCK], and the scales of their blocks, fp32 [M, G].

    A block whose largest magnitude is below 1e-30 is zero. Halves are rounded to even.
    """
    x_MGB = F.pad(x_MI, (0, -x_MI.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest_MG = x_MGB.abs().amax(dim=2)
    largest_MG = largest_MG.where(largest_MG >= _LEAST, 0.0)
    factor_MG = (_LEVELS / largest_MG).where(largest_MG > 0, 0.0)
    return (x_MGB * factor_MG[..., None]).round().to(torch.int8), largest_MG / _LEVELS


def multiply_blocks(
    values_MGB: Tensor,
    scale_MG: Tensor,
    weight_OGB: Tensor,
    weight_scale_OG: Tensor | None = None,
    weight_least_OG: Tensor | None = None,
) -> Tensor:
    """The product of quantized rows and weights, fp32 [M, O], before the scale of 8-bit outputs and the bias.

    Block after block, with fused multiply-adds: here as sums in fp64, each rounded to fp32 (once in 2^29 that differs
    from rounding once).

    Args:
        weight_OGB: whole numbers: -127 to 127, or 0 to 15 with the scales and minimums of their blocks.
    """
    dots_GMO = torch.einsum("mgb,ogb->gmo", values_MGB.double(), weight_OGB.double())
    sum_MG = values_MGB.sum(dim=2, dtype=torch.int32).float()
    y_MO = torch.zeros(dots_GMO.shape[1:])
    for g, dots_MO in enumerate(dots_GMO):
        x_M1 = scale_MG[:, g, None]
        if weight_scale_OG is None or weight_least_OG is None:
            y_MO = (dots_MO * x_M1.double() + y_MO).float()
            continue
        offset_M1 = (x_M1 * sum_MG[:, g, None]).double()
        y_MO = (weight_least_OG[:, g].double() * offset_M1 + y_MO).float()
        y_MO = (weight_scale_OG[:, g].double() * (dots_MO.float() * x_M1).double() + y_MO).float()
    return y_MO


def int8_scale(weight_OI: Tensor) -> Tensor:
    """Scale of each output channel, [O, 1]."""
    # Without the copy that abs() is.
    largest_O1 = torch.maximum(weight_OI.amax(dim=1, keepdim=True), -weight_OI.amin(dim=1, keepdim=True))
    return largest_O1.clamp(min=1e-12) / 127


def int4_scales(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each block, fp16 [O, G]: 16 levels from its smallest weight to its largest. What GGUF's Q4_1
    holds comes back as it is there.

    Raises:
        EngineError: a block's range or minimum is beyond fp16.
    """
    missing = -weight_OI.shape[1] % BLOCK
    if missing:
        weight_OI = torch.cat((weight_OI, weight_OI[:, -1:].expand(-1, missing)), dim=1)
    weight_OGB = weight_OI.unflatten(1, (-1, BLOCK))
    low_OG, high_OG = weight_OGB.amin(dim=2), weight_OGB.amax(dim=2)
    scale_OG, least_OG = ((high_OG - low_OG) / 15).half(), low_OG.half()
    if not (scale_OG.isfinite().all() and least_OG.isfinite().all()):
        raise EngineError("a weight is too large for precision int4, whose scales are fp16", "use int8, bf16 or fp32")
    return scale_OG, least_OG


def int8_values(weight_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """Whole numbers, int8 [O, I]."""
    return (weight_OI / scale_O1).round().to(torch.int8)


def int4_values(weight_OI: Tensor, scale_OG: Tensor, least_OG: Tensor) -> Tensor:
    """Whole numbers, uint8 [O, I]."""
    scale_OI, least_OI = (of_each_input(x_OG, weight_OI.shape[1]) for x_OG in (scale_OG, least_OG))
    return ((weight_OI - least_OI) / scale_OI.where(scale_OI > 0, 1.0)).round().clamp(0, 15).to(torch.uint8)


def of_each_input(x_OG: Tensor, inputs: int) -> Tensor:
    """What blocks have, for each of their inputs, fp32 [O, I]."""
    return x_OG.float().repeat_interleave(BLOCK, dim=1)[:, :inputs]


# --- Packing --------------------------------------------------------------------------------------------------------


def pack_int8(weight_OI: Tensor, scale_O1: Tensor, packed_TGX: Tensor) -> None:
    """Packs whole tiles of outputs, the last of which may have fewer."""
    outputs, inputs = weight_OI.shape
    if _linear is not None:
        _linear.pack(weight_OI.data_ptr(), outputs, inputs, scale_O1.data_ptr(), 0, 0, 0, packed_TGX.data_ptr())
        return
    tiles_TGSOB = _in_tiles(int8_values(weight_OI, scale_O1))
    packed_TGX.copy_(tiles_TGSOB.flatten(2).view(torch.uint8) ^ 128)


def pack_int4(weight_OI: Tensor, scale_OG: Tensor, least_OG: Tensor, packed_TGX: Tensor) -> None:
    """The same of 4-bit weights."""
    outputs, inputs = weight_OI.shape
    if _linear is not None:
        scale32_OG, least32_OG = scale_OG.float(), least_OG.float()
        tensors = (scale32_OG, least32_OG, scale_OG, least_OG, packed_TGX)
        _linear.pack(weight_OI.data_ptr(), outputs, inputs, *(tensor.data_ptr() for tensor in tensors))
        return
    tiles_TGSOB = _in_tiles(int4_values(weight_OI, scale_OG, least_OG))
    halves_2OG = F.pad(torch.stack((scale_OG, least_OG)), (0, 0, 0, -outputs % _TILE))
    halves_TG2O = halves_2OG.unflatten(1, (-1, _TILE)).permute(1, 3, 0, 2).flatten(2)
    bytes_TGX = (tiles_TGSOB[:, :, ::2] | (tiles_TGSOB[:, :, 1::2] << 4)).flatten(2)
    packed_TGX.copy_(torch.cat((halves_TG2O.contiguous().view(torch.uint8), bytes_TGX), dim=2))


def _in_tiles(whole_OI: Tensor) -> Tensor:
    """[O, I] as [T, G, S, _TILE, 4]: tiles of outputs, blocks of inputs, steps of four of them."""
    outputs, inputs = whole_OI.shape
    whole_OI = F.pad(whole_OI, (0, -inputs % BLOCK, 0, -outputs % _TILE))
    return whole_OI.unflatten(0, (-1, _TILE)).unflatten(2, (-1, BLOCK // 4, 4)).permute(0, 2, 3, 1, 4)


def _of_tiles(whole_TGSOB: Tensor) -> Tensor:
    """The reverse, as [O, G, BLOCK]."""
    return whole_TGSOB.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(2)


def _part_of(packed_TGX: Tensor, first_output: int) -> Tensor:
    return packed_TGX[first_output // _TILE : (first_output + _ROWS) // _TILE]


# --- Layers ---------------------------------------------------------------------------------------------------------


class LinearStruct(ctypes.Structure):
    """`Linear` of _linear.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
    )


class Rows:
    """Room for quantized rows, as the kernels read them (`Rows` of _linear.h)."""

    def __init__(self, num_rows: int, inputs: int) -> None:
        self.blocks = -(-inputs // BLOCK)
        self.values_MGB = torch.empty(num_rows, self.blocks, BLOCK, dtype=torch.int8)
        self.scale_MG, self.offset_MG = torch.empty(2, num_rows, self.blocks)
        self.sum_MG = torch.empty(num_rows, self.blocks, dtype=torch.int32)
        self.addresses = (
            self.values_MGB.data_ptr(), self.scale_MG.data_ptr(), self.offset_MG.data_ptr(), self.sum_MG.data_ptr()
        )  # fmt: skip


class PackedLinear(nn.Module):
    """A linear layer whose weights are packed for the kernels.

    Attributes:
        struct: what the kernels read; it points into this layer's tensors.
    """

    def __init__(self, outputs: int, inputs: int, bias_O: Tensor | None, block_bytes: int, has_scale: bool) -> None:
        super().__init__()
        self.outputs, self.inputs, self.bias_O = outputs, inputs, bias_O
        tiles, blocks = -(-outputs // _TILE), -(-inputs // BLOCK)
        self.packed_TGX = weight_memory(tiles * blocks * block_bytes).view(tiles, blocks, block_bytes)
        self.scale_O = torch.zeros(tiles * _TILE) if has_scale else None
        self.struct = LinearStruct(
            self.packed_TGX.data_ptr(),
            None if self.scale_O is None else self.scale_O.data_ptr(),
            None if bias_O is None else bias_O.data_ptr(),
            outputs,
            blocks,
        )

    def forward(self, x_XI: Tensor) -> Tensor:
        """Rows of any leading dimensions, fp32."""
        x_MI = x_XI.reshape(-1, self.inputs).contiguous()
        if _linear is None:
            return self.by_definition(x_MI).view(*x_XI.shape[:-1], self.outputs)
        rows, y_MO = Rows(len(x_MI), self.inputs), torch.empty(len(x_MI), self.outputs)
        _cpu.linear(
            ctypes.addressof(self.struct), *rows.addresses, x_MI.data_ptr(), self.inputs, len(x_MI), y_MO.data_ptr()
        )
        return y_MO.view(*x_XI.shape[:-1], self.outputs)

    def by_definition(self, x_MI: Tensor) -> Tensor:
        """What `forward` computes, from the same packed weights."""
        raise NotImplementedError


class Int8Linear(PackedLinear):
    """8-bit weights."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, input_factor_I: Tensor | None = None) -> None:
        """Rounds weights to 8 bits and packs them.

        Args:
            weight_OI: of any floating type.
            input_factor_I: what `forward` multiplies each input with.
        """
        outputs, inputs = weight_OI.shape
        super().__init__(outputs, inputs, bias_O, _TILE * BLOCK, has_scale=True)
        self._input_factor_I = input_factor_I
        assert self.scale_O is not None
        for start in range(0, self.outputs, _ROWS):
            part_OI = weight_OI[start : start + _ROWS].float()
            scale_O1 = int8_scale(part_OI)
            self.scale_O[start : start + len(part_OI)] = scale_O1[:, 0]
            pack_int8(part_OI, scale_O1, _part_of(self.packed_TGX, start))

    def forward(self, x_XI: Tensor) -> Tensor:
        return super().forward(x_XI if self._input_factor_I is None else x_XI * self._input_factor_I)

    def by_definition(self, x_MI: Tensor) -> Tensor:
        assert self.scale_O is not None
        weight_TGSOB = (self.packed_TGX ^ 128).view(torch.int8).view(*self.packed_TGX.shape[:2], -1, _TILE, 4)
        y_MO = multiply_blocks(*quantize_blocks(x_MI), _of_tiles(weight_TGSOB))[:, : self.outputs]
        return _with_bias(y_MO * self.scale_O[: self.outputs], self.bias_O)


class Int4Linear(PackedLinear):
    """4-bit weights."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        """Rounds weights to 4 bits and packs them.

        Args:
            weight_OI: of any floating type.

        Raises:
            EngineError: see `int4_blocks`.
        """
        outputs, inputs = weight_OI.shape
        super().__init__(outputs, inputs, bias_O, _TILE * (BLOCK // 2 + 4), has_scale=False)
        for start in range(0, self.outputs, _ROWS):
            part_OI = weight_OI[start : start + _ROWS].float()
            pack_int4(part_OI, *int4_scales(part_OI), _part_of(self.packed_TGX, start))

    def by_definition(self, x_MI: Tensor) -> Tensor:
        head = 4 * _TILE
        halves_TG2O = self.packed_TGX[:, :, :head].contiguous().view(torch.float16).unflatten(2, (2, _TILE))
        scale_OG, least_OG = (halves_TG2O[:, :, i].transpose(1, 2).flatten(0, 1).float() for i in range(2))
        both_TGSOB = self.packed_TGX[:, :, head:].unflatten(2, (-1, _TILE, 4))
        weight_TGSOB = torch.stack((both_TGSOB & 15, both_TGSOB >> 4), dim=3).flatten(2, 3)
        y_MO = multiply_blocks(*quantize_blocks(x_MI), _of_tiles(weight_TGSOB), scale_OG, least_OG)
        return _with_bias(y_MO[:, : self.outputs], self.bias_O)


def _with_bias(y_MO: Tensor, bias_O: Tensor | None) -> Tensor:
    return y_MO if bias_O is None else y_MO + bias_O


# --- Processors -----------------------------------------------------------------------------------------------------


def processors() -> list[str]:
    """Whose kernels run here, the best first; empty where none were compiled."""
    return [] if _linear is None else _linear.processors()


def use_kernels(processor: str) -> None:
    """Has all linear layers of this process use a processor's kernels.

    Raises:
        EngineError: there are none of it here.
    """
    if processor not in processors():
        raise EngineError(
            f"CPU kernels {processor!r} do not run here", f"those that do: {', '.join(processors()) or 'none'}"
        )
    _linear.use(processor)


if chosen := os.environ.get("SSV_CPU_KERNELS"):
    use_kernels(chosen)
