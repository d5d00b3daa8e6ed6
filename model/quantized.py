"""Quantized linear layers: what they are made of and what they compute.

This is the definition that the TensorRT network and the torch engine both follow.

* FP8 (W8A8): weights and inputs in float8 E4M3, a scale for the weights of each output and one for all inputs, found by
  calibration: static, so a row's result does not depend on the other rows.
* INT4 (AWQ, W4A16; Lin et al. 2023, arXiv:2306.00978): weights in symmetric 4-bit integers with a scale for each group
  of input channels; inputs keep their type, but some are first multiplied by a factor per channel.

The tensors are those of ModelOpt's unified checkpoint, so a layer is made from a checkpoint without converting
anything.

Shapes: M rows, O outputs, I inputs, G groups of I, P = O / 2 bytes (two outputs in each).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssv.model.checkpoint import CheckpointError

FP8_MAX = 448.0
SCALES = ("weight_scale", "input_scale", "pre_quant_scale")
"""Tensors that a quantized layer has beside `weight` and `bias`, as ModelOpt names them."""


class QuantizedLinear(nn.Module):
    """A linear layer over quantized weights.

    Its scales are buffers, so that changing the type of a module's parameters leaves them.
    """

    bias: nn.Parameter | None

    def __init__(self, bias_O: Tensor | None) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias_O, requires_grad=False) if bias_O is not None else None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The sizes O and I."""

    @abstractmethod
    def dequantized(self) -> Tensor:
        """The weights that the layer stands for, fp32 [O, I]."""

    @abstractmethod
    def prepare_input(self, x_MI: Tensor) -> Tensor:
        """What the weights are multiplied with, in the type of `x_MI`."""

    def forward(self, x_MI: Tensor) -> Tensor:
        return F.linear(self.prepare_input(x_MI), self.dequantized().to(x_MI.dtype), self.bias)


class Fp8Linear(QuantizedLinear):
    """A linear layer over FP8 weights, whose inputs are rounded to FP8.

    Attributes:
        values_OI: float8_e4m3fn.
        scale_O: fp32, of the weights.
        input_scale: fp32 scalar.
    """

    values_OI: Tensor
    scale_O: Tensor
    input_scale: Tensor

    def __init__(self, values_OI: Tensor, scale_O: Tensor, input_scale: Tensor, bias_O: Tensor | None) -> None:
        super().__init__(bias_O)
        self.register_buffer("values_OI", values_OI)
        self.register_buffer("scale_O", scale_O)
        self.register_buffer("input_scale", input_scale)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values_OI.shape[0], self.values_OI.shape[1]

    def dequantized(self) -> Tensor:
        return self.values_OI.float() * self.scale_O[:, None]

    def prepare_input(self, x_MI: Tensor) -> Tensor:
        return (to_fp8(x_MI, self.input_scale).float() * self.input_scale).to(x_MI.dtype)


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Values over a scale, in float8_e4m3fn; what is too large becomes the largest."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


class AwqLinear(QuantizedLinear):
    """A linear layer over INT4 weights.

    Attributes:
        packed_PI: uint8; byte [p, i] holds weights [2 p, i] (low four bits) and [2 p + 1, i], two's complement.
        scale_OG: fp32.
        input_factor_I: fp32, or None.
    """

    packed_PI: Tensor
    scale_OG: Tensor
    input_factor_I: Tensor | None

    def __init__(
        self, packed_PI: Tensor, scale_OG: Tensor, input_factor_I: Tensor | None, bias_O: Tensor | None
    ) -> None:
        super().__init__(bias_O)
        self.register_buffer("packed_PI", packed_PI)
        self.register_buffer("scale_OG", scale_OG)
        self.register_buffer("input_factor_I", input_factor_I)

    @property
    def shape(self) -> tuple[int, int]:
        return 2 * self.packed_PI.shape[0], self.packed_PI.shape[1]

    @property
    def group_size(self) -> int:
        return self.packed_PI.shape[1] // self.scale_OG.shape[1]

    def values(self) -> Tensor:
        """The integers, int8 [O, I]."""
        nibbles = torch.stack((self.packed_PI & 15, self.packed_PI >> 4), dim=1).flatten(0, 1)
        return (nibbles ^ 8).to(torch.int8) - 8

    def dequantized(self) -> Tensor:
        return self.values() * self.scale_OG.repeat_interleave(self.group_size, dim=1)

    def prepare_input(self, x_MI: Tensor) -> Tensor:
        return x_MI if self.input_factor_I is None else (x_MI.float() * self.input_factor_I).to(x_MI.dtype)


def precision_of(module: nn.Module) -> str | None:
    """ "fp8" or "int4" if a module has such layers, None if it has no quantized ones."""
    kinds = {type(part) for part in module.modules() if isinstance(part, QuantizedLinear)}
    assert len(kinds) < 2
    return {Fp8Linear: "fp8", AwqLinear: "int4"}[kinds.pop()] if kinds else None


def is_quantized(weights: Mapping[str, Tensor], name: str) -> bool:
    """Whether the linear layer of a name ("model.layers.0.mlp.down_proj") is a quantized one."""
    return f"{name}.weight_scale" in weights


def quantized_linear(weights: Mapping[str, Tensor], names: Sequence[str], bias_O: Tensor | None) -> QuantizedLinear:
    """The layer that gives the outputs of several layers with one input, one after another.

    Raises:
        CheckpointError: they are quantized differently, or a tensor is missing, misshapen or of a wrong type.
    """
    for name in names:
        _check_layer(weights, name)
    if len({weights[f"{name}.weight"].dtype for name in names}) > 1:
        raise CheckpointError(
            f"{' and '.join(names)} are quantized to different types: they share an input, quantize them alike"
        )
    values = torch.cat([weights[f"{name}.weight"] for name in names])
    factors = [weights.get(f"{name}.pre_quant_scale") for name in names]
    if values.dtype == torch.uint8:
        if any(not _equal(factors[0], factor) for factor in factors):
            raise CheckpointError(
                f"{' and '.join(names)} have different pre_quant_scale",
                "quantize them again with ModelOpt's own export",
            )
        scale_OG = torch.cat([weights[f"{name}.weight_scale"].float() for name in names])
        factor_I = factors[0].float().clone() if factors[0] is not None else None  # a view would keep its file mapped
        return AwqLinear(values, scale_OG, factor_I, bias_O)
    scale_O = torch.cat(
        [weights[f"{name}.weight_scale"].float().reshape(-1).expand(len(weights[f"{name}.weight"])) for name in names]
    )
    # One input is quantized once: with the largest scale nothing is cut off.
    input_scale = torch.stack([weights[f"{name}.input_scale"].float().reshape(()) for name in names]).amax()
    return Fp8Linear(values, scale_O, input_scale, bias_O)


def _check_layer(weights: Mapping[str, Tensor], name: str) -> None:
    if not is_quantized(weights, name):
        raise CheckpointError(
            f"{name} is not quantized, or lacks its weight_scale, beside layers of the same input that are",
            "quantize them alike",
        )
    weight, scale = weights[f"{name}.weight"], weights[f"{name}.weight_scale"]
    factor = weights.get(f"{name}.pre_quant_scale")
    if factor is not None and (weight.dtype != torch.uint8 or factor.shape != weight.shape[1:]):
        raise CheckpointError(
            f"{name}.pre_quant_scale of shape {tuple(factor.shape)} does not belong to this {weight.dtype} weight"
        )
    if weight.dtype == torch.uint8:
        outputs, inputs = 2 * weight.shape[0], weight.shape[1]
        if scale.ndim != 2 or scale.shape[0] != outputs or not scale.shape[1] or inputs % scale.shape[1]:
            raise CheckpointError(
                f"{name}.weight_scale has shape {tuple(scale.shape)}, its INT4 weight is {outputs} x {inputs}"
            )
    elif weight.dtype == torch.float8_e4m3fn:
        if scale.numel() not in (1, len(weight)):
            raise CheckpointError(f"{name}.weight_scale has {scale.numel()} values, its weight {len(weight)} rows")
        input_scale = weights.get(f"{name}.input_scale")
        if input_scale is None or input_scale.numel() != 1:
            raise CheckpointError(
                f"{name}.input_scale is missing or not one number: only FP8 with calibrated inputs is supported"
            )
    else:
        raise CheckpointError(f"{name}.weight is {weight.dtype}, supported are packed INT4 (uint8) and float8_e4m3fn")


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
