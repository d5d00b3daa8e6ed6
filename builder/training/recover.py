"""Wins back what quantizing cost: trains a quantized target to say what the original says.

Quantization-aware distillation (Liu et al. 2023, LLM-QAT, arXiv:2305.17888): the weights behind the rounded ones, their
scales and the norms are trained through the rounding (straight-through; for INT4 with learned steps, Esser et al. 2020,
LSQ, arXiv:1902.08153) on the KL divergence to the original's distribution, over text that the original writes itself.
What comes out has the same tensors as before.

Shapes: B rows, T tokens of a window, M = B * T, O outputs, I inputs, G groups, V vocab.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssv.builder.training.corpus import ChatPieces, write_conversations
from ssv.builder.training.passes import CausalAttend
from ssv.model.decoder import Decoder
from ssv.model.quantized import AwqLinear, Fp8Linear, QuantizedLinear, to_fp8
from ssv.support.progress import Report


@dataclass(frozen=True, slots=True)
class Recovery:
    """How a quantized target is trained.

    Attributes:
        tokens: trained on, each once.
        rows, window: conversations written at a time, and the length of each in tokens.
        batch_rows: conversations of a training step.
    """

    tokens: int
    learning_rate: float
    rows: int = 2048
    window: int = 512
    batch_rows: int = 32
    seed: int = 1


def recover(
    original: Decoder,
    student: Decoder,
    pieces: ChatPieces,
    openings: Sequence[Sequence[int]],
    config: Recovery,
    report: Report,
) -> Decoder:
    """A quantized decoder like `student`, trained.

    Args:
        original: in bf16 on CUDA, or fp32.
        student: quantized from it, on the same device, fp32.
        openings: see `write_conversations`.
    """
    trained = copy.deepcopy(student).to(original.embed.weight.device)
    layers = _make_trainable(original, trained)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    num_steps = max(1, config.tokens // (config.batch_rows * config.window))
    batches = _batches(original, pieces, openings, config)
    for step in range(num_steps):
        rate = config.learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _loss(original, trained, next(batches).to(original.embed.weight.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 20 == 0 or step + 1 == num_steps:
            report("recover", step + 1, num_steps, f"KL {loss.item():.4f}")
    for name, layer in layers.items():
        trained.set_submodule(name, layer.frozen())
    return trained.requires_grad_(False)


def _batches(
    original: Decoder, pieces: ChatPieces, openings: Sequence[Sequence[int]], config: Recovery
) -> Iterator[Tensor]:
    index = 0
    while True:
        seed = config.seed * 1_000_003 + index
        tokens = write_conversations(
            original, pieces, openings, rows=config.rows, window=config.window, seed=seed
        ).tokens
        # Rows are ordered by their temperature when they are written.
        order = torch.randperm(config.rows, generator=torch.Generator().manual_seed(seed))
        yield from tokens[order].long().split(config.batch_rows)
        index += 1


def _loss(original: Decoder, trained: Decoder, tokens_BT: Tensor) -> Tensor:
    """Mean KL divergence of all tokens, nats."""
    batch, window = tokens_BT.shape
    position_M = torch.arange(window, device=tokens_BT.device).repeat(batch)

    def hidden(decoder: Decoder) -> Tensor:
        return decoder.norm(decoder.run_layers(decoder.embed(tokens_BT.flatten()), position_M, CausalAttend(batch))[0])

    on_cuda = tokens_BT.is_cuda
    with torch.no_grad():
        wanted_MH = hidden(original)
    with torch.autocast("cuda", torch.bfloat16, enabled=on_cuda):
        found_MH = hidden(trained)
    # A few rows' logits at a time, made again for the backward pass: all of them would take gigabytes.
    parts = [
        checkpoint(_divergence, found, wanted, trained, original, use_reentrant=False)
        for found, wanted in zip(found_MH.split(4096), wanted_MH.split(4096), strict=True)
    ]
    return torch.stack(parts).sum() / len(wanted_MH)


def _divergence(found_MH: Tensor, wanted_MH: Tensor, trained: Decoder, original: Decoder) -> Tensor:
    wanted = F.log_softmax(original.lm_head(wanted_MH).float(), dim=-1)
    found = F.log_softmax(trained.lm_head(found_MH.to(trained.embed.weight.dtype)).float(), dim=-1)
    return F.kl_div(found, wanted, reduction="sum", log_target=True)


# --- layers ---------------------------------------------------------------------------------------------------------


class _TrainableAwq(nn.Module):
    def __init__(self, layer: AwqLinear, weight_OI: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI.clone())
        self.scale_OG = nn.Parameter(layer.scale_OG.clone())
        self.layer = layer

    def rounded(self) -> tuple[Tensor, Tensor]:
        """Rounded values, [O, G, I / G], with gradients as if they had not been, and positive scales, [O, G, 1]."""
        scale = self.scale_OG.abs().clamp(min=1e-8)[..., None]
        values = (self.weight.view(*self.scale_OG.shape, -1) / scale).clamp(-8, 7)
        return values + (values.round() - values).detach(), scale

    def forward(self, x: Tensor) -> Tensor:
        values, scale = self.rounded()
        return F.linear(self.layer.prepare_input(x), (values * scale).view_as(self.weight), self.layer.bias)

    @torch.no_grad()
    def frozen(self) -> AwqLinear:
        values, scale = self.rounded()
        nibbles = values.round().to(torch.int8).view_as(self.weight) & 15
        packed = (nibbles[::2] | nibbles[1::2] << 4).to(torch.uint8)
        return AwqLinear(packed, scale[..., 0].clone(), self.layer.input_factor_I, self.layer.bias)


class _TrainableFp8(nn.Module):
    def __init__(self, layer: Fp8Linear, weight_OI: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI.clone())
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        scale = self.layer.scale_O[:, None]
        rounded = to_fp8(self.weight, scale).float() * scale
        weight = self.weight + (rounded - self.weight).detach()
        x = x + (self.layer.prepare_input(x) - x).detach()
        return F.linear(x, weight, self.layer.bias)

    @torch.no_grad()
    def frozen(self) -> Fp8Linear:
        layer = self.layer
        return Fp8Linear(to_fp8(self.weight, layer.scale_O[:, None]), layer.scale_O, layer.input_scale, layer.bias)


@torch.no_grad()
def _make_trainable(original: Decoder, trained: Decoder) -> dict[str, _TrainableAwq | _TrainableFp8]:
    """Puts trainable layers in place of the quantized ones.

    They start from the original's weights, without the inputs' factors that have gone into the norms.
    """
    trained.requires_grad_(False)
    ratios: dict[str, Tensor] = {}
    for index, (mine, theirs) in enumerate(zip(trained.blocks(), original.blocks(), strict=True)):
        assert mine.attn_norm is not None and theirs.attn_norm is not None  # as every layer of a target has
        for name, norm, other in (
            ("qkv", mine.attn_norm, theirs.attn_norm),
            ("gate_up", mine.mlp_norm, theirs.mlp_norm),
        ):
            assert norm is not None and other is not None  # only drafts of others leave one out
            ratios[f"layers.{index}.{name}"] = norm.weight / other.weight.float()
    ratios["lm_head"] = trained.norm.weight / original.norm.weight.float()
    layers: dict[str, _TrainableAwq | _TrainableFp8] = {}
    for name, layer in list(trained.named_modules()):
        if not isinstance(layer, QuantizedLinear):
            continue
        factor = ratios.get(name, torch.ones((), device=trained.embed.weight.device))
        factor = torch.where(factor.isfinite() & (factor > 0), factor, 1.0)  # a channel that the norm has off
        if isinstance(layer, AwqLinear) and layer.input_factor_I is not None:
            factor = factor * layer.input_factor_I
        source = original.get_submodule(name)
        assert isinstance(source, nn.Linear)
        weight_OI = source.weight.float() / factor
        if isinstance(layer, AwqLinear):
            layers[name] = _TrainableAwq(layer, weight_OI)
        else:
            assert isinstance(layer, Fp8Linear)
            layers[name] = _TrainableFp8(layer, weight_OI)
        trained.set_submodule(name, layers[name])
    for trainable in layers.values():
        for parameter in trainable.parameters(recurse=False):
            parameter.requires_grad_(True)
    for part in trained.modules():
        if isinstance(part, nn.RMSNorm):
            part.weight = nn.Parameter(part.weight.clone(), requires_grad=True)
    return layers
