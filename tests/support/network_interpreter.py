"""Evaluates a TensorRT network definition layer by layer with torch on the CPU.

Tests prove with it that a network computes what the torch engine computes, without a GPU. It knows nothing of who
built the network: layer types, attributes, constants, shapes and dtypes are read back from the network object alone. A
layer, attribute or operation that it does not know raises NotImplementedError; nothing is approximated.

Numerics are those of a strongly typed network: each layer's output is rounded once to the dtype that the network
declares for it. Before that, matrix products, attention, reductions, softmax and transcendental functions are computed
in fp64: so a token's result does not depend on the order in which a library sums or on the tokens beside it, and trees
can be compared with their chains bit for bit.

Shapes: B rows, N query heads, M key/value heads, T tokens, S positions of the cache, D head size, R rotated part of D.
"""

from __future__ import annotations

import ctypes
import graphlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A layer that was read back: takes its inputs (None where an optional one is absent), returns its output or outputs.
Operation = Callable[..., "Tensor | tuple[Tensor, ...]"]

# By the name of trt.DataType. INT4 values are kept one per int8.
_TORCH_DTYPE = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT4": torch.int8,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
_FP8_MAX = 448.0


def _torch_dtype(tensor: Any) -> torch.dtype:
    """The torch dtype of a trt.ITensor."""
    if (name := tensor.dtype.name) not in _TORCH_DTYPE:
        raise NotImplementedError(f"data type {name}")
    return _TORCH_DTYPE[name]


def _require(attribute: str, value: Any, supported: Any) -> None:
    if value != supported:
        raise NotImplementedError(f"{attribute} {value}: only {supported}")


def _has_input(layer: Any, index: int) -> bool:
    return index < layer.num_inputs and layer.get_input(index) is not None


def _ints(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.reshape(-1).tolist())


def _bits(mask: int) -> tuple[int, ...]:
    """The axes of a bit mask."""
    return tuple(axis for axis in range(mask.bit_length()) if mask >> axis & 1)


def _single_axis(mask: int) -> int:
    (axis,) = _bits(mask)
    return axis


# --- constants -------------------------------------------------------------------------------------------------------


class _Weights(ctypes.Structure):
    """nvinfer1::Weights."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def _weights_bytes(weights: Any, num_bytes: int) -> Tensor:
    """A copy of the memory behind a trt.Weights. [num_bytes] uint8."""
    # The bindings give no pointer for types that numpy lacks. A pybind11 instance keeps the address of its C++ object
    # right behind the object's header; that it is a Weights is checked against what the bindings do tell.
    address = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    assert address is not None
    raw = _Weights.from_address(address)
    if (raw.type, raw.count) != (int(weights.dtype), weights.size):
        raise RuntimeError("trt.Weights does not have the expected memory layout")
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(raw.values), dtype=torch.uint8).clone()


def _unpack_int4(packed: Tensor, count: int) -> Tensor:
    """Two values per byte, the first in the low nibble (github.com/onnx/onnx/pull/5811). [count] int8 in [-8, 7]."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten()[:count].to(torch.int8)
    return (nibbles ^ 8) - 8


def _constant(layer: Any) -> Operation:
    weights, declared = layer.weights, layer.get_output(0)
    dtype = _torch_dtype(declared)
    if isinstance(weights, np.ndarray):
        value = torch.from_numpy(weights.copy())
    elif declared.dtype.name == "INT4":
        value = _unpack_int4(_weights_bytes(weights, (weights.size + 1) // 2), weights.size)
    else:
        value = _weights_bytes(weights, weights.size * dtype.itemsize).view(dtype)
    value = value.reshape(tuple(layer.shape))
    return lambda: value


def _fill(layer: Any) -> Operation:
    _require("fill operation", layer.operation.name, "LINSPACE")
    dtype = _torch_dtype(layer.get_output(0))
    number = float if dtype.is_floating_point else int
    fixed_shape = None if _has_input(layer, 0) else tuple(layer.shape)
    fixed_start: float = 0 if _has_input(layer, 1) else layer.alpha
    fixed_steps = None if _has_input(layer, 2) else (layer.beta,)

    def fill(shape: Tensor | None = None, start: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
        sizes = _ints(shape) if shape is not None else fixed_shape
        step_of = _ints(steps) if steps is not None else fixed_steps
        assert sizes is not None and step_of is not None
        if len(step_of) != len(sizes):
            raise NotImplementedError(f"LINSPACE of {len(sizes)} dimensions by {len(step_of)} steps")
        value = torch.full(sizes, number(fixed_start if start is None else start.item()), dtype=dtype)
        for axis, (size, step) in enumerate(zip(sizes, step_of, strict=True)):
            ramp = torch.arange(size, dtype=dtype) * number(step)
            value += ramp.view(-1, *(1,) * (len(sizes) - axis - 1))
        return value

    return fill


# --- pointwise -------------------------------------------------------------------------------------------------------


def _divide(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point():
        return a / b
    if (a < 0).any() or (b < 0).any():  # documented neither as truncation nor as floor
        raise NotImplementedError("elementwise DIV of negative integers")
    return torch.div(a, b, rounding_mode="floor")


def _of_numbers(function: Operation) -> Operation:
    """NVIDIA's page of the operator does not say whether MAX and MIN of NaN and a number are NaN."""

    def checked(a: Tensor, b: Tensor) -> Tensor:
        if a.isnan().any() or b.isnan().any():
            raise NotImplementedError("elementwise MAX or MIN of NaN")
        return function(a, b)

    return checked


# Operands have one dtype and one rank (TensorRT refuses others): torch promotes and broadcasts them as TensorRT does.
_ELEMENTWISE: dict[str, Operation] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": _of_numbers(torch.maximum),
    "MIN": _of_numbers(torch.minimum),
    "SUB": torch.sub,
    "DIV": _divide,
    "POW": torch.pow,
    "FLOOR_DIV": torch.floor_divide,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}


def _elementwise(layer: Any) -> Operation:
    operation, dtype = layer.op.name, _torch_dtype(layer.get_input(0))
    if operation not in _ELEMENTWISE or (operation == "POW" and not dtype.is_floating_point):
        raise NotImplementedError(f"elementwise {operation} of {dtype}")
    return _ELEMENTWISE[operation]


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "SIN": torch.sin,
    "COS": torch.cos,
    "TAN": torch.tan,
    "SINH": torch.sinh,
    "COSH": torch.cosh,
    "ASIN": torch.asin,
    "ACOS": torch.acos,
    "ATAN": torch.atan,
    "ASINH": torch.asinh,
    "ACOSH": torch.acosh,
    "ATANH": torch.atanh,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "ERF": torch.erf,
    "SIGN": torch.sign,
    "ROUND": torch.round,
    "ISINF": torch.isinf,
    "ISNAN": torch.isnan,
    "NOT": torch.logical_not,
}
_UNARY_OF_INTEGERS = {"ABS", "NEG", "SIGN"}


def _unary(layer: Any) -> Operation:
    operation, dtype, result = layer.op.name, _torch_dtype(layer.get_input(0)), _torch_dtype(layer.get_output(0))
    if operation not in _UNARY or not (
        dtype.is_floating_point or dtype == torch.bool or operation in _UNARY_OF_INTEGERS
    ):
        raise NotImplementedError(f"unary {operation} of {dtype}")
    function = _UNARY[operation]
    if dtype.is_floating_point:
        return lambda x: function(x.double()).to(result)
    return function


# f(x, alpha, beta), as trt.ActivationType documents them.
_ACTIVATION: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "RELU": lambda x, alpha, beta: x.relu(),
    "SIGMOID": lambda x, alpha, beta: x.sigmoid(),
    "TANH": lambda x, alpha, beta: x.tanh(),
    "LEAKY_RELU": lambda x, alpha, beta: torch.where(x >= 0, x, alpha * x),
    "ELU": lambda x, alpha, beta: torch.where(x >= 0, x, alpha * x.expm1()),
    "SOFTSIGN": lambda x, alpha, beta: x / (1 + x.abs()),
    "CLIP": lambda x, alpha, beta: x.clamp(max=beta).clamp(min=alpha),
    "HARD_SIGMOID": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "SCALED_TANH": lambda x, alpha, beta: alpha * (beta * x).tanh(),
    "THRESHOLDED_RELU": lambda x, alpha, beta: torch.where(x > alpha, x, 0.0),
    "GELU_ERF": lambda x, alpha, beta: torch.nn.functional.gelu(x),
    "GELU_TANH": lambda x, alpha, beta: torch.nn.functional.gelu(x, approximate="tanh"),
}


def _activation(layer: Any) -> Operation:
    # Downcast, the layer's `type` is that of the activation.
    name, dtype, alpha, beta = layer.type.name, _torch_dtype(layer.get_input(0)), layer.alpha, layer.beta
    if name not in _ACTIVATION or not dtype.is_floating_point:
        raise NotImplementedError(f"activation {name} of {dtype}")
    function = _ACTIVATION[name]
    return lambda x: function(x.double(), alpha, beta).to(dtype)


def _cast(layer: Any) -> Operation:
    source, dtype = _torch_dtype(layer.get_input(0)), _torch_dtype(layer.get_output(0))
    if layer.to_type.name in ("FP8", "INT4"):
        raise NotImplementedError(f"cast to {layer.to_type.name}")
    if not source.is_floating_point or dtype.is_floating_point or dtype == torch.bool:
        return lambda x: x.to(dtype)
    below, beyond = float(torch.iinfo(dtype).min - 1), float(torch.iinfo(dtype).max + 1)

    def truncate(x: Tensor) -> Tensor:
        wide = x.double()
        if not ((wide > below) & (wide < beyond)).all():  # NaN is neither
            raise NotImplementedError(f"cast of a number that {dtype} does not hold")
        return x.to(dtype)

    return truncate


def _identity(layer: Any) -> Operation:
    return lambda x: x


def _select(layer: Any) -> Operation:
    return torch.where


# --- along axes ------------------------------------------------------------------------------------------------------


def _softmax(layer: Any) -> Operation:
    axis, dtype = _single_axis(layer.axes), _torch_dtype(layer.get_input(0))
    return lambda x: x.double().softmax(axis).to(dtype)


def _product(x: Tensor, axes: Sequence[int], keep: bool, dtype: torch.dtype) -> Tensor:
    for axis in reversed(axes):
        x = x.prod(axis, keepdim=keep, dtype=dtype)
    return x


def _reduce(layer: Any) -> Operation:
    axes, keep, dtype = _bits(layer.axes), layer.keep_dims, _torch_dtype(layer.get_input(0))
    # Integers are summed in their own type, which torch would widen.
    accumulator = torch.float64 if dtype.is_floating_point else dtype
    operations: dict[str, Callable[[Tensor], Tensor]] = {
        "SUM": lambda x: x.sum(axes, keepdim=keep, dtype=accumulator),
        "PROD": lambda x: _product(x, axes, keep, accumulator),
        "MAX": lambda x: x.amax(axes, keepdim=keep),
        "MIN": lambda x: x.amin(axes, keepdim=keep),
        "AVG": lambda x: x.mean(axes, keepdim=keep, dtype=accumulator),
    }
    if (name := layer.op.name) not in operations or (name == "AVG" and not dtype.is_floating_point):
        raise NotImplementedError(f"reduce {name} of {dtype}")
    operation = operations[name]
    return lambda x: operation(x).to(dtype)


def _cumulative(layer: Any) -> Operation:
    """Sums along an axis up to each element, or from it on; that one is left out if `exclusive`."""
    _require("cumulative operation", layer.op.name, "SUM")
    exclusive, reverse, dtype = layer.exclusive, layer.reverse, _torch_dtype(layer.get_input(0))
    accumulator = torch.float64 if dtype.is_floating_point else dtype

    def cumulative(x: Tensor, axis: Tensor) -> Tensor:
        at = int(axis)  # raises unless it is one number
        x = x.flip(at) if reverse else x
        total = x.cumsum(at, dtype=accumulator)
        if exclusive:
            nothing = torch.zeros_like(total.narrow(at, 0, 1))
            total = torch.cat((nothing, total.narrow(at, 0, x.shape[at] - 1)), at)
        return (total.flip(at) if reverse else total).to(dtype)

    return cumulative


def _topk(layer: Any) -> Operation:
    """Sorted; of equal values the lower index first, as ONNX's TopK has it (NVIDIA's pages are silent on ties)."""
    axis, largest, index_dtype = _single_axis(layer.axes), layer.op.name == "MAX", _torch_dtype(layer.get_output(1))
    fixed_k: int = 0 if _has_input(layer, 1) else layer.k

    def topk(x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        count = fixed_k if k is None else int(k)
        # torch's topk picks any of equals. So take all that tie with the last, and sort those by index and value.
        last = x.topk(count, axis, largest).values.narrow(axis, count - 1, 1)
        candidates = int((x >= last if largest else x <= last).sum(axis).max())
        index = x.topk(max(candidates, count), axis, largest).indices.sort(axis).values
        order = x.gather(axis, index).sort(dim=axis, descending=largest, stable=True).indices
        index = index.gather(axis, order).narrow(axis, 0, count)
        return x.gather(axis, index), index.to(index_dtype)

    return topk


def _gather(layer: Any) -> Operation:
    axis, mode = layer.axis, layer.mode.name
    _require("gather's num_elementwise_dims", layer.num_elementwise_dims, 0)

    def default(data: Tensor, indices: Tensor) -> Tensor:
        at = axis % data.dim()
        picked = data.index_select(at, indices.reshape(-1))  # raises on an index out of bounds, negative ones included
        return picked.reshape(data.shape[:at] + indices.shape + data.shape[at + 1 :])

    def element(data: Tensor, indices: Tensor) -> Tensor:
        return data.gather(axis, indices.long())

    def nd(data: Tensor, indices: Tensor) -> Tensor:
        if indices.numel() and int(indices.min()) < 0:
            raise IndexError("gather by a negative index")
        return data[tuple(indices.long().unbind(-1))]

    modes: dict[str, Operation] = {"DEFAULT": default, "ELEMENT": element, "ND": nd}
    if mode not in modes:
        raise NotImplementedError(f"gather mode {mode}")
    return modes[mode]


def _scatter(layer: Any) -> Operation:
    """Data with output[.., index[.., i, ..], ..] = update[.., i, ..].

    "The spec does not guarantee a specific execution ordering for the updates"
    (https://github.com/onnx/onnx/issues/3234), and NVIDIA's page has none either: what different updates contend for
    becomes a value that is noticed wherever something depends on it.
    """
    axis, dtype = layer.axis, _torch_dtype(layer.get_input(0))
    _require("scatter mode", layer.mode.name, "ELEMENT")
    if dtype == torch.bool:
        raise NotImplementedError("scatter of torch.bool")
    undefined = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min

    def scatter(data: Tensor, index: Tensor, update: Tensor) -> Tensor:
        if index.shape != update.shape:
            raise ValueError(f"scatter of {tuple(update.shape)} to {tuple(index.shape)}")
        index = index.long()
        result = data.scatter(axis, index, update)  # raises on an index out of bounds, negative ones included
        lost = result.gather(axis, index) != update
        contended = torch.zeros(data.shape, dtype=torch.int32).scatter_add(axis, index, lost.int()) > 0
        return result.masked_fill(contended, undefined)

    return scatter


# --- shapes ----------------------------------------------------------------------------------------------------------


def _shape(layer: Any) -> Operation:
    return lambda x: torch.tensor(x.shape, dtype=torch.int64)


def _shuffle(layer: Any) -> Operation:
    first, second, zero_copies = tuple(layer.first_transpose), tuple(layer.second_transpose), layer.zero_is_placeholder
    # None: no reshape, or one that comes as an input (reading the attribute then makes TensorRT warn).
    fixed = None if _has_input(layer, 1) or layer.reshape_dims is None else tuple(layer.reshape_dims)

    def shuffle(x: Tensor, dims: Tensor | None = None) -> Tensor:
        x = x.permute(first[: x.dim()])  # a permutation is read back with all eight entries
        shape = _ints(dims) if dims is not None else fixed
        if shape is not None:
            x = x.reshape([x.shape[i] if size == 0 and zero_copies else size for i, size in enumerate(shape)])
        return x.permute(second[: x.dim()])

    return shuffle


def _slice(layer: Any) -> Operation:
    _require("slice mode", layer.mode.name, "STRICT_BOUNDS")

    def fixed(index: int, attribute: str) -> tuple[int, ...] | None:
        dims = None if _has_input(layer, index) else getattr(layer, attribute)
        return None if dims is None else tuple(dims)

    all_fixed = fixed(1, "start"), fixed(2, "shape"), fixed(3, "stride"), fixed(5, "axes")

    def slice_(
        x: Tensor,
        start: Tensor | None = None,
        size: Tensor | None = None,
        stride: Tensor | None = None,
        fill: Tensor | None = None,  # of another mode
        axes: Tensor | None = None,
    ) -> Tensor:
        starts, sizes, strides, along = (
            attribute if tensor is None else _ints(tensor)
            for tensor, attribute in zip((start, size, stride, axes), all_fixed, strict=True)
        )
        assert starts is not None and sizes is not None and strides is not None
        for axis, begin, count, step in zip(along or range(x.dim()), starts, sizes, strides, strict=True):
            length = x.shape[axis]
            if count and not (0 <= begin < length and 0 <= begin + (count - 1) * step < length):
                raise IndexError(f"slice of {count} from {begin} by {step} out of axis {axis} of size {length}")
            # torch's own slices have no negative steps, and no 0, by which TensorRT repeats.
            index = None if step == 1 else begin + step * torch.arange(count)
            x = x.narrow(axis, begin, count) if index is None else x.index_select(axis, index)
        return x

    return slice_


def _concatenation(layer: Any) -> Operation:
    axis = layer.axis
    return lambda *tensors: torch.cat(tensors, axis)


def _squeeze(layer: Any) -> Operation:
    def squeeze(x: Tensor, axes: Tensor) -> Tensor:
        if any(x.shape[axis] != 1 for axis in _ints(axes)):
            raise ValueError(f"squeeze of axes {_ints(axes)} of {tuple(x.shape)}")
        return x.squeeze(_ints(axes))

    return squeeze


def _unsqueeze(layer: Any) -> Operation:
    def unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
        rank = x.dim() + axes.numel()
        for axis in sorted(axis % rank for axis in _ints(axes)):
            x = x.unsqueeze(axis)
        return x

    return unsqueeze


# --- transformer layers ----------------------------------------------------------------------------------------------


def _matrix_multiply(layer: Any) -> Operation:
    op0, op1, dtype = layer.op0.name, layer.op1.name, _torch_dtype(layer.get_output(0))
    if not dtype.is_floating_point or {op0, op1} - {"NONE", "TRANSPOSE", "VECTOR"}:
        raise NotImplementedError(f"matrix multiply {op0}, {op1} of {dtype}")

    def matrix_multiply(a: Tensor, b: Tensor) -> Tensor:
        a = a.unsqueeze(-2) if op0 == "VECTOR" else a.mT if op0 == "TRANSPOSE" else a
        b = b.unsqueeze(-1) if op1 == "VECTOR" else b.mT if op1 == "TRANSPOSE" else b
        product = a.double() @ b.double()
        product = product.squeeze(-1) if op1 == "VECTOR" else product
        product = product.squeeze(-1 if op1 == "VECTOR" else -2) if op0 == "VECTOR" else product
        return product.to(dtype)

    return matrix_multiply


def _rotary_embedding(layer: Any) -> Operation:
    """Rotates pairs (i, i + R/2), interleaved (2i, 2i + 1), by the angles in the caches.

    The formula is the ONNX operator's that TensorRT imports as this layer (https://onnx.ai/onnx/operators/
    onnx__RotaryEmbedding.html); shapes as in https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/
    transformers-rope.html.
    """
    interleaved, rotated = layer.interleaved, layer.rotary_embedding_dim

    def rotary(x_BNTD: Tensor, cos: Tensor, sin: Tensor, position_BT: Tensor | None = None) -> Tensor:
        if position_BT is not None:  # then the caches are tables by position; raises on one out of bounds
            cos, sin = (table.index_select(0, position_BT.flatten()) for table in (cos, sin))
            cos, sin = (rows.reshape(*position_BT.shape, -1) for rows in (cos, sin))
        cos_B1Tr, sin_B1Tr = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
        size = rotated or x_BNTD.shape[-1]
        head, rest = x_BNTD[..., :size].float(), x_BNTD[..., size:]
        a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
        pair = a * cos_B1Tr - b * sin_B1Tr, a * sin_B1Tr + b * cos_B1Tr
        head = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
        return torch.cat((head.to(x_BNTD.dtype), rest), dim=-1)

    return rotary


def _kv_cache_update(layer: Any) -> Operation:
    """Writes update[b, :, t] to cache[b, :, write_indices[b] + t], in the caller's memory.

    As https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/KVCacheUpdate.html has it.
    """
    _require("cache mode", layer.cache_mode.name, "LINEAR")
    _require("cache update form", layer.update_form.name, "PADDED_BHND")

    def kv_cache_update(cache_BMSD: Tensor, update_BMTD: Tensor, write_indices_B: Tensor) -> Tensor:
        starts, length, tokens = _ints(write_indices_B), cache_BMSD.shape[2], update_BMTD.shape[2]
        if any(
            not 0 <= start <= length - tokens for start in starts
        ):  # TensorRT would ignore such writes: always a bug here
            raise IndexError(f"{tokens} tokens written at {starts} of a cache of {length}")
        for row, start in enumerate(starts):
            cache_BMSD[row, :, start : start + tokens] = update_BMTD[row]
        return cache_BMSD

    return kv_cache_update


def _attention_input(layer: Any) -> Operation:
    """The whole attention: softmax(q k^T + mask) v, of which ATTENTION_OUTPUT passes the result on.

    Scores are not scaled: TensorRT wants the scale multiplied into q or k before (https://docs.nvidia.com/deeplearning/
    tensorrt/latest/inference-library/transformers-fused-attention.html, which gives the mask's meaning too). The result
    of a query that sees no key is NaN.
    """
    attention = layer.attention
    _require("attention normalization", attention.norm_op.name, "SOFTMAX")
    _require("causal kind", attention.causal_kind.name, "NONE")
    _require("query form", attention.query_form.name, "PADDED_BHND")
    _require("key/value form", attention.key_value_form.name, "PADDED_BHND")
    _require("attention's num_ranks", attention.num_ranks, 1)
    # Beyond the mask: quantization scale, query lengths, key/value lengths.
    _require("attention's further inputs", [i for i in range(4, layer.num_inputs) if _has_input(layer, i)], [])
    dtype = _torch_dtype(layer.get_output(0))

    def attend(q_BNTD: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, heads, tokens, size = q_BNTD.shape
        # Query heads n of a group share key/value head n // (N/M): stacked along the tokens, they need no copied keys.
        grouped = q_BNTD.double().reshape(rows, k_BMSD.shape[1], -1, size)
        score_BNTS = (grouped @ k_BMSD.double().mT).view(rows, heads, tokens, -1)
        if mask is not None:
            hidden = (
                score_BNTS.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score_BNTS + mask.double()
            )
            score_BNTS = hidden
        weight = score_BNTS.softmax(-1).view(rows, k_BMSD.shape[1], -1, score_BNTS.shape[-1])
        return (weight @ v_BMSD.double()).view(rows, heads, tokens, -1).to(dtype)

    return attend


# --- quantization ----------------------------------------------------------------------------------------------------


def _scale_broadcaster(layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """How a (de)quantize layer's scale (one value, one per index of an axis, or one per block) meets its data."""
    if _has_input(layer, 2):
        raise NotImplementedError("zero points")
    axis = layer.axis
    try:
        block_shape = tuple(layer.block_shape)
    except RuntimeError:  # how the bindings say that it is not set; then blocks follow from the shapes
        block_shape = None

    def broadcast(scale: Tensor, data: Tensor) -> Tensor:
        scale = scale.float()
        if scale.numel() == 1:
            return scale.reshape(())
        if scale.dim() == 1 and axis >= 0:
            if scale.shape[0] != data.shape[axis]:
                raise ValueError(f"{scale.shape[0]} scales along axis {axis} of {tuple(data.shape)}")
            return scale.view(-1, *(1,) * (data.dim() - axis - 1))
        blocks = tuple(size // max(count, 1) for size, count in zip(data.shape, scale.shape, strict=True))
        covered = tuple(block * count for block, count in zip(blocks, scale.shape, strict=True))
        stated = blocks
        if block_shape is not None:  # -1: all of a dimension
            stated = tuple(size if block == -1 else block for block, size in zip(block_shape, data.shape, strict=True))
        if covered != tuple(data.shape) or stated != blocks:
            raise ValueError(f"scales {tuple(scale.shape)}, block shape {block_shape} of {tuple(data.shape)}")
        for dim, block in enumerate(blocks):
            scale = scale.repeat_interleave(block, dim)
        return scale

    return broadcast


def _quantize(layer: Any) -> Operation:
    broadcast, to_type = _scale_broadcaster(layer), layer.get_output(0).dtype.name

    def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
        return (x.float() / broadcast(scale, x)).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)

    def to_int8(x: Tensor, scale: Tensor) -> Tensor:
        return (x.float() / broadcast(scale, x)).round().clamp(-128, 127).to(torch.int8)

    types: dict[str, Operation] = {"FP8": to_fp8, "INT8": to_int8}
    if to_type not in types:
        raise NotImplementedError(f"quantize to {to_type}")
    return types[to_type]


def _dequantize(layer: Any) -> Operation:
    broadcast, dtype = _scale_broadcaster(layer), _torch_dtype(layer.get_output(0))
    return lambda x, scale: (x.float() * broadcast(scale, x)).to(dtype)


# --- the network -----------------------------------------------------------------------------------------------------

# By the name of trt.LayerType: the class of such a layer, and what reads it back.
_LAYERS: dict[str, tuple[str, Callable[[Any], Operation]]] = {
    "ACTIVATION": ("IActivationLayer", _activation),
    "ATTENTION_INPUT": ("IAttentionInputLayer", _attention_input),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _identity),
    "CAST": ("ICastLayer", _cast),
    "CONCATENATION": ("IConcatenationLayer", _concatenation),
    "CONSTANT": ("IConstantLayer", _constant),
    "CUMULATIVE": ("ICumulativeLayer", _cumulative),
    "DEQUANTIZE": ("IDequantizeLayer", _dequantize),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "FILL": ("IFillLayer", _fill),
    "GATHER": ("IGatherLayer", _gather),
    "IDENTITY": ("IIdentityLayer", _identity),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", _kv_cache_update),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matrix_multiply),
    "QUANTIZE": ("IQuantizeLayer", _quantize),
    "REDUCE": ("IReduceLayer", _reduce),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", _rotary_embedding),
    "SCATTER": ("IScatterLayer", _scatter),
    "SELECT": ("ISelectLayer", _select),
    "SHAPE": ("IShapeLayer", _shape),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "SOFTMAX": ("ISoftMaxLayer", _softmax),
    "SQUEEZE": ("ISqueezeLayer", _squeeze),
    "TOPK": ("ITopKLayer", _topk),
    "UNARY": ("IUnaryLayer", _unary),
    "UNSQUEEZE": ("IUnsqueezeLayer", _unsqueeze),
}


@dataclass(frozen=True, slots=True)
class _Declared:
    """What the network says of a tensor; -1 is any size."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def check(self, value: Tensor) -> Tensor:
        shape = tuple(value.shape)
        if value.dtype != self.dtype:
            raise ValueError(f"{self.name} is {value.dtype}, declared {self.dtype}")
        if shape != self.shape and (
            len(shape) != len(self.shape) or any(d not in (-1, s) for d, s in zip(self.shape, shape, strict=True))
        ):
            raise ValueError(f"{self.name} is {shape}, declared {self.shape}")
        return value


@dataclass(frozen=True, slots=True)
class _Step:
    """A layer, its tensors given by their number."""

    kind: str
    name: str
    operation: Operation
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]


class NetworkInterpreter:
    """A network, read back from `network` and ready to run; `trt` is the module it was built with."""

    def __init__(self, trt: Any, network: Any) -> None:
        self._tensors: list[Any] = []  # kept alive: the bindings give one object per tensor for as long as it lives
        self._number_of: dict[int, int] = {}
        self._inputs = [self._number(network.get_input(i)) for i in range(network.num_inputs)]
        self._outputs = [self._number(network.get_output(i)) for i in range(network.num_outputs)]
        steps = [self._read(trt, network.get_layer(i)) for i in range(network.num_layers)]
        self._declared = [self._declare(tensor) for tensor in self._tensors]
        self._check_caches(steps)
        self._constants: dict[int, Tensor] = {}
        self._steps = self._fold(self._sorted(steps))
        if any(step.kind == "CUMULATIVE" and step.inputs[1] not in self._constants for step in self._steps):
            raise NotImplementedError("cumulative along an axis that is no constant")
        self._widen_constant_factors()
        needed = {i for step in self._steps for i in step.inputs} | {*self._outputs}
        self._constants = {number: value for number, value in self._constants.items() if number in needed}

    @torch.no_grad()
    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The network's outputs by name. KV caches among `inputs` are updated in place."""
        expected = {self._declared[number].name for number in self._inputs}
        if inputs.keys() != expected:
            raise ValueError(
                f"missing inputs {sorted(expected - inputs.keys())}, unknown {sorted(inputs.keys() - expected)}"
            )
        values = dict(self._constants)
        for number in self._inputs:
            declared = self._declared[number]
            values[number] = declared.check(inputs[declared.name])
        for step in self._steps:
            self._evaluate(step, values)
        return {self._declared[number].name: values[number] for number in self._outputs}

    def _number(self, tensor: Any) -> int:
        # Not by name: TensorRT does not ask that names of inner tensors be unique.
        if id(tensor) not in self._number_of:
            self._number_of[id(tensor)] = len(self._tensors)
            self._tensors.append(tensor)
        return self._number_of[id(tensor)]

    def _read(self, trt: Any, layer: Any) -> _Step:
        kind = trt.ILayer.type.fget(layer).name  # some subclasses have a `type` of their own
        if kind not in _LAYERS:
            raise NotImplementedError(f"layer type {kind} ({layer.name})")
        class_name, read = _LAYERS[kind]
        layer.__class__ = getattr(trt, class_name)
        tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
        inputs = tuple(None if tensor is None else self._number(tensor) for tensor in tensors)
        outputs = tuple(self._number(layer.get_output(i)) for i in range(layer.num_outputs))
        try:
            return _Step(kind, layer.name, read(layer), inputs, outputs)
        except Exception as error:
            error.add_note(f"in {kind} {layer.name}")
            raise

    @staticmethod
    def _declare(tensor: Any) -> _Declared:
        try:
            return _Declared(tensor.name, _torch_dtype(tensor), tuple(tensor.shape))
        except RuntimeError as error:  # asked for a shape, TensorRT checks dtypes and ranks of the layers before it
            raise ValueError(f"TensorRT refuses the layer of {tensor.name}: see its log") from error

    def _check_caches(self, steps: list[_Step]) -> None:
        """TensorRT's own rules for caches, and that no layer reads one that may be written already."""
        for step in steps:
            if step.kind != "KV_CACHE_UPDATE":
                continue
            cache, result = step.inputs[0], step.outputs[0]
            if cache not in self._inputs or result not in self._outputs:
                raise ValueError(f"{step.name}: the cache must be a network input, the updated one a network output")
            if any(cache in other.inputs for other in steps if other is not step and other.kind != "SHAPE"):
                raise ValueError(f"{step.name}: another layer reads the cache that this one updates in place")

    def _sorted(self, steps: list[_Step]) -> list[_Step]:
        """Producers first: layers are in the order of their creation, but an input can be set later."""
        producer = {number: index for index, step in enumerate(steps) for number in step.outputs}
        before = {i: [producer[number] for number in s.inputs if number in producer] for i, s in enumerate(steps)}
        return [steps[index] for index in graphlib.TopologicalSorter(before).static_order()]

    @torch.no_grad()
    def _fold(self, steps: list[_Step]) -> list[_Step]:
        """Evaluates once what depends on constants alone (dequantized weights above all); the other steps remain."""
        remaining = []
        for step in steps:
            if all(number is None or number in self._constants for number in step.inputs):
                self._evaluate(step, self._constants)
            else:
                remaining.append(step)
        return remaining

    def _widen_constant_factors(self) -> None:
        """Gives matrix products their constants in fp64, in which they compute: else each run would convert them."""
        wide: dict[int, int] = {}

        def widened(number: int | None) -> int | None:
            if number is None or number not in self._constants:
                return number
            if number not in wide:
                wide[number] = len(self._tensors) + len(wide)
                self._constants[wide[number]] = self._constants[number].double()
            return wide[number]

        self._steps = [
            _Step(s.kind, s.name, s.operation, tuple(map(widened, s.inputs)), s.outputs)
            if s.kind == "MATRIX_MULTIPLY"
            else s
            for s in self._steps
        ]

    def _evaluate(self, step: _Step, values: dict[int, Tensor]) -> None:
        """Adds the step's outputs to `values`."""
        try:
            result = step.operation(*(None if number is None else values[number] for number in step.inputs))
            results = result if isinstance(result, tuple) else (result,)
            for number, value in zip(step.outputs, results, strict=True):
                values[number] = self._declared[number].check(value)
        except Exception as error:
            error.add_note(f"in {step.kind} {step.name}")
            raise
