"""Decoders small enough to run thousands of steps a second, with weights that all matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssv.builder.training.passes import CausalAttend
from ssv.model.checkpoint import DecoderSpec, Weights
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft, DraftKind, draft_spec
from ssv.model.heads import Heads, heads_spec, start_heads


def tiny_spec(**changes: Any) -> DecoderSpec:
    """A spec whose epsilon is large enough to be seen in the logits."""
    settings: dict[str, Any] = {
        "family": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 112,
        "max_positions": 512,
        "rms_norm_eps": 1e-2,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_embeddings": False,
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
    }
    return DecoderSpec(**(settings | changes))


def random_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight at random: norms around one, biases around zero, both far enough from it.

    Products are of a magnitude that keeps softmax sharp.
    """
    noise = torch.randn(shape)
    if len(shape) == 1:
        return 1 + 0.3 * noise if "norm" in name else 0.3 * noise
    return noise if "embed" in name else noise * 1.5 / shape[1] ** 0.5


def tiny_weights(spec: DecoderSpec, seed: int = 0) -> Weights:
    torch.manual_seed(seed)
    return {name: random_weight(name, shape) for name, shape in spec.weight_shapes().items()}


def tiny_decoder(seed: int = 0, **changes: Any) -> Decoder:
    spec = tiny_spec(**changes)
    return Decoder.from_weights(spec, tiny_weights(spec, seed))


def random_draft(
    target: Decoder,
    kind: DraftKind,
    head_size: int | None = 48,
    *,
    layers: tuple[int, ...] = (0, 1),
    eagle3: bool = False,
    num_layers: int = 1,
    head_rank: int = 0,
) -> Draft:
    torch.manual_seed(5)
    spec = draft_spec(target.spec, kind, layers, head_size, eagle3=eagle3, num_layers=num_layers, head_rank=head_rank)
    draft = Draft(spec).requires_grad_(False)
    for name, parameter in draft.named_parameters():
        parameter.copy_(random_weight(name, tuple(parameter.shape)))
    draft.share_target(target, torch.randperm(target.spec.vocab_size)[: draft.spec.head_size])
    return draft


def random_heads(target: Decoder, num_layers: int = 1, head_size: int | None = 48) -> Heads:
    torch.manual_seed(6)
    token_ids = torch.randperm(target.spec.vocab_size)[: head_size or target.spec.vocab_size]
    heads = start_heads(heads_spec(target.spec, 3, num_layers, head_size), target, token_ids).requires_grad_(False)
    for name, parameter in heads.blocks.named_parameters():
        parameter.copy_(random_weight(name, tuple(parameter.shape)))
    return heads


def tiny_ids(*shape: int, vocab_size: int = 112, seed: int = 1) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole_window(
    decoder: Decoder, ids_BT: Tensor, tapped_layers: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The reference without a cache: hidden states, logits and tapped layers of every token, each [B, T, ...]."""
    batch, length = ids_BT.shape
    position_M = torch.arange(length).repeat(batch)
    x_MH = decoder.embed(ids_BT.flatten())
    hidden, tapped = decoder.run_layers(x_MH, position_M, CausalAttend(batch), tapped_layers)
    logits = decoder.logits(hidden)
    return (
        hidden.view(batch, length, -1),
        logits.view(batch, length, -1),
        None if tapped is None else tapped.view(batch, length, -1),
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())
