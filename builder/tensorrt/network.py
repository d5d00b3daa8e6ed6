"""The TensorRT network of a target or a draft: the engine contract as a strongly typed `INetworkDefinition`.

One step runs T tokens of B rows: writes their keys and values into the cache in place, attends under the mask "key j is visible
to the query at position i when j <= i", gathers R rows of the result, and runs final norm, LM head and top-1 over those alone. Prefill,
decoding, ragged verification and decoding after a rollback are this one network (`ssv.runtime.engines.contract`).

Inputs: `input_ids` int32 [B, T]; `position` int32 [B]; `gather_rows` int32 [R]; `key_positions` int32 [V], 0 to V - 1, where V is at
least the largest position + 1: attention looks at so much of the cache and no more, its cost follows the context, not max_length; for a conditioned draft `features` fp32
[B, T, F]; `keys_0`, `values_0`, ... [B, K, S, D], which share memory with the outputs `keys_0_out`, ....
Outputs: `hidden` fp32 [R, H]; `logits` fp32 [R, V]; `token` int32 [R], its id in the vocabulary; of a target that has a tap, `features`
fp32 [M, F]; of a draft, `token_prob` and, if it has a scorer, `reject_prob`, fp32 [R].

What runs in which type. Products, cache and attention: the compute type, fp16 or bf16 (in FP8 engines products multiply FP8). fp32:
* the residual stream and what is added to it: it carries values of tens of thousands at the first token, at which fp16 has a
  resolution of 16 and bf16 of 128, and everything small that later layers add would be rounded away;
* RMSNorm: squares of such values overflow fp16;
* rope, with the attention's scale 1 / sqrt(D): rounded once, after both; angles are tables made in fp32, bf16 cannot tell positions 257 and
  258 apart;
* logits once they are multiplied, hence top-1, probability, entropy and scorer: a sum over the vocabulary.
The softmax of attention is TensorRT's own, which accumulates in fp32.

Shapes: B rows, T tokens, M = B * T, R gathered rows, H hidden, I inputs and O outputs of a linear layer, N query heads, K key/value heads, D head
dim, P = D / 2, S cache length, V positions looked at or head rows, F features, L layers.

The gather with the final norm, and what is read off a draft's logits, are ops of `ssv.plugins`: plugins or layers of TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ssv.builder.tensorrt.spill import Spill
from ssv.bundle.tensorrt_api import EngineBuildError, Flavor, data_type
from ssv.model.decoder import Decoder, Layer
from ssv.model.draft import Draft, FeatureTap
from ssv.model.quantized import AwqLinear, Fp8Linear, QuantizedLinear
from ssv.model.scorer import Scorer
from ssv.plugins.contract import NUM_CONFIDENCE
from ssv.plugins.tensorrt import NativeOps, NetworkOps

# Tapped hidden states are divided by this before the tap's product and its result multiplied again, both exactly: the sums
# of what is largest in the residual stream would overflow fp16.
_TAP_SCALE = 64.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine is built for.

    Attributes:
        max_batch: rows of a step.
        max_length: S, tokens that a row of the cache holds.
        max_pending: most tokens verified with the one before them, which sets the widest verification.
        prefill_chunk: most tokens of a row in any step.
    """

    max_batch: int
    max_length: int
    max_pending: int
    prefill_chunk: int

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_pending"):
            if getattr(self, name) < 1:
                raise EngineBuildError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.max_pending + 1 < self.prefill_chunk <= self.max_length:
            raise EngineBuildError(
                f"prefill_chunk {self.prefill_chunk} must be more than max_pending + 1 = {self.max_pending + 1} and at most "
                f"max_length {self.max_length}: choose other limits"
            )


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step: rows, tokens of each, gathered rows, and positions of the cache that are looked at."""

    batch: int
    tokens: int
    gathered: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes that one optimization profile covers, and those it is tuned for."""

    name: str
    smallest: StepShape
    usual: StepShape
    largest: StepShape


def profiles(limits: Limits, flavor: Flavor) -> tuple[Profile, ...]:
    """Decoding, verification and prefill, the narrowest first: a step takes the first that covers it.

    TensorRT chooses kernels for what is usual in each. TensorRT for RTX makes kernels for the very shapes that it meets when
    it runs (its documentation, "Working with Dynamic Shapes"), and each profile costs it 10 s and 30 MB with 30 layers: there verification
    and prefill share one.
    """
    batch, width, chunk, length = limits.max_batch, limits.max_pending + 1, limits.prefill_chunk, limits.max_length
    one = StepShape(1, 1, 1, 1)

    def profile(name: str, usual: tuple[int, int, int], largest: tuple[int, int, int]) -> Profile:
        return Profile(name, one, StepShape(*usual, min(1024, length)), StepShape(*largest, length))

    decode = profile("decode", (batch, 1, batch), (batch, 1, batch))
    if flavor == "tensorrt_rtx":
        return decode, profile("verify and prefill", (batch, width, batch * width), (batch, chunk, batch * width))
    return (
        decode,
        profile("verify", (batch, width, batch * width), (batch, width, batch * width)),
        profile("prefill", (1, chunk, 1), (batch, chunk, batch * width)),
    )


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
        scaled = graph.mul(graph.concat(tapped, axis=1), graph.scalar(1 / _TAP_SCALE, rank=2))
        features = graph.linear(graph.cast(scaled, graph.dtype), tap.project)
        graph.output("features", graph.mul(graph.cast(features, torch.float32), graph.scalar(_TAP_SCALE, rank=2)))
    hidden_RH, logits_RV = _head(graph, decoder, step, x_MH, ops or NativeOps(graph))
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
    x_MH = _embedded(graph, decoder, step)
    if draft.conditioned:
        hidden = decoder.spec.hidden_size
        features_MF = graph.reshape(graph.input("features", torch.float32, (-1, -1, hidden)), (-1, hidden))
        joined = (rms_norm(graph, x_MH, draft.embed_norm), rms_norm(graph, features_MF, draft.feature_norm))
        x_MH = graph.add(features_MF, graph.cast(graph.linear(graph.concat(joined, axis=1), draft.join), torch.float32))
    x_MH, _ = _layers(graph, decoder, step, x_MH, ())
    hidden_RH, logits_RV = _head(graph, decoder, step, x_MH, ops)
    weight_F = scorer.weight_F if scorer is not None else torch.zeros(NUM_CONFIDENCE)
    bias_1 = scorer.bias.reshape(1) if scorer is not None else torch.zeros(1)
    found = ops.score(hidden_RH, logits_RV, weight_F, bias_1)
    graph.output("hidden", hidden_RH)
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
    own = {"gather_rows": step.gathered, "key_positions": step.num_keys}
    dynamic = iter((own[name],) if name in own else (step.batch, step.tokens))
    return tuple(next(dynamic) if size < 0 else size for size in shape)


# --- parts ----------------------------------------------------------------------------------------------------------


class _Step:
    """What all layers of a step share."""

    def __init__(self, graph: Graph, decoder: Decoder, limits: Limits) -> None:
        spec, length = decoder.spec, limits.max_length
        ids_BT = graph.input("input_ids", torch.int32, (-1, -1))
        self.position_B = graph.input("position", torch.int32, (-1,))
        self.gather_rows_R = graph.input("gather_rows", torch.int32, (-1,))
        self.ids_M = graph.reshape(ids_BT, (-1,))
        self.shape_BT = graph.shape(ids_BT)
        offset_1T = graph.first_columns(torch.arange(limits.prefill_chunk, dtype=torch.int32)[None], self.shape_BT)
        self.position_BT = graph.add(graph.reshape(self.position_B, (-1, 1)), offset_1T)
        angle_SP = torch.arange(length).float()[:, None] * decoder.spec.rope_frequencies()
        self.cos_SP = graph.constant(angle_SP.cos(), torch.float32)
        self.sin_SP = graph.constant(angle_SP.sin(), torch.float32)
        scales = torch.cat((torch.full((spec.num_heads,), query_scale(spec.head_dim)), torch.ones(spec.num_kv_heads)))
        self.scale_1X11 = scales.view(1, -1, 1, 1)
        keys_V = graph.input("key_positions", torch.int32, (-1,))
        self.num_keys = graph.shape(keys_V)
        mask_B1TV = visible(graph, self.position_BT, keys_V)
        self.mask_B1XV = graph.concat([mask_B1TV] * (spec.num_heads // spec.num_kv_heads), axis=2)
        cache = (-1, spec.num_kv_heads, length, spec.head_dim)
        self.caches = [
            tuple(graph.input(f"{kind}_{layer}", graph.dtype, cache) for kind in ("keys", "values"))
            for layer in range(spec.num_layers)
        ]


def visible(graph: Graph, position_BT: Any, keys_V: Any) -> Any:
    """The mask, bool [B, 1, T, V]: key j is visible to a query at position i when j <= i."""
    return graph.not_(graph.greater(graph.unsqueeze(keys_V, (0, 1, 2)), graph.unsqueeze(position_BT, (1, 3))))


def rms_norm(graph: Graph, x: Any, norm: nn.RMSNorm) -> Any:
    """Norm over the last axis of fp32, rounded to the compute type."""
    assert norm.eps is not None
    return graph.rms_norm(x, norm.weight, norm.eps)


def _embedded(graph: Graph, decoder: Decoder, step: _Step) -> Any:
    rows_MH = graph.gather(graph.constant(decoder.embed.weight, graph.dtype), step.ids_M)
    return graph.cast(rows_MH, torch.float32)


def _layers(
    graph: Graph, decoder: Decoder, step: _Step, x_MH: Any, tapped_layers: Sequence[int]
) -> tuple[Any, list[Any]]:
    tapped = []
    for index, layer in enumerate(decoder.blocks()):
        with graph.scope(f"layers.{index}"):
            x_MH = _layer(graph, layer, step, index, x_MH)
        if index in tapped_layers:
            tapped.append(x_MH)
    return x_MH, tapped


def _layer(graph: Graph, layer: Layer, step: _Step, index: int, x_MH: Any) -> Any:
    attended = _attention(graph, layer, step, index, rms_norm(graph, x_MH, layer.attn_norm))
    x_MH = graph.add(x_MH, graph.cast(graph.linear(attended, layer.o), torch.float32))
    inner = layer.spec.intermediate_size
    gate_up = graph.linear(rms_norm(graph, x_MH, layer.mlp_norm), layer.gate_up)
    gate, up = graph.columns(gate_up, 0, inner), graph.columns(gate_up, inner, inner)
    gated = graph.mul(graph.mul(gate, graph.sigmoid(gate)), up)
    return graph.add(x_MH, graph.cast(graph.linear(gated, layer.down), torch.float32))


def _attention(graph: Graph, layer: Layer, step: _Step, index: int, x_MH: Any) -> Any:
    """Attended values, [M, N * D]; the step's keys and values are written into the cache."""
    spec = layer.spec
    dim, query_heads, kv_heads = spec.head_dim, spec.num_heads, spec.num_kv_heads
    qkv_BXTD = graph.split_heads(graph.linear(x_MH, layer.qkv), step.shape_BT, query_heads + 2 * kv_heads, dim)
    turned_BXTD = rotated(graph, layer, graph.columns(qkv_BXTD, 0, query_heads + kv_heads), step)
    k_BKTD, v_BKTD = (
        graph.columns(x, query_heads + i * kv_heads, kv_heads) for i, x in enumerate((turned_BXTD, qkv_BXTD))
    )
    keys, values = step.caches[index]
    keys = graph.update_cache(keys, k_BKTD, step.position_B, f"keys_{index}_out")
    values = graph.update_cache(values, v_BKTD, step.position_B, f"values_{index}_out")
    # The query heads of one key/value head are taken as further queries of it: TensorRT would copy the whole cache for each of them.
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


def _head(graph: Graph, decoder: Decoder, step: _Step, x_MH: Any, ops: NetworkOps) -> tuple[Any, Any]:
    """The gathered rows' hidden states, and their logits: the LM head sees no others."""
    norm = decoder.norm
    assert norm.eps is not None
    hidden_RH, normed_RH = ops.gather_norm(x_MH, step.gather_rows_R, norm.weight, norm.eps)
    return hidden_RH, graph.cast(graph.linear(normed_RH, decoder.lm_head), torch.float32)


# --- operations -----------------------------------------------------------------------------------------------------


class Graph:
    """A network under construction: TensorRT's layers by what they compute.

    Attributes:
        dtype: the compute type.
        inputs: shape of each input, -1 where it varies.
    """

    def __init__(
        self, trt: ModuleType, network: Any, dtype: torch.dtype, complaint: Callable[[], str], spill: Spill
    ) -> None:
        self.trt, self.network, self.dtype, self.complaint, self._spill = trt, network, dtype, complaint, spill
        self.inputs: dict[str, tuple[int, ...]] = {}
        # A tensor is held with its constant, so that no other one comes to lie at its address.
        self._constants: dict[tuple[int, tuple[int, ...], torch.dtype], tuple[Tensor, Any]] = {}
        self._scalars: dict[tuple[float, int], Any] = {}
        self._head_shapes: dict[tuple[int, int], Any] = {}
        self._scope: list[str] = []

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names of layers added within begin with this one's, for profiles and error messages."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        self.inputs[name] = shape
        return self.network.add_input(name, data_type(self.trt, dtype), shape)

    def output(self, name: str, tensor: Any) -> None:
        tensor.name = name
        self.network.mark_output(tensor)

    def constant(self, tensor: Tensor, dtype: torch.dtype) -> Any:
        """A tensor as a constant of a type. One that is used twice, as a tied embedding is, is there once."""
        key = (tensor.data_ptr(), tuple(tensor.shape), dtype)
        if key not in self._constants:
            self._constants[key] = (tensor, self._new_constant(tensor, dtype))
        return self._constants[key][1]

    def forget(self) -> None:
        """Lets go of the tensors that constants were made of: TensorRT has its own addresses of them."""
        self._constants.clear()

    def scalar(self, value: float, rank: int) -> Any:
        """fp32, of as many axes as what it is combined with."""
        key = (value, rank)
        if key not in self._scalars:
            self._scalars[key] = self._new_constant(torch.full((1,) * rank, value), torch.float32)
        return self._scalars[key]

    def linear(self, x_MI: Any, layer: nn.Linear | QuantizedLinear) -> Any:
        """A linear layer, quantized or not, [M, O] in the compute type."""
        if isinstance(layer, Fp8Linear):
            y_MO = self._fp8_product(x_MI, layer)
        elif isinstance(layer, AwqLinear):
            y_MO = self._awq_product(x_MI, layer)
        else:
            assert isinstance(layer, nn.Linear)
            y_MO = self.matmul(x_MI, self.constant(layer.weight, self.dtype), transpose=True)
        bias: Tensor | None = layer.bias
        return y_MO if bias is None else self.add(y_MO, self.constant(bias.view(1, -1), self.dtype))

    def _fp8_product(self, x_MI: Any, layer: Fp8Linear) -> Any:
        fp8 = data_type(self.trt, torch.float8_e4m3fn)
        scale = self._new_constant(layer.input_scale.reshape(()), torch.float32)
        quantized = self._add("quantize", self.network.add_quantize(x_MI, scale, fp8))
        x_MI = self._add("dequantize", self.network.add_dequantize(quantized, scale, self._type(self.dtype)))
        scale_O = layer.scale_O
        same = bool((scale_O == scale_O[0]).all())
        weight_scale = self._new_constant(scale_O[0].reshape(()) if same else scale_O, torch.float32)
        values_OI = self._new_constant(layer.values_OI, torch.float8_e4m3fn)
        dequantize = self.network.add_dequantize(values_OI, weight_scale, self._type(self.dtype))
        if not same:
            dequantize.axis = 0
        return self.matmul(x_MI, self._add("dequantize", dequantize), transpose=True)

    def _awq_product(self, x_MI: Any, layer: AwqLinear) -> Any:
        if layer.input_factor_I is not None:
            x_MI = self.mul(x_MI, self._new_constant(layer.input_factor_I[None], self.dtype))
        # TensorRT wants INT4 weights as [I, O], two outputs in a byte, and groups along the first axis.
        packed_IP = layer.packed_PI.t().contiguous()
        inputs, outputs = packed_IP.shape[0], 2 * packed_IP.shape[1]
        weights = self.trt.Weights(self.trt.int4, self._spill.address(packed_IP), inputs * outputs)
        values_IO = self._add("int4", self.network.add_constant((inputs, outputs), weights))
        scale_GO = self._new_constant(layer.scale_OG.t(), self.dtype)
        dequantize = self.network.add_dequantize(values_IO, scale_GO, self._type(self.dtype))
        dequantize.axis = 0
        return self.matmul(x_MI, self._add("dequantize", dequantize), transpose=False)

    def matmul(self, x: Any, weight: Any, *, transpose: bool) -> Any:
        op = self.trt.MatrixOperation
        right = op.TRANSPOSE if transpose else op.NONE
        return self._add("product", self.network.add_matrix_multiply(x, op.NONE, weight, right))

    def rotary(self, x_BNTD: Any, cos_SP: Any, sin_SP: Any, position_BT: Any) -> Any:
        layer = self.network.add_rotary_embedding(x_BNTD, cos_SP, sin_SP, False, 0)
        layer.set_input(3, position_BT)
        return self._add("rope", layer)

    def update_cache(self, cache: Any, update: Any, position_B: Any, name: str) -> Any:
        """The cache with the step's entries; an output that is bound to the memory of the input."""
        layer = self.network.add_kv_cache_update(cache, update, position_B, self.trt.KVCacheMode.LINEAR)
        updated = self._add("cache", layer)
        self.output(name, updated)
        return updated

    def attention(self, q_BKXD: Any, keys_BKVD: Any, values_BKVD: Any, mask_B1XV: Any) -> Any:
        softmax, uncausal = self.trt.AttentionNormalizationOp.SOFTMAX, self.trt.CausalMaskKind.NONE
        attention = self.network.add_attention_v2(q_BKXD, keys_BKVD, values_BKVD, softmax, uncausal)
        if attention is None:
            raise EngineBuildError(f"TensorRT refuses attention{self._where()}: {self.complaint()}")
        attention.mask = mask_B1XV
        attention.decomposable = True  # where there is no fused kernel for these shapes
        return attention.get_output(0)

    def split_heads(self, x_MX: Any, shape_BT: Any, heads: int, dim: int) -> Any:
        """[M, N * D] as [B, N, T, D]."""
        key = (heads, dim)
        if key not in self._head_shapes:
            sizes = self._new_constant(torch.tensor(key), torch.int64)
            self._head_shapes[key] = self.concat((shape_BT, sizes), axis=0)
        shuffle = self.network.add_shuffle(x_MX)
        shuffle.set_input(1, self._head_shapes[key])
        shuffle.second_transpose = (0, 2, 1, 3)
        return self._add("heads", shuffle)

    def join_heads(self, x_BKXD: Any, heads: int, groups: int, dim: int) -> Any:
        """[B, K, G * T, D] as [M, K * G * D]."""
        shuffle = self.network.add_shuffle(x_BKXD)
        shuffle.reshape_dims = (0, heads, groups, -1, dim)
        shuffle.second_transpose = (0, 3, 1, 2, 4)
        return self.reshape(self._add("heads", shuffle), (-1, heads * groups * dim))

    def first_columns(self, values_1T: Tensor, shape_BT: Any) -> Any:
        """The first T of a constant's columns, T being known when the engine runs."""
        tokens = self._add("tokens", self.network.add_slice(shape_BT, (1,), (1,), (1,)))
        slice_ = self.network.add_slice(self.constant(values_1T, values_1T.dtype), (0,), (0,), (1,))
        slice_.set_input(2, tokens)
        slice_.axes = (1,)
        return self._add("columns", slice_)

    def first_positions(self, cache_BKSD: Any, num_keys: Any) -> Any:
        """The part of a cache that may hold something: [B, K, V, D]."""
        slice_ = self.network.add_slice(cache_BKSD, (0,), (0,), (1,))
        slice_.set_input(2, num_keys)
        slice_.axes = (2,)
        return self._add("seen", slice_)

    def columns(self, x_RX: Any, start: int, size: int) -> Any:
        """Some columns of a matrix, or some heads of [B, N, T, D]."""
        slice_ = self.network.add_slice(x_RX, (start,), (size,), (1,))
        slice_.axes = (1,)
        return self._add("columns", slice_)

    def shape(self, x: Any) -> Any:
        return self._add("shape", self.network.add_shape(x))

    def reshape(self, x: Any, sizes: tuple[int, ...]) -> Any:
        shuffle = self.network.add_shuffle(x)
        shuffle.reshape_dims = sizes
        return self._add("reshape", shuffle)

    def unsqueeze(self, x: Any, axes: tuple[int, ...]) -> Any:
        axes_constant = self._new_constant(torch.tensor(axes, dtype=torch.int32), torch.int32)
        return self._add("unsqueeze", self.network.add_unsqueeze(x, axes_constant))

    def gather(self, x: Any, rows: Any) -> Any:
        """Rows of the first axis."""
        return self._add("gather", self.network.add_gather(x, rows, 0))

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        layer = self.network.add_concatenation(list(parts))
        layer.axis = axis
        return self._add("concat", layer)

    def top(self, x_RV: Any, k: int) -> tuple[Any, Any]:
        """The k largest of each row and their columns, int32."""
        layer = self.network.add_topk(x_RV, self.trt.TopKOperation.MAX, k, 1 << 1)
        return self._add("top", layer), layer.get_output(1)

    def select(self, condition: Any, yes: Any, no: Any) -> Any:
        return self._add("select", self.network.add_select(condition, yes, no))

    def cast(self, x: Any, dtype: torch.dtype) -> Any:
        return self._add("cast", self.network.add_cast(x, self._type(dtype)))

    def sum(self, x: Any) -> Any:
        return self._reduce(x, self.trt.ReduceOperation.SUM)

    def mean(self, x: Any) -> Any:
        return self._reduce(x, self.trt.ReduceOperation.AVG)

    def _reduce(self, x: Any, op: Any) -> Any:
        last = 1 << (len(x.shape) - 1)
        return self._add("reduce", self.network.add_reduce(x, op, last, True))

    def over_rms(self, x: Any, eps: float) -> Any:
        """fp32 divided by its root mean square over the last axis."""
        mean_square = self.mean(self.mul(x, x))
        return self.div(x, self.sqrt(self.add(mean_square, self.scalar(eps, rank=len(x.shape)))))

    def rms_norm(self, x: Any, weight_H: Tensor, eps: float) -> Any:
        """Norm over the last axis of fp32, rounded to the compute type. TensorRT's own normalization subtracts the mean."""
        weight = weight_H.view(*[1] * (len(x.shape) - 1), -1)
        return self.cast(self.mul(self.over_rms(x, eps), self.constant(weight, torch.float32)), self.dtype)

    def cumulative_sum(self, x: Any, axis: int) -> Any:
        """Sums up to and with each element."""
        number = self._new_constant(torch.tensor(axis, dtype=torch.int32), torch.int32)
        op = self.trt.CumulativeOperation.SUM
        return self._add("cumulative", self.network.add_cumulative(x, number, op, False, False))

    def scatter(self, x_M: Any, place_R: Any, update_R: Any) -> Any:
        """A vector with some elements replaced; no place may be named twice, unless by equal updates."""
        mode = self.trt.ScatterMode.ELEMENT
        return self._add("scatter", self.network.add_scatter(x_M, place_R, update_R, mode))

    def integer(self, value: int, rank: int) -> Any:
        """int32, of as many axes as what it is combined with."""
        return self._new_constant(torch.full((1,) * rank, value, dtype=torch.int32), torch.int32)

    def largest(self, x: Any, axis: int) -> Any:
        return self._add("reduce", self.network.add_reduce(x, self.trt.ReduceOperation.MAX, 1 << axis, True))

    def and_(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, self.trt.ElementWiseOperation.AND)

    def or_(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, self.trt.ElementWiseOperation.OR)

    def add(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, self.trt.ElementWiseOperation.SUM)

    def sub(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, self.trt.ElementWiseOperation.SUB)

    def mul(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, self.trt.ElementWiseOperation.PROD)

    def div(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, self.trt.ElementWiseOperation.DIV)

    def max(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, self.trt.ElementWiseOperation.MAX)

    def equal(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, self.trt.ElementWiseOperation.EQUAL)

    def greater(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, self.trt.ElementWiseOperation.GREATER)

    def _elementwise(self, a: Any, b: Any, op: Any) -> Any:
        return self._add(op.name.lower(), self.network.add_elementwise(a, b, op))

    def exp(self, x: Any) -> Any:
        return self._unary(x, self.trt.UnaryOperation.EXP)

    def log(self, x: Any) -> Any:
        return self._unary(x, self.trt.UnaryOperation.LOG)

    def sqrt(self, x: Any) -> Any:
        return self._unary(x, self.trt.UnaryOperation.SQRT)

    def not_(self, x: Any) -> Any:
        return self._unary(x, self.trt.UnaryOperation.NOT)

    def _unary(self, x: Any, op: Any) -> Any:
        return self._add(op.name.lower(), self.network.add_unary(x, op))

    def sigmoid(self, x: Any) -> Any:
        return self._add("sigmoid", self.network.add_activation(x, self.trt.ActivationType.SIGMOID))

    def _new_constant(self, tensor: Tensor, dtype: torch.dtype) -> Any:
        held = tensor.detach().cpu().to(dtype).contiguous()
        if dtype == torch.float16 and tensor.dtype != dtype and bool(held.isinf().any()):
            raise EngineBuildError("a weight exceeds fp16's range: build with --precision bf16")
        weights = self.trt.Weights(self._type(dtype), self._spill.address(held), held.numel())
        return self._add("constant", self.network.add_constant(tuple(held.shape), weights))

    def _type(self, dtype: torch.dtype) -> Any:
        return data_type(self.trt, dtype)

    def _add(self, name: str, layer: Any) -> Any:
        """First output of a layer that has been added."""
        if layer is None:
            raise EngineBuildError(f"TensorRT refuses a layer ({name}{self._where()}): {self.complaint()}")
        layer.name = ".".join((*self._scope, name, str(self.network.num_layers)))
        return layer.get_output(0)

    def _where(self) -> str:
        return f" in {'.'.join(self._scope)}" if self._scope else ""
