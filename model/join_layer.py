"""A conditioned draft of ours as a head in EAGLE-3's form, which other engines load: its join as one layer more.

Ours adds a product of token and features to the features, and its layers see the norms of the sum:

    x = features + join(embed_norm(embedding) | feature_norm(features))

A head in EAGLE-3's form shows that pair to the query, key and value of its first layer, whose output is added to the
features. So a first layer in which each token attends to itself alone, with the join as its value, gives x. Query and
key see nothing of the pair: they are one bias, and with rotary positions their product is a constant at a token's own
place and less everywhere else. The bias is large enough that nothing else counts. Its MLP adds nothing.

It computes the same, for the time and the cache of a further layer.

Shapes: H hidden, N heads, D head dim, J = 2 H, P rotated pairs (D / 2), S positions.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssv.model.checkpoint import DecoderSpec
from ssv.model.decoder import Layer
from ssv.model.draft import Draft, Eagle3
from ssv.support.errors import UserError

LEAST_MARGIN = 48.0
"""By how much a token's own score exceeds any other's. exp(-48) is 1e-21: 10^5 others together do not reach the last
bit of a value, also where bf16 takes some of it."""


@torch.no_grad()
def with_join_as_layer(draft: Draft) -> Draft:
    """A conditioned draft that joins in our way, as a head in EAGLE-3's form that computes the same.

    Weights that both have are shared.

    Raises:
        UserError: its heads together are narrower than its hidden size, so that no layer's attention passes all of the
            join.
    """
    spec = draft.spec
    assert draft.conditioned and spec.eagle3 is None and not spec.head_rank
    mine = spec.decoder
    hidden, width = mine.hidden_size, mine.num_heads * mine.head_dim
    if width < hidden:
        raise UserError(
            f"the draft joins token and features before its first layer, which its {mine.num_heads} heads of "
            f"{mine.head_dim} are too narrow to do for a hidden size of {hidden}",
            "distill one with `draft: {distill: {join: eagle3}}` in the recipe",
        )
    layers = replace(
        mine, family="llama", num_layers=mine.num_layers + 1, num_kv_heads=mine.num_heads, qkv_bias=True
    )  # fmt: skip
    head = Draft(replace(spec, decoder=layers, eagle3=Eagle3(hidden)))
    assert head.tap is not None and draft.tap is not None
    head.tap, head.embed_norm, head.feature_norm = draft.tap, draft.embed_norm, draft.feature_norm
    head.decoder.embed, head.decoder.norm = draft.decoder.embed, draft.decoder.norm
    head.decoder.lm_head, head.token_ids = draft.decoder.lm_head, draft.token_ids
    first, *others = head.decoder.blocks()
    _become_join(first, draft.join.weight.float())
    for layer, source in zip(others, draft.decoder.blocks(), strict=True):
        state = source.state_dict()
        state["qkv.weight"] = _a_key_for_each_head(state["qkv.weight"], mine)
        state["qkv.bias"] = (
            _a_key_for_each_head(state["qkv.bias"], mine) if mine.qkv_bias else torch.zeros(3 * width)
        )  # fmt: skip
        layer.load_state_dict(state)
    return head.requires_grad_(False)


def own_place_bias(spec: DecoderSpec) -> float:
    """What each number of query's and key's bias has to be, a power of two: exact in every type.

    A score is bias^2 / sqrt(D) times the sum of 2 cos(distance * frequency).
    """
    frequency_P = spec.rope_frequencies().double().cpu()
    nearest = math.inf
    for distance_S in torch.arange(1, spec.max_positions, dtype=torch.float64).split(4096):
        lost_S = 2 * (1 - (distance_S[:, None] * frequency_P).cos()).sum(dim=-1)
        nearest = min(nearest, float(lost_S.min()))
    return float(2 ** math.ceil(math.log2(math.sqrt(LEAST_MARGIN * math.sqrt(spec.head_dim) / nearest))))


def _become_join(layer: Layer, join_HJ: Tensor) -> None:
    hidden, width = join_HJ.shape[0], layer.o.in_features
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    layer.qkv.weight[2 * width : 2 * width + hidden] = join_HJ
    layer.qkv.bias[: 2 * width] = own_place_bias(layer.spec)
    layer.o.weight[:, :hidden] = torch.eye(hidden)
    nn.init.ones_(layer.mlp_norm.weight)


def _a_key_for_each_head(qkv: Tensor, spec: DecoderSpec) -> Tensor:
    """Keys and values that heads share, repeated for each: all of a head's layers have as many."""
    heads = qkv.view(-1, spec.head_dim, *qkv.shape[1:])
    q, k, v = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads])
    repeats = spec.num_heads // spec.num_kv_heads
    return torch.cat((q, k.repeat_interleave(repeats, dim=0), v.repeat_interleave(repeats, dim=0))).flatten(0, 1)
