"""Weights quantized as a checkpoint holds them, by rounding alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ssv.model.checkpoint import DecoderSpec, Weights


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


def pack_int4(weight_OI: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Bytes [O / 2, I] and scales [O, G] of a weight rounded to the nearest."""
    groups = weight_OI.view(len(weight_OI), -1, group)
    scale_OG = groups.abs().amax(dim=-1) / 7
    values = (groups / scale_OG[..., None]).round().to(torch.int8).view_as(weight_OI) & 15
    return (values[::2] | values[1::2] << 4).to(torch.uint8), scale_OG
