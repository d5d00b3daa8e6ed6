"""Weights quantized as a checkpoint holds them, by rounding alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssv.model.checkpoint import DecoderSpec, Weights
from ssv.model.quantized import AwqLinear, Fp8Linear


def quantized_weights(spec: DecoderSpec, weights: Weights, precision: str, group: int = 16) -> Weights:
    """Weights with every projection rounded, in ModelOpt's tensors.

    The factors of inputs are such that forgetting them shows.
    """
    torch.manual_seed(9)
    out = dict(weights)
    for name, weight in weights.items():
        if "_proj.weight" not in name:
            continue
        layer = name.removesuffix(".weight")
        if precision == "fp8":
            scale = weight.abs().amax() / 448
            out[name] = (weight / scale).to(torch.float8_e4m3fn)
            out |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(0.05)}
            continue
        factor = torch.rand(weight.shape[1]) + 0.5 if ("down_proj" in layer or "o_proj" in layer) else None
        scaled = weight / factor if factor is not None else weight
        packed, scale_OG = pack_int4(scaled, group)
        out |= {name: packed, f"{layer}.weight_scale": scale_OG}
        if factor is not None:
            out[f"{layer}.pre_quant_scale"] = factor
    return out


def quantized_layer(weight_OI: Tensor, precision: str, group: int, bias_O: Tensor | None = None) -> nn.Module:
    """A layer of a weight, which is rounded: bf16, FP8 with a scale for each row, or INT4."""
    outputs, inputs = weight_OI.shape
    if precision == "fp8":
        scale_O = weight_OI.abs().amax(dim=1) / 448
        values_OI = (weight_OI / scale_O[:, None]).to(torch.float8_e4m3fn)
        return Fp8Linear(values_OI, scale_O, torch.tensor(0.05), bias_O)
    if precision == "bf16":
        linear = nn.Linear(inputs, outputs, bias=False, device=weight_OI.device)
        linear.weight.data = weight_OI.bfloat16()
        linear.bias = None if bias_O is None else nn.Parameter(bias_O)
        return linear.requires_grad_(False)
    return AwqLinear(*pack_int4(weight_OI, group), None, bias_O)


def pack_int4(weight_OI: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Bytes [O / 2, I] and scales [O, G] of a weight rounded to the nearest."""
    groups = weight_OI.view(len(weight_OI), -1, group)
    scale_OG = groups.abs().amax(dim=-1) / 7
    values = (groups / scale_OG[..., None]).round().to(torch.int8).view_as(weight_OI) & 15
    return (values[::2] | values[1::2] << 4).to(torch.uint8), scale_OG
