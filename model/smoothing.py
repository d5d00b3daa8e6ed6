"""Makes a decoder easier to quantize: activation ranges, and moving their outliers into the weights.

SmoothQuant (Xiao et al. 2023, arXiv:2211.10438): activations of a few channels are far larger than the rest and eat up
the levels of a per-row scale. Dividing those channels where the activations are made and multiplying them into the next
weight leaves the function unchanged and both sides easier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ssv.model.decoder import Decoder, Layer

Ranges = dict[str, Tensor]
"""Largest magnitude of each input channel, fp32, by the name of the linear layer."""

# Share of the outliers that moves into the weights, chosen on SmolLM2-135M by the divergence of its logits.
_SHARE = {"qkv": 0.8, "gate_up": 0.8, "down": 0.5, "lm_head": 0.5, "join": 0.5}

_ROWS = 512
"""Rows of a weight that are worked on at a time: they stay in the processor's cache."""


def activation_ranges(module: nn.Module, run: Callable[[], object]) -> Ranges:
    """Ranges of the inputs of every linear layer of `module` while `run` is called."""
    ranges: Ranges = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].detach().float().abs().flatten(0, -2).amax(dim=0)
            ranges[name] = torch.maximum(ranges[name], seen) if name in ranges else seen

        return hook

    linears = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_pre_hook(watch(name)) for name, m in linears]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return ranges


def smoothed_parts(decoder: Decoder, ranges: Ranges, prefix: str = "") -> Iterator[nn.Module]:
    """Smooths, in place, every linear layer whose input is made by a norm or by the gated MLP.

    The decoder's function stays the same. Its LM head is copied here, as it must not share its weight with the
    embedding any more.

    Yields each layer and then the decoder itself, once it is smoothed: who packs a part before asking for the next
    never holds the whole decoder in fp32. All of them have to be taken.

    Args:
        decoder: of any floating type; what is smoothed becomes fp32.
        ranges: of the decoder's linear layers; keys begin with `prefix`.
    """
    for index, layer in enumerate(decoder.blocks()):
        _smooth_layer(layer, ranges, f"{prefix}layers.{index}.")
        yield layer
    _smooth_after_norms(decoder.lm_head, [decoder.norm], ranges[prefix + "lm_head"], "lm_head")
    yield decoder


@torch.no_grad()
def _smooth_layer(layer: Layer, ranges: Ranges, at: str) -> None:
    if layer.attn_norm is not None:
        _smooth_after_norms(layer.qkv, [layer.attn_norm], ranges[at + "qkv"], "qkv")
    _smooth_after_norms(layer.gate_up, [layer.mlp_norm], ranges[at + "gate_up"], "gate_up")
    factor = smoothing_factor(layer.down.weight, ranges[at + "down"], "down")
    inner = layer.down.in_features
    # The MLP's product is linear in `up`, so its channels can be divided there.
    layer.gate_up.weight[inner:] /= factor[:, None]
    if layer.gate_up.bias is not None:
        bias = layer.gate_up.bias.to(torch.float32, copy=True)
        bias[inner:] /= factor
        layer.gate_up.bias = nn.Parameter(bias, requires_grad=False)
    layer.down.weight = nn.Parameter(scaled_columns(layer.down.weight, factor), requires_grad=False)


def smooth_join(join: nn.Linear, norms: list[nn.RMSNorm], ranges: Tensor) -> None:
    """The same for a linear layer over the joined outputs of several norms."""
    _smooth_after_norms(join, norms, ranges, "join")


@torch.no_grad()
def smoothing_factor(weight_OI: Tensor, range_I: Tensor, kind: str) -> Tensor:
    """What each input channel is divided by, fp32 [I]."""
    share = _SHARE[kind]
    largest_I = torch.maximum(weight_OI.amax(dim=0), -weight_OI.amin(dim=0)).float()
    return range_I.clamp(min=1e-5) ** share / largest_I.clamp(min=1e-5) ** (1 - share)


@torch.no_grad()
def scaled_columns(weight_OI: Tensor, factor_I: Tensor) -> Tensor:
    """The weights times a factor of each input channel, fp32, without another copy in fp32 on the way."""
    scaled_OI = torch.empty(weight_OI.shape, dtype=torch.float32, device=weight_OI.device)
    for part, out in zip(weight_OI.split(_ROWS), scaled_OI.split(_ROWS), strict=True):
        torch.mul(part.float(), factor_I, out=out)
    return scaled_OI


@torch.no_grad()
def _smooth_after_norms(linear: nn.Linear, norms: list[nn.RMSNorm], range_I: Tensor, kind: str) -> None:
    factor = smoothing_factor(linear.weight, range_I, kind)
    linear.weight = nn.Parameter(scaled_columns(linear.weight, factor), requires_grad=False)
    start = 0
    for norm in norms:
        stop = start + norm.weight.shape[0]
        norm.weight = nn.Parameter(norm.weight / factor[start:stop], requires_grad=False)
        start = stop
