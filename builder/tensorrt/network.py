"""The TensorRT network of a target or a draft: the engine contract as a strongly typed `INetworkDefinition`.

One step runs T tokens of B rows: writes their keys and values into the cache in place, attends under the mask that it
is given, gathers R rows of the result, and runs final norm, LM head and top-1 over those alone. Prefill, decoding,
ragged verification, trees and decoding after a rollback are this one network (`ssv.runtime.engines.contract`).

Inputs: `input_ids` int32 [B, T]; `first_slot` int32 [B], where in the cache each row's tokens go; `position` int32
[B, T], by which they are rotated; `mask` bool [B, T, V], the first V slots of the cache that each token sees: attention
looks at so much of the cache and no more, its cost follows the context, not max_length; `gather_rows` int32 [R]; for a
conditioned draft `features` fp32 [B, T, F]; `keys_0`, `values_0`, ... [B, K, S, D], which share memory with the outputs
`keys_0_out`, ....
Outputs: `hidden` fp32 [R, H] (of a draft, what `Draft.carried` gives); `logits` fp32 [R, V]; `token` int32 [R], its id
in the vocabulary; of a target that has a tap, `features` fp32 [M, F]; of a draft, `token_prob` and, if it has a scorer,
`reject_prob`, fp32 [R].

What runs in which type. Products, cache and attention: the compute type, fp16 or bf16 (in FP8 engines products multiply
FP8). fp32:
* the residual stream and what is added to it: it carries values of tens of thousands at the first token, at which fp16
  has a resolution of 16 and bf16 of 128, and everything small that later layers add would be rounded away;
* RMSNorm: squares of such values overflow fp16;
* rope, with the attention's scale 1 / sqrt(D): rounded once, after both; angles are tables made in fp32, bf16 cannot
  tell positions 257 and 258 apart;
* logits once they are multiplied, hence top-1, probability, entropy and scorer: a sum over the vocabulary.
The softmax of attention is TensorRT's own, which accumulates in fp32.

Shapes: B rows, T tokens, M = B * T, R gathered rows, H hidden, I inputs and O outputs of a linear layer, N query heads,
K key/value heads, D head dim, P = D / 2, S slots of a cache row, V slots looked at or head rows, F features, L layers.

The gather with the final norm, and what is read off a draft's logits, are ops of `ssv.plugins`: plugins or layers of
TensorRT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from ssv.builder.tensorrt.graph import Graph
from ssv.builder.tensorrt.lowering import NativeOps, NetworkOps
from ssv.bundle.shapes import Limits, StepShape, profiles
from ssv.bundle.tensorrt_api import EngineBuildError, Flavor
from ssv.model.decoder import Decoder, Layer
from ssv.model.draft import Draft, FeatureTap
from ssv.model.scorer import Scorer
from ssv.plugins.contract import NUM_CONFIDENCE

# Tapped hidden states are divided by this before the tap's product and its result multiplied again, both exactly: the
# sums of what is largest in the residual stream would overflow fp16.
_TAP_SCALE = 64.0


def build_target(
    graph: Graph, decoder: Decoder, limits: Limits, tap: FeatureTap | None = None, ops: NetworkOps | None = None
) -> None:
    """Adds the network of a target.

    Args:
        tap: of a conditioned draft; its features are then an output.
        ops: None for TensorRT's own layers.
    """
    step = _Step(graph, decoder, limits)
    x_MH = _embedded(graph, decoder, step)
    x_MH, tapped = _layers(graph, decoder, step, x_MH, tap.layers if tap is not None else ())
    if tap is not None:
        graph.output("features", _features(graph, tap, tapped))
    hidden_RH, _, logits_RV = _head(graph, decoder, step, x_MH, ops or NativeOps(graph))
    _, index_R1 = graph.top(logits_RV, 1)
    graph.output("hidden", hidden_RH)
    graph.output("logits", logits_RV)
    graph.output("token", graph.reshape(index_R1, (-1,)))


def build_draft(
    graph: Graph, draft: Draft, limits: Limits, scorer: Scorer | None = None, ops: NetworkOps | None = None
) -> None:
    """Adds the network of a draft, and its scorer's.

    Args:
        ops: None for TensorRT's own layers.
    """
    ops = ops or NativeOps(graph)
    decoder = draft.decoder
    step = _Step(graph, decoder, limits)
    x_MH, joined_MJ = _embedded(graph, decoder, step), None
    if draft.conditioned:
        hidden = decoder.spec.hidden_size
        features_MF = graph.reshape(graph.input("features", torch.float32, (-1, -1, hidden)), (-1, hidden))
        normed_MF = rms_norm(graph, features_MF, draft.feature_norm)
        joined_MJ = graph.concat((rms_norm(graph, x_MH, draft.embed_norm), normed_MF), axis=1)
        if draft.spec.eagle3 is None:
            product_MH = graph.cast(graph.linear(joined_MJ, draft.join), torch.float32)
            x_MH, joined_MJ = graph.add(features_MF, product_MH), None
        else:
            x_MH = graph.cast(normed_MF, torch.float32) if draft.norms_residual else features_MF
    x_MH, _ = _layers(graph, decoder, step, x_MH, (), joined_MJ)
    hidden_RH, normed_RH, logits_RV = _head(graph, decoder, step, x_MH, ops)
    weight_F = scorer.weight_F if scorer is not None else torch.zeros(NUM_CONFIDENCE)
    bias_1 = scorer.bias.reshape(1) if scorer is not None else torch.zeros(1)
    found = ops.score(hidden_RH, logits_RV, weight_F, bias_1)
    graph.output("hidden", graph.cast(normed_RH, torch.float32) if draft.carries_normed else hidden_RH)
    graph.output("logits", logits_RV)
    graph.output("token", graph.gather(graph.constant(draft.token_ids, torch.int32), found.token_R))
    graph.output("token_prob", found.prob_R)
    if scorer is not None:
        graph.output("reject_prob", found.reject_prob_R)


def add_profiles(graph: Graph, builder: Any, config: Any, limits: Limits, flavor: Flavor) -> None:
    """Gives a builder configuration the optimization profiles of a network."""
    for profile in profiles(limits, flavor):
        added = builder.create_optimization_profile()
        for name, shape in graph.inputs.items():
            sizes = [_sizes(name, shape, step) for step in (profile.smallest, profile.usual, profile.largest)]
            added.set_shape(name, *sizes)
        if config.add_optimization_profile(added) < 0:
            raise EngineBuildError(f"TensorRT refuses the {profile.name} profile: {graph.complaint()}")


def _sizes(name: str, shape: Sequence[int], step: StepShape) -> tuple[int, ...]:
    dynamic = iter((step.gathered,) if name == "gather_rows" else (step.batch, step.tokens, step.num_keys))
    return tuple(next(dynamic) if size < 0 else size for size in shape)


# --- parts ----------------------------------------------------------------------------------------------------------


class _Step:
    """What all layers of a step share."""

    def __init__(self, graph: Graph, decoder: Decoder, limits: Limits) -> None:
        spec, length = decoder.spec, limits.max_length
        ids_BT = graph.input("input_ids", torch.int32, (-1, -1))
        self.first_slot_B = graph.input("first_slot", torch.int32, (-1,))
        self.position_BT = graph.input("position", torch.int32, (-1, -1))
        mask_BTV = graph.input("mask", torch.bool, (-1, -1, -1))
        self.gather_rows_R = graph.input("gather_rows", torch.int32, (-1,))
        self.ids_M = graph.reshape(ids_BT, (-1,))
        self.shape_BT = graph.shape(ids_BT)
        self.num_keys = graph.last_size(mask_BTV, 3)
        angle_SP = torch.arange(length).float()[:, None] * decoder.spec.rope_frequencies()
        self.cos_SP = graph.constant(angle_SP.cos(), torch.float32)
        self.sin_SP = graph.constant(angle_SP.sin(), torch.float32)
        scales = torch.cat((torch.full((spec.num_heads,), query_scale(spec.head_dim)), torch.ones(spec.num_kv_heads)))
        self.scale_1X11 = scales.view(1, -1, 1, 1)
        self.mask_B1XV = seen_by_groups(graph, mask_BTV, spec.num_heads // spec.num_kv_heads)
        cache = (-1, spec.num_kv_heads, length, spec.head_dim)
        self.caches = [
            tuple(graph.input(f"{kind}_{layer}", graph.dtype, cache) for kind in ("keys", "values"))
            for layer in range(spec.num_layers)
        ]


def seen_by_groups(graph: Graph, mask_BTV: Any, groups: int) -> Any:
    """The mask of all queries of a key/value head, [B, 1, groups * T, V]: the query heads that share it are further
    queries."""
    return graph.concat([graph.unsqueeze(mask_BTV, (1,))] * groups, axis=2)


def rms_norm(graph: Graph, x: Any, norm: nn.RMSNorm) -> Any:
    """Norm over the last axis of fp32, rounded to the compute type."""
    assert norm.eps is not None
    return graph.rms_norm(x, norm.weight, norm.eps)


def _embedded(graph: Graph, decoder: Decoder, step: _Step) -> Any:
    rows_MH = graph.gather(graph.constant(decoder.embed.weight, graph.dtype), step.ids_M)
    return graph.cast(rows_MH, torch.float32)


def _features(graph: Graph, tap: FeatureTap, tapped: Sequence[Any]) -> Any:
    """A target's features, fp32 [M, F], of the hidden states after the tapped layers."""
    norms = cast(list[nn.RMSNorm], list(tap.norms))
    if len(norms) == len(tapped) > 1:
        normed = graph.concat([rms_norm(graph, x_MH, norm) for x_MH, norm in zip(tapped, norms, strict=True)], axis=1)
        return graph.cast(graph.linear(normed, tap.project), torch.float32)
    tapped_MX = graph.concat(tapped, axis=1)
    if norms:
        return graph.cast(graph.linear(rms_norm(graph, tapped_MX, norms[0]), tap.project), torch.float32)
    scaled = graph.mul(tapped_MX, graph.scalar(1 / _TAP_SCALE, rank=2))
    features = graph.linear(graph.cast(scaled, graph.dtype), tap.project)
    return graph.mul(graph.cast(features, torch.float32), graph.scalar(_TAP_SCALE, rank=2))


def _layers(
    graph: Graph, decoder: Decoder, step: _Step, x_MH: Any, tapped_layers: Sequence[int], joined_MJ: Any = None
) -> tuple[Any, list[Any]]:
    tapped = []
    for index, layer in enumerate(decoder.blocks()):
        with graph.scope(f"layers.{index}"):
            x_MH = _layer(graph, layer, step, index, x_MH, joined_MJ)
        if index in tapped_layers:
            tapped.append(x_MH)
    return x_MH, tapped


def _layer(graph: Graph, layer: Layer, step: _Step, index: int, x_MH: Any, joined_MJ: Any) -> Any:
    """A layer; its query, key and value see the joined inputs where it has no norm for them."""
    seen = joined_MJ if layer.attn_norm is None else rms_norm(graph, x_MH, layer.attn_norm)
    attended = _attention(graph, layer, step, index, seen)
    x_MH = graph.add(x_MH, graph.cast(graph.linear(attended, layer.o), torch.float32))
    inner = layer.spec.intermediate_size
    gate_up = graph.linear(rms_norm(graph, x_MH, layer.mlp_norm), layer.gate_up)
    gate, up = graph.columns(gate_up, 0, inner), graph.columns(gate_up, inner, inner)
    gated = graph.mul(graph.mul(gate, graph.sigmoid(gate)), up)
    return graph.add(x_MH, graph.cast(graph.linear(gated, layer.down), torch.float32))


def _attention(graph: Graph, layer: Layer, step: _Step, index: int, seen: Any) -> Any:
    """Attended values, [M, N * D], for what query, key and value see; the step's keys and values are written into the
    cache."""
    spec = layer.spec
    dim, query_heads, kv_heads = spec.head_dim, spec.num_heads, spec.num_kv_heads
    qkv_BXTD = graph.split_heads(graph.linear(seen, layer.qkv), step.shape_BT, query_heads + 2 * kv_heads, dim)
    turned_BXTD = rotated(graph, layer, graph.columns(qkv_BXTD, 0, query_heads + kv_heads), step)
    k_BKTD, v_BKTD = (
        graph.columns(x, query_heads + i * kv_heads, kv_heads) for i, x in enumerate((turned_BXTD, qkv_BXTD))
    )
    keys, values = step.caches[index]
    keys = graph.update_cache(keys, k_BKTD, step.first_slot_B, f"keys_{index}_out")
    values = graph.update_cache(values, v_BKTD, step.first_slot_B, f"values_{index}_out")
    # The query heads of one key/value head are taken as further queries of it: TensorRT would copy the whole cache for
    # each of them.
    q_BKXD = graph.reshape(graph.columns(turned_BXTD, 0, query_heads), (0, kv_heads, -1, dim))
    keys, values = (graph.first_positions(x, step.num_keys) for x in (keys, values))
    attended = graph.attention(q_BKXD, keys, values, step.mask_B1XV)
    return graph.join_heads(attended, kv_heads, query_heads // kv_heads, dim)


def query_scale(head_dim: int) -> float:
    """What scores are multiplied by; TensorRT's attention leaves it to its caller."""
    return head_dim**-0.5


def rotated(graph: Graph, layer: Layer, qk_BXTD: Any, step: _Step) -> Any:
    """Queries (the first N heads) and keys turned by their positions' angles, in pairs half a head apart, and scaled.

    Both at once, in fp32 with one rounding at the end: half the layers to compile."""
    spec = layer.spec
    heads = (spec.num_heads, spec.num_kv_heads)
    x = graph.cast(qk_BXTD, torch.float32)
    if layer.q_norm is not None and layer.k_norm is not None:
        weights = [norm.weight.expand(n, -1) for norm, n in zip((layer.q_norm, layer.k_norm), heads, strict=True)]
        weight_1X1D = torch.cat(weights)[None, :, None]
        x = graph.mul(graph.over_rms(x, spec.rms_norm_eps), graph.constant(weight_1X1D, torch.float32))
    x = graph.rotary(x, step.cos_SP, step.sin_SP, step.position_BT)
    return graph.cast(graph.mul(x, graph.constant(step.scale_1X11, torch.float32)), graph.dtype)


def _head(graph: Graph, decoder: Decoder, step: _Step, x_MH: Any, ops: NetworkOps) -> tuple[Any, Any, Any]:
    """The gathered rows' hidden states, before and after the final norm, and their logits: the LM head sees no
    others."""
    norm = decoder.norm
    assert norm.eps is not None
    hidden_RH, normed_RH = ops.sparse_gather(x_MH, step.gather_rows_R, norm.weight, norm.eps)
    return hidden_RH, normed_RH, graph.cast(graph.linear(normed_RH, decoder.lm_head), torch.float32)
