"""Each layer of the interpreter against plain torch, on networks of a few layers built with TensorRT's own API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch
from network_interpreter import NetworkInterpreter
from torch import Tensor

_LOGGER = trt.Logger(trt.Logger.INTERNAL_ERROR)  # refused networks are the subject of some tests
_TRT_DTYPE = {
    torch.float32: trt.float32,
    torch.float16: trt.float16,
    torch.bfloat16: trt.bfloat16,
    torch.float8_e4m3fn: trt.fp8,
    torch.int8: trt.int8,
    torch.int32: trt.int32,
    torch.int64: trt.int64,
    torch.bool: trt.bool,
}
_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, *_HALVES)


class _Network:
    """A network under construction; inputs are x0, x1, ..., outputs y0, y1, ..."""

    def __init__(self) -> None:
        self.builder = trt.Builder(_LOGGER)
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._kept: list[Tensor] = []  # TensorRT holds weights by reference

    def input(self, dtype: torch.dtype, *shape: int) -> Any:
        return self.network.add_input(f"x{self.network.num_inputs}", _TRT_DTYPE[dtype], shape)

    def constant(self, value: Tensor, dtype: Any = None, shape: Sequence[int] | None = None) -> Any:
        self._kept.append(value)
        shape = tuple(value.shape if shape is None else shape)
        weights = trt.Weights(dtype or _TRT_DTYPE[value.dtype], value.data_ptr(), int(np.prod(shape)))
        return self.network.add_constant(shape, weights).get_output(0)

    def interpreter(self, *outputs: Any) -> NetworkInterpreter:
        for i, output in enumerate(outputs):
            output.name = f"y{i}"
            self.network.mark_output(output)
        return NetworkInterpreter(trt, self.network)

    def run(self, outputs: Any, *inputs: Tensor) -> list[Tensor]:
        outputs = outputs if isinstance(outputs, list) else [outputs]
        result = self.interpreter(*outputs).run({f"x{i}": value for i, value in enumerate(inputs)})
        return [result[f"y{i}"] for i in range(len(outputs))]


@pytest.fixture
def net() -> _Network:
    return _Network()


def _rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _same(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, dtype and shape included."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# --- constants -------------------------------------------------------------------------------------------------------


def by_name(value: Any) -> str:
    """Functions are shown by their address otherwise."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(
    "value",
    [
        *(_rand(2, 3, dtype=dtype) for dtype in _FLOATS),
        *(torch.tensor([[1, -2], [3, 4]], dtype=dtype) for dtype in (torch.int8, torch.int32, torch.int64)),
        torch.tensor([True, False]),
        torch.tensor(7, dtype=torch.int32),
    ],
    ids=lambda value: str(value.dtype),
)
def test_constants_are_read_back(net: _Network, value: Tensor) -> None:
    (result,) = net.run(net.network.add_identity(net.constant(value)).get_output(0))
    _same(result, value)


def test_constants_are_copied(net: _Network) -> None:
    values = [_rand(4), _rand(4, dtype=torch.bfloat16)]
    kept = [value.clone() for value in values]
    interpreter = net.interpreter(*(net.network.add_identity(net.constant(value)).get_output(0) for value in values))
    for value in values:
        value.zero_()
    result = interpreter.run({})
    _same(result["y0"], kept[0])
    _same(result["y1"], kept[1])


# --- pointwise -------------------------------------------------------------------------------------------------------

_OP = trt.ElementWiseOperation


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize(
    ("operation", "function"),
    [
        (_OP.SUM, torch.add),
        (_OP.PROD, torch.mul),
        (_OP.MAX, torch.maximum),
        (_OP.MIN, torch.minimum),
        (_OP.SUB, torch.sub),
        (_OP.DIV, torch.div),
        (_OP.POW, torch.pow),
        (_OP.FLOOR_DIV, torch.floor_divide),
        (_OP.EQUAL, torch.eq),
        (_OP.GREATER, torch.gt),
        (_OP.LESS, torch.lt),
    ],
)
def test_elementwise_of_floats_broadcasts(net: _Network, operation: Any, function: Any, dtype: torch.dtype) -> None:
    a, b = _rand(3, 1, 4, dtype=dtype).abs() + 1, _rand(1, 5, 4, dtype=dtype, seed=1)
    x0, x1 = net.input(dtype, -1, 1, 4), net.input(dtype, 1, 5, 4)
    (result,) = net.run(net.network.add_elementwise(x0, x1, operation).get_output(0), a, b)
    expected = function(a.float(), b.float())
    _same(result, expected if expected.dtype == torch.bool else expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (_OP.SUM, [9, -4, 7]),
        (_OP.PROD, [14, -21, 0]),
        (_OP.MAX, [7, 3, 7]),
        (_OP.MIN, [2, -7, 0]),
        (_OP.GREATER, [True, False, False]),
        (_OP.SUB, [5, -10, -7]),
        (_OP.FLOOR_DIV, [3, -3, 0]),
        (_OP.EQUAL, [False, False, False]),
        (_OP.LESS, [False, True, True]),
    ],
)
def test_elementwise_of_integers(net: _Network, operation: Any, expected: list[Any], dtype: torch.dtype) -> None:
    a, b = torch.tensor([7, -7, 0], dtype=dtype), torch.tensor([2, 3, 7], dtype=dtype)
    layer = net.network.add_elementwise(net.input(dtype, 3), net.input(dtype, 3), operation)
    (result,) = net.run(layer.get_output(0), a, b)
    _same(result, torch.tensor(expected, dtype=torch.bool if isinstance(expected[0], bool) else dtype))


def test_elementwise_of_int64_is_exact(net: _Network) -> None:
    a, b = torch.tensor([2**62 - 1, -(2**62) + 1]), torch.tensor([1 << 24, 1 << 24])
    x = net.input(torch.int64, 2), net.input(torch.int64, 2)
    outputs = [net.network.add_elementwise(*x, op).get_output(0) for op in (_OP.FLOOR_DIV, _OP.SUB, _OP.GREATER)]
    quotient, difference, greater = net.run(outputs, a, b)
    _same(quotient, torch.tensor([2**38 - 1, -(2**38)]))  # a double would make 2^38 of the first
    _same(difference, torch.tensor([2**62 - 1 - 2**24, -(2**62) + 1 - 2**24]))
    _same(greater, torch.tensor([True, False]))


@pytest.mark.parametrize("operation", [_OP.MAX, _OP.MIN], ids=str)
def test_the_larger_or_smaller_of_nan_and_a_number_raises(net: _Network, operation: Any) -> None:
    layer = net.network.add_elementwise(net.input(torch.float32, 2), net.input(torch.float32, 2), operation)
    interpreter = net.interpreter(layer.get_output(0))
    numbers, one_nan = torch.tensor([torch.inf, 1.0]), torch.tensor([1.0, torch.nan])
    assert interpreter.run({"x0": numbers, "x1": numbers})["y0"].tolist() == [torch.inf, 1.0]
    for x0, x1 in ((numbers, one_nan), (one_nan, numbers)):
        with pytest.raises(NotImplementedError, match="of NaN"):
            interpreter.run({"x0": x0, "x1": x1})


def test_integer_division_of_negatives_raises(net: _Network) -> None:
    layer = net.network.add_elementwise(net.input(torch.int32, 2), net.input(torch.int32, 2), _OP.DIV)
    interpreter = net.interpreter(layer.get_output(0))
    two = torch.tensor([2, 2], dtype=torch.int32)
    result = interpreter.run({"x0": torch.tensor([7, 4], dtype=torch.int32), "x1": two})["y0"]
    _same(result, torch.tensor([3, 2], dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="DIV"):
        interpreter.run({"x0": torch.tensor([-7, 4], dtype=torch.int32), "x1": two})


@pytest.mark.parametrize(("operation", "function"), [(_OP.AND, "__and__"), (_OP.OR, "__or__"), (_OP.XOR, "__xor__")])
def test_logical(net: _Network, operation: Any, function: str) -> None:
    a, b = torch.tensor([[True], [False]]), torch.tensor([[True, False]])
    layer = net.network.add_elementwise(net.input(torch.bool, 2, 1), net.input(torch.bool, 1, 2), operation)
    (result,) = net.run(layer.get_output(0), a, b)
    _same(result, getattr(a, function)(b))


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize(
    "name", ["EXP", "LOG", "SQRT", "RECIP", "ABS", "NEG", "SIN", "COS", "FLOOR", "CEIL", "ROUND", "ERF", "SIGN"]
)
def test_unary(net: _Network, name: str, dtype: torch.dtype) -> None:
    x = _rand(5, 7, dtype=dtype).abs() + 0.5
    layer = net.network.add_unary(net.input(dtype, -1, 7), getattr(trt.UnaryOperation, name))
    (result,) = net.run(layer.get_output(0), x)
    _same(result, getattr(torch, {"RECIP": "reciprocal"}.get(name, name.lower()))(x.double()).to(dtype))


def test_unary_not_and_negation_of_integers(net: _Network) -> None:
    flags, numbers = torch.tensor([True, False]), torch.tensor([3, -4], dtype=torch.int32)
    negated = net.network.add_unary(net.input(torch.bool, 2), trt.UnaryOperation.NOT).get_output(0)
    negative = net.network.add_unary(net.input(torch.int32, 2), trt.UnaryOperation.NEG).get_output(0)
    first, second = net.run([negated, negative], flags, numbers)
    _same(first, ~flags)
    _same(second, -numbers)


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (trt.ActivationType.SIGMOID, torch.sigmoid),
        (trt.ActivationType.RELU, torch.relu),
        (trt.ActivationType.TANH, torch.tanh),
        (trt.ActivationType.CLIP, lambda x: x.clamp(-0.5, 0.25)),
        (trt.ActivationType.LEAKY_RELU, lambda x: torch.nn.functional.leaky_relu(x, -0.5)),
        (trt.ActivationType.ELU, lambda x: torch.nn.functional.elu(x, -0.5)),
        (trt.ActivationType.SOFTSIGN, torch.nn.functional.softsign),
        (trt.ActivationType.HARD_SIGMOID, lambda x: (-0.5 * x + 0.25).clamp(0, 1)),
        (trt.ActivationType.SCALED_TANH, lambda x: -0.5 * torch.tanh(0.25 * x)),
        (trt.ActivationType.THRESHOLDED_RELU, lambda x: torch.nn.functional.threshold(x, -0.5, 0)),
        (trt.ActivationType.GELU_ERF, torch.nn.functional.gelu),
        (trt.ActivationType.GELU_TANH, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
    ids=by_name,
)
def test_activation(net: _Network, activation: Any, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = _rand(6, 8, dtype=dtype)
    layer = net.network.add_activation(net.input(dtype, -1, 8), activation)
    layer.alpha, layer.beta = -0.5, 0.25
    (result,) = net.run(layer.get_output(0), x)
    _same(result, function(x.double()).to(dtype))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool])
def test_cast(net: _Network, source: torch.dtype, target: torch.dtype) -> None:
    x = (_rand(3, 4) * 3).to(source)
    (result,) = net.run(net.network.add_cast(net.input(source, 3, -1), _TRT_DTYPE[target]).get_output(0), x)
    _same(result, x.to(target))


@pytest.mark.parametrize("source", _FLOATS)
@pytest.mark.parametrize("target", [torch.int32, torch.int64])
def test_cast_to_integers_truncates(net: _Network, target: torch.dtype, source: torch.dtype) -> None:
    x = torch.tensor([2.75, -2.75, 0.5, -0.5, 2.0**15, -0.0], dtype=source)
    (result,) = net.run(net.network.add_cast(net.input(source, -1), _TRT_DTYPE[target]).get_output(0), x)
    _same(result, torch.tensor([2, -2, 0, 0, 2**15, 0], dtype=target))


def test_cast_to_int64_holds_what_int32_does_not(net: _Network) -> None:
    x = torch.tensor([2.0**38, -(2.0**62)])
    wide = net.network.add_cast(net.input(torch.float32, 2), trt.int64).get_output(0)
    interpreter = net.interpreter(wide, net.network.add_cast(wide, trt.float32).get_output(0))
    result = interpreter.run({"x0": x})
    _same(result["y0"], torch.tensor([2**38, -(2**62)]))
    _same(result["y1"], x)


@pytest.mark.parametrize(
    ("target", "number"),
    [
        (torch.int32, 2.0**31),
        (torch.int32, -(2.0**31) - 2**8),
        (torch.int64, 2.0**63),
        (torch.int64, torch.inf),
        (torch.int32, torch.nan),
    ],
)
def test_cast_to_integers_of_what_they_do_not_hold_raises(net: _Network, target: torch.dtype, number: float) -> None:
    interpreter = net.interpreter(net.network.add_cast(net.input(torch.float32, 1), _TRT_DTYPE[target]).get_output(0))
    with pytest.raises(NotImplementedError, match="does not hold"):
        interpreter.run({"x0": torch.tensor([number])})


def test_select_broadcasts(net: _Network) -> None:
    condition, a, b = (
        torch.tensor([[True], [False]]),
        _rand(2, 3, dtype=torch.float16),
        _rand(1, 1, dtype=torch.float16),
    )
    x = net.input(torch.bool, 2, 1), net.input(torch.float16, 2, 3), net.input(torch.float16, 1, 1)
    (result,) = net.run(net.network.add_select(*x).get_output(0), condition, a, b)
    _same(result, torch.where(condition, a, b))


# --- along axes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_softmax(net: _Network, dtype: torch.dtype, axis: int) -> None:
    x = _rand(2, 5, 7, dtype=dtype)
    layer = net.network.add_softmax(net.input(dtype, -1, 5, 7))
    layer.axes = 1 << axis
    (result,) = net.run(layer.get_output(0), x)
    _same(result, x.double().softmax(axis).to(dtype))


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("operation", "function"),
    [
        (trt.ReduceOperation.SUM, Tensor.sum),
        (trt.ReduceOperation.MAX, Tensor.amax),
        (trt.ReduceOperation.MIN, Tensor.amin),
        (trt.ReduceOperation.AVG, Tensor.mean),
        (trt.ReduceOperation.PROD, lambda x, axes, keepdim: x.prod(2, keepdim).prod(0, keepdim)),
    ],
    ids=by_name,
)
def test_reduce(net: _Network, operation: Any, function: Any, keep: bool, dtype: torch.dtype) -> None:
    x = _rand(2, 5, 7, dtype=dtype)
    layer = net.network.add_reduce(net.input(dtype, -1, 5, 7), operation, 0b101, keep)
    (result,) = net.run(layer.get_output(0), x)
    _same(result, function(x.double(), (0, 2), keepdim=keep).to(dtype))


def test_reduce_of_half_accumulates_in_fp32_and_of_int32_stays_int32(net: _Network) -> None:
    halves, ints = torch.full((4096,), 1.0, dtype=torch.float16), torch.tensor([1, 2, 3], dtype=torch.int32)
    halves[0] = 2048  # 2048 + 1 is 2048 in fp16
    a = net.network.add_reduce(net.input(torch.float16, 4096), trt.ReduceOperation.SUM, 1, True).get_output(0)
    b = net.network.add_reduce(net.input(torch.int32, 3), trt.ReduceOperation.SUM, 1, True).get_output(0)
    first, second = net.run([a, b], halves, ints)
    _same(first, torch.tensor([6144.0], dtype=torch.float16))
    _same(second, torch.tensor([6], dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (trt.ReduceOperation.SUM, [[2**30 + 1], [-7]]),
        (trt.ReduceOperation.MAX, [[2**30], [-3]]),
        (trt.ReduceOperation.MIN, [[1], [-4]]),
        (trt.ReduceOperation.PROD, [[2**30], [12]]),
    ],
    ids=str,
)
def test_reduce_of_integers(net: _Network, operation: Any, expected: list[Any], dtype: torch.dtype) -> None:
    x = torch.tensor([[2**30, 1], [-3, -4]], dtype=dtype)
    (result,) = net.run(net.network.add_reduce(net.input(dtype, -1, 2), operation, 0b10, True).get_output(0), x)
    _same(result, torch.tensor(expected, dtype=dtype))


def _cumulative(net: _Network, x: Any, axis: Any, exclusive: bool = False, reverse: bool = False) -> Any:
    return net.network.add_cumulative(x, axis, trt.CumulativeOperation.SUM, exclusive, reverse).get_output(0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, *_FLOATS])
@pytest.mark.parametrize(
    ("exclusive", "reverse", "expected"),
    [  # https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/Cumulative.html has a table of them
        (False, False, [[1, 3, 7], [-1, 4, 4]]),
        (False, True, [[7, 6, 4], [4, 5, 0]]),
        (True, False, [[0, 1, 3], [0, -1, 4]]),
        (True, True, [[6, 4, 0], [5, 0, 0]]),
    ],
)
def test_cumulative(
    net: _Network, exclusive: bool, reverse: bool, expected: list[list[int]], dtype: torch.dtype
) -> None:
    x = torch.tensor([[1, 2, 4], [-1, 5, 0]], dtype=dtype)
    data = net.input(dtype, -1, 3)
    along_rows = _cumulative(net, data, net.constant(torch.tensor(1)), exclusive, reverse)
    last_axis = _cumulative(net, data, net.constant(torch.tensor(-1, dtype=torch.int32)), exclusive, reverse)
    for result in net.run([along_rows, last_axis], x):
        _same(result, torch.tensor(expected, dtype=dtype))


def test_cumulative_along_the_first_axis_and_of_int64_is_exact(net: _Network) -> None:
    x = torch.tensor([[2**61, 1], [2**61 - 1, -1], [1, 2**40]])
    data = net.input(torch.int64, -1, 2)
    down = _cumulative(net, data, net.constant(torch.tensor(0)))
    up = _cumulative(net, data, net.constant(torch.tensor(0)), reverse=True)
    first, second = net.run([down, up], x)
    _same(first, torch.tensor([[2**61, 1], [2**62 - 1, 0], [2**62, 2**40]]))
    _same(second, torch.tensor([[2**62, 2**40], [2**61, 2**40 - 1], [1, 2**40]]))


def test_cumulative_of_half_accumulates_in_fp32(net: _Network) -> None:
    x = torch.tensor([2048.0, 1.0, 1.0], dtype=torch.float16)  # 2048 + 1 is 2048 in fp16
    (result,) = net.run(_cumulative(net, net.input(torch.float16, 3), net.constant(torch.tensor(0))), x)
    _same(result, torch.tensor([2048.0, 2048.0, 2050.0], dtype=torch.float16))


def test_cumulative_along_an_axis_that_is_no_constant_raises(net: _Network) -> None:
    # "axis must be a build-time constant 0D tensor", says NVIDIA's page.
    with pytest.raises(NotImplementedError, match="no constant"):
        net.interpreter(_cumulative(net, net.input(torch.int32, 3), net.input(torch.int32)))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_topk_takes_the_first_of_equals(net: _Network, k: int, largest: bool) -> None:
    # Ties as ONNX has them: "the element with the lower index will appear first" (https://onnx.ai/onnx/operators/
    # onnx__TopK.html). NVIDIA's page of the operator does not say.
    x = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 0.0, 0.0]], dtype=torch.float16)
    operation = trt.TopKOperation.MAX if largest else trt.TopKOperation.MIN
    layer = net.network.add_topk(net.input(torch.float16, -1, 7), operation, k, 0b10, trt.int32)
    value, index = net.run([layer.get_output(0), layer.get_output(1)], x)
    _same(value, torch.full((1, k), 3.0 if largest else 0.0, dtype=torch.float16))
    _same(index, torch.tensor([[1, 2, 4] if largest else [3, 5, 6]], dtype=torch.int32)[:, :k])


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("k", [1, 4, 30])
def test_topk_is_a_stable_sort(net: _Network, k: int, dtype: torch.dtype) -> None:
    x = (_rand(20, 30) * 2).round().to(dtype)  # many equals, as many as differ from row to row
    layer = net.network.add_topk(net.input(dtype, -1, 30), trt.TopKOperation.MAX, k, 0b10, trt.int64)
    value, index = net.run([layer.get_output(0), layer.get_output(1)], x)
    expected = x.float().sort(dim=1, descending=True, stable=True)
    _same(value, expected.values[:, :k].to(dtype))
    _same(index, expected.indices[:, :k])


def test_topk_with_k_as_an_input_along_another_axis(net: _Network) -> None:
    x = _rand(6, 3)
    layer = net.network.add_topk(net.input(torch.float32, 6, -1), trt.TopKOperation.MAX, 1, 0b01, trt.int64)
    layer.set_input(1, net.constant(torch.tensor(2, dtype=torch.int32)))
    value, index = net.run([layer.get_output(0), layer.get_output(1)], x)
    expected = x.topk(2, dim=0)
    _same(value, expected.values)
    _same(index, expected.indices)


def test_gather_default(net: _Network) -> None:
    table, index = _rand(3, 9, 4, dtype=torch.float16), torch.tensor([[8, 0, 0], [1, 7, 2]], dtype=torch.int32)
    interpreter = net.interpreter(
        net.network.add_gather(net.constant(table), net.input(torch.int32, -1, 3), 1).get_output(0)
    )
    _same(interpreter.run({"x0": index})["y0"], table[:, index.long()])
    for outside in (-1, 9):
        with pytest.raises((IndexError, RuntimeError)):  # which one is up to torch
            interpreter.run({"x0": torch.full((1, 3), outside, dtype=torch.int32)})


def _gather_element(net: _Network, axis: int, *index_shape: int) -> NetworkInterpreter:
    data, index = net.input(torch.float32, -1, 3, 4), net.input(torch.int32, *index_shape)
    layer = net.network.add_gather_v2(data, index, trt.GatherMode.ELEMENT)
    layer.axis = axis
    return net.interpreter(layer.get_output(0))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather_element_takes_one_element_for_each_of_the_index(net: _Network, axis: int) -> None:
    x = _rand(2, 3, 4)
    index = torch.randint(0, x.shape[axis], (2, 3, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    result = _gather_element(net, axis, -1, 3, 2).run({"x0": x, "x1": index})["y0"]
    expected = torch.empty(2, 3, 2)
    for i, j, k in np.ndindex(2, 3, 2):
        at = [i, j, k]
        at[axis] = int(index[i, j, k])
        expected[i, j, k] = x[tuple(at)]
    _same(result, expected)


def test_gather_element_out_of_bounds_raises(net: _Network) -> None:
    interpreter = _gather_element(net, 2, -1, 3, 1)
    for outside in (-1, 4):
        with pytest.raises((IndexError, RuntimeError)):  # which one is up to torch
            interpreter.run({"x0": _rand(2, 3, 4), "x1": torch.full((2, 3, 1), outside, dtype=torch.int32)})


def _scatter(net: _Network, dtype: torch.dtype, index_dtype: torch.dtype = torch.int32) -> NetworkInterpreter:
    tensors = net.input(dtype, -1), net.input(index_dtype, -1), net.input(dtype, -1)
    return net.interpreter(net.network.add_scatter(*tensors, trt.ScatterMode.ELEMENT).get_output(0))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, *_FLOATS])
def test_scatter_replaces_elements(net: _Network, dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    data, index = torch.tensor([1, 2, 3, 4], dtype=dtype), torch.tensor([3, 0], dtype=index_dtype)
    kept = data.clone()
    result = _scatter(net, dtype, index_dtype).run({"x0": data, "x1": index, "x2": torch.tensor([8, 9], dtype=dtype)})
    _same(result["y0"], torch.tensor([9, 2, 3, 8], dtype=dtype))
    _same(data, kept)


def test_scatter_along_another_axis(net: _Network) -> None:
    data, index = torch.zeros(2, 4), torch.tensor([[1, 3], [0, 2]], dtype=torch.int32)
    update = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    tensors = net.input(torch.float32, 2, 4), net.input(torch.int32, 2, 2), net.input(torch.float32, 2, 2)
    layer = net.network.add_scatter(*tensors, trt.ScatterMode.ELEMENT)
    layer.axis = 1
    (result,) = net.run(layer.get_output(0), data, index, update)
    _same(result, torch.tensor([[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 4.0, 0.0]]))


@pytest.mark.parametrize(
    ("dtype", "undefined"), [(torch.int32, -(2**31)), (torch.int64, -(2**63)), (torch.float32, torch.nan)]
)
def test_what_different_updates_contend_for_is_undefined(net: _Network, dtype: torch.dtype, undefined: float) -> None:
    interpreter = _scatter(net, dtype)
    data, index = torch.zeros(4, dtype=dtype), torch.tensor([1, 2, 1, 2, 3], dtype=torch.int32)
    update = torch.tensor([5, 6, 5, 7, 8], dtype=dtype)  # the same twice at 1, not so at 2
    result = interpreter.run({"x0": data, "x1": index, "x2": update})["y0"]
    _same(result, torch.tensor([0, 5, undefined, 8], dtype=dtype))


def test_scatter_out_of_bounds_raises(net: _Network) -> None:
    interpreter = _scatter(net, torch.int32)
    data, update = torch.zeros(4, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    for outside in (-1, 4):
        with pytest.raises((IndexError, RuntimeError)):  # which one is up to torch
            interpreter.run({"x0": data, "x1": torch.tensor([outside], dtype=torch.int32), "x2": update})
    with pytest.raises(ValueError, match=r"scatter of \(1,\) to \(2,\)"):
        interpreter.run({"x0": data, "x1": torch.tensor([0, 1], dtype=torch.int32), "x2": update})


def test_scatter_of_other_kinds_raises(net: _Network) -> None:
    with pytest.raises(NotImplementedError, match=r"scatter of torch\.bool"):
        _scatter(net, torch.bool)
    other = _Network()
    tensors = other.input(torch.int32, 4), other.input(torch.int32, 1, 1), other.input(torch.int32, 1)
    other.network.add_scatter(*tensors, trt.ScatterMode.ND)
    with pytest.raises(NotImplementedError, match="scatter mode ND"):
        NetworkInterpreter(trt, other.network)


def test_gather_element_and_nd(net: _Network) -> None:
    x, element = _rand(2, 5), torch.tensor([[4, 0], [1, 1]], dtype=torch.int32)
    nd = torch.tensor([[1, 4], [0, 2], [1, 1]], dtype=torch.int32)
    data = net.input(torch.float32, 2, 5)
    by_element = net.network.add_gather_v2(data, net.input(torch.int32, 2, 2), trt.GatherMode.ELEMENT)
    by_element.axis = 1
    by_nd = net.network.add_gather_v2(data, net.input(torch.int32, 3, 2), trt.GatherMode.ND)
    first, second = net.run([by_element.get_output(0), by_nd.get_output(0)], x, element, nd)
    _same(first, x.gather(1, element.long()))
    _same(second, x[nd[:, 0].long(), nd[:, 1].long()])


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_shuffle_transposes_reshapes_and_transposes(net: _Network) -> None:
    x = _rand(3, 4, 10, dtype=torch.bfloat16)
    layer = net.network.add_shuffle(net.input(torch.bfloat16, -1, 4, 10))
    layer.first_transpose = (0, 2, 1)
    layer.reshape_dims = (0, 2, -1, 4)
    layer.second_transpose = (2, 0, 1, 3)
    (result,) = net.run(layer.get_output(0), x)
    _same(result, x.permute(0, 2, 1).reshape(3, 2, 5, 4).permute(2, 0, 1, 3))


def test_shuffle_without_reshape_only_transposes(net: _Network) -> None:
    x = _rand(3, 4, 5)
    layer = net.network.add_shuffle(net.input(torch.float32, -1, 4, 5))
    layer.second_transpose = (2, 0, 1)
    (result,) = net.run(layer.get_output(0), x)
    _same(result, x.permute(2, 0, 1))


def test_shuffle_to_a_scalar_and_with_a_dimension_of_zero(net: _Network) -> None:
    scalar = net.network.add_shuffle(net.input(torch.float32, 1))
    scalar.reshape_dims = ()
    empty = net.network.add_shuffle(net.input(torch.float32, 3, -1))
    empty.zero_is_placeholder = False
    empty.reshape_dims = (0, 5)
    first, second = net.run([scalar.get_output(0), empty.get_output(0)], torch.ones(1), torch.ones(3, 0))
    _same(first, torch.tensor(1.0))
    _same(second, torch.ones(0, 5))


def test_shuffle_to_a_shape_computed_by_the_network(net: _Network) -> None:
    x = _rand(2, 3, 8)
    data = net.input(torch.float32, -1, -1, 8)
    layer = net.network.add_shuffle(data)
    # [x.shape[0], x.shape[1], 2, 4]: layers created after the one that reads them, as `set_input` allows.
    head = net.network.add_slice(net.network.add_shape(data).get_output(0), (0,), (2,), (1,)).get_output(0)
    layer.set_input(1, net.network.add_concatenation([head, net.constant(torch.tensor([2, 4]))]).get_output(0))
    (result,) = net.run(layer.get_output(0), x)
    _same(result, x.reshape(2, 3, 2, 4))


def test_slice_static(net: _Network) -> None:
    x = _rand(4, 6, 8, dtype=torch.float16)
    data = net.input(torch.float16, 4, -1, 8)
    steps = net.network.add_slice(data, (1, 0, 7), (2, 3, 4), (1, 2, -2)).get_output(0)
    one_axis = net.network.add_slice(data, (2,), (3,), (1,))
    one_axis.axes = (2,)
    repeat = net.network.add_slice(data, (3, 0, 0), (5, 1, 8), (0, 1, 1)).get_output(0)
    first, second, third = net.run([steps, one_axis.get_output(0), repeat], x)
    _same(first, x[1:3, 0:6:2].flip(-1)[..., 0:8:2])
    _same(second, x[:, :, 2:5])
    _same(third, x[3:4, 0:1].expand(5, 1, 8))


def test_slice_by_inputs(net: _Network) -> None:
    x = _rand(4, 6)
    layer = net.network.add_slice(net.input(torch.float32, 4, -1), (0, 0), (0, 0), (1, 1))
    layer.set_input(1, net.input(torch.int64, 2))
    layer.set_input(2, net.input(torch.int64, 2))
    (result,) = net.run(layer.get_output(0), x, torch.tensor([1, 2]), torch.tensor([2, 4]))
    _same(result, x[1:3, 2:6])


def test_slice_of_a_size_computed_by_the_network(net: _Network) -> None:
    data = net.input(torch.int32, -1)
    layer = net.network.add_slice(data, (0,), (0,), (1,))
    size = net.network.add_shape(data).get_output(0)
    layer.set_input(2, net.network.add_elementwise(size, net.constant(torch.tensor([1])), _OP.SUB).get_output(0))
    interpreter = net.interpreter(layer.get_output(0))
    for length in (1, 2, 5):
        x = torch.arange(length, dtype=torch.int32)
        _same(interpreter.run({"x0": x})["y0"], x[:-1])


def test_slice_by_stride_and_axes_inputs(net: _Network) -> None:
    x = _rand(4, 6)
    layer = net.network.add_slice(net.input(torch.float32, 4, 6), (1,), (2,), (1,))
    layer.set_input(3, net.constant(torch.tensor([3])))
    layer.set_input(5, net.constant(torch.tensor([1])))
    (result,) = net.run(layer.get_output(0), x)
    _same(result, x[:, 1:6:3])


def test_slice_out_of_bounds_raises(net: _Network) -> None:
    layer = net.network.add_slice(net.input(torch.float32, -1), (2,), (3,), (1,))
    interpreter = net.interpreter(layer.get_output(0))
    _same(interpreter.run({"x0": torch.arange(5.0)})["y0"], torch.tensor([2.0, 3.0, 4.0]))
    with pytest.raises(IndexError, match="slice of 3 from 2"):
        interpreter.run({"x0": torch.arange(4.0)})


def test_concatenation(net: _Network) -> None:
    a, b = _rand(2, 3), _rand(2, 5)
    layer = net.network.add_concatenation([net.input(torch.float32, 2, -1), net.input(torch.float32, 2, -1)])
    layer.axis = 1
    (result,) = net.run(layer.get_output(0), a, b)
    _same(result, torch.cat((a, b), 1))


def test_shape(net: _Network) -> None:
    (result,) = net.run(
        net.network.add_shape(net.input(torch.float16, -1, 3)).get_output(0), _rand(5, 3, dtype=torch.float16)
    )
    _same(result, torch.tensor([5, 3]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_fill_linspace_static(net: _Network, dtype: torch.dtype) -> None:
    layer = net.network.add_fill((5,), trt.FillOperation.LINSPACE, _TRT_DTYPE[dtype])
    layer.alpha, layer.beta = 3, 2
    (result,) = net.run(layer.get_output(0))
    _same(result, torch.tensor([3, 5, 7, 9, 11], dtype=dtype))


def test_fill_linspace_by_inputs(net: _Network) -> None:
    layer = net.network.add_fill((0, 0), trt.FillOperation.LINSPACE, trt.int32)
    layer.set_input(0, net.network.add_shape(net.input(torch.float32, -1, -1)).get_output(0))
    layer.set_input(1, net.constant(torch.tensor(1, dtype=torch.int32)))
    layer.set_input(2, net.constant(torch.tensor([10, 2], dtype=torch.int32)))
    (result,) = net.run(layer.get_output(0), torch.zeros(2, 3))
    _same(result, torch.tensor([[1, 3, 5], [11, 13, 15]], dtype=torch.int32))


def test_squeeze_and_unsqueeze(net: _Network) -> None:
    x = _rand(1, 3, 1, 4)
    data = net.input(torch.float32, 1, -1, 1, 4)
    squeezed = net.network.add_squeeze(data, net.constant(torch.tensor([0, 2]))).get_output(0)
    unsqueezed = net.network.add_unsqueeze(squeezed, net.constant(torch.tensor([3, 1]))).get_output(0)
    first, second = net.run([squeezed, unsqueezed], x)
    _same(first, x[0, :, 0])
    _same(second, x[0, :, 0][:, None, :, None])


# --- transformer layers ----------------------------------------------------------------------------------------------

_NONE, _TRANSPOSE, _VECTOR = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE, trt.MatrixOperation.VECTOR


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("op0", [_NONE, _TRANSPOSE])
@pytest.mark.parametrize("op1", [_NONE, _TRANSPOSE])
def test_matrix_multiply_broadcasts(net: _Network, op0: Any, op1: Any, dtype: torch.dtype) -> None:
    a, b = _rand(3, 1, 4, 6, dtype=dtype), _rand(1, 2, 6, 5, dtype=dtype, seed=1)
    x = (a.mT.contiguous() if op0 == _TRANSPOSE else a), (b.mT.contiguous() if op1 == _TRANSPOSE else b)
    tensors = [net.input(dtype, *value.shape) for value in x]
    (result,) = net.run(net.network.add_matrix_multiply(tensors[0], op0, tensors[1], op1).get_output(0), *x)
    _same(result, (x[0].double().mT if op0 == _TRANSPOSE else x[0].double()).matmul(b.double()).to(dtype))


@pytest.mark.parametrize("dtype", _HALVES)
def test_matrix_multiply_by_a_constant_accumulates_in_fp32(net: _Network, dtype: torch.dtype) -> None:
    # 2048 + 1 - 2048 is 0 when partial sums are rounded to fp16 or bf16.
    x, weight = torch.tensor([[2048.0, 1.0, -2048.0]], dtype=dtype), torch.ones(1, 3, dtype=dtype)
    layer = net.network.add_matrix_multiply(net.input(dtype, -1, 3), _NONE, net.constant(weight), _TRANSPOSE)
    (result,) = net.run(layer.get_output(0), x)
    _same(result, torch.ones(1, 1, dtype=dtype))


def test_matrix_multiply_of_vectors(net: _Network) -> None:
    matrix, left, right = _rand(2, 4, 6), _rand(2, 4), _rand(2, 6)
    x, a, b = net.input(torch.float32, 2, 4, 6), net.input(torch.float32, 2, 4), net.input(torch.float32, 2, 6)
    add = net.network.add_matrix_multiply
    results = net.run(
        [
            add(x, _NONE, b, _VECTOR).get_output(0),
            add(a, _VECTOR, x, _NONE).get_output(0),
            add(b, _VECTOR, b, _VECTOR).get_output(0),
        ],
        matrix,
        left,
        right,
    )
    for result, equation in zip(results, ("bij,bj->bi", "bi,bij->bj", "bj,bj->b"), strict=True):
        operands = {"bij,bj->bi": (matrix, right), "bi,bij->bj": (left, matrix), "bj,bj->b": (right, right)}[equation]
        torch.testing.assert_close(result, torch.einsum(equation, *operands))


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [0, 4])
def test_rotary_embedding(net: _Network, interleaved: bool, rotated: int, dtype: torch.dtype) -> None:
    # As complex numbers: pair (a, b) times e^(i angle). NVIDIA says which elements are a pair if interleaved: "adjacent
    # 2 elements" (https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-rope.html); if
    # not, the ONNX operator does: "two halves" (https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html).
    size = rotated or 8
    x, angle = _rand(2, 3, 5, 8, dtype=dtype), _rand(16, size // 2, seed=1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    position = torch.tensor([[0, 1, 2, 3, 4], [15, 7, 7, 8, 9]])
    layer = net.network.add_rotary_embedding(
        net.input(dtype, -1, 3, -1, 8), net.constant(cos), net.constant(sin), interleaved, rotated
    )
    layer.set_input(3, net.input(torch.int64, -1, -1))
    (result,) = net.run(layer.get_output(0), x, position)

    head = x[..., :size].double()
    pair = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).mT
    turn = torch.complex(cos.double(), sin.double())[position].unsqueeze(1)
    turned = torch.view_as_real(torch.view_as_complex(pair.contiguous()) * turn)
    expected = torch.cat(((turned if interleaved else turned.mT).flatten(-2), x[..., size:].double()), -1)
    torch.testing.assert_close(result, expected.to(dtype))


def test_rotary_embedding_without_positions_takes_a_cache_per_token(net: _Network) -> None:
    x, angle = _rand(2, 3, 5, 8), _rand(2, 5, 4, seed=1)
    tensors = net.input(torch.float32, 2, 3, 5, 8), net.input(torch.float32, 2, 5, 4), net.input(torch.float32, 2, 5, 4)
    layer = net.network.add_rotary_embedding(*tensors, False, 0)
    (result,) = net.run(layer.get_output(0), x, angle.cos(), angle.sin())
    (a, b), cos, sin = x.chunk(2, -1), angle.cos()[:, None], angle.sin()[:, None]
    torch.testing.assert_close(result, torch.cat((a * cos - b * sin, b * cos + a * sin), -1))


def _cache_interpreter(net: _Network) -> NetworkInterpreter:
    tensors = net.input(torch.float16, -1, 2, 8, 4), net.input(torch.float16, -1, 2, -1, 4), net.input(torch.int32, -1)
    return net.interpreter(net.network.add_kv_cache_update(*tensors, trt.KVCacheMode.LINEAR).get_output(0))


def test_kv_cache_update_writes_into_the_callers_cache(net: _Network) -> None:
    # https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/KVCacheUpdate.html:
    # output[i, :, writeIndices[i] + s, :] = update[i, :, s, :]; the output shares the cache's memory.
    cache, update = torch.zeros(2, 2, 8, 4, dtype=torch.float16), _rand(2, 2, 3, 4, dtype=torch.float16)
    result = _cache_interpreter(net).run({"x0": cache, "x1": update, "x2": torch.tensor([5, 0], dtype=torch.int32)})[
        "y0"
    ]
    assert result.data_ptr() == cache.data_ptr()
    expected = torch.zeros_like(cache)
    expected[0, :, 5:8], expected[1, :, 0:3] = update[0], update[1]
    _same(cache, expected)


@pytest.mark.parametrize("start", [-1, 6])
def test_kv_cache_update_out_of_bounds_raises_and_writes_nothing(net: _Network, start: int) -> None:
    cache, update = torch.zeros(2, 2, 8, 4, dtype=torch.float16), _rand(2, 2, 3, 4, dtype=torch.float16)
    with pytest.raises(IndexError, match="3 tokens"):
        _cache_interpreter(net).run({"x0": cache, "x1": update, "x2": torch.tensor([0, start], dtype=torch.int32)})
    assert not cache.any()


def test_kv_cache_must_be_read_through_its_update(net: _Network) -> None:
    cache = net.input(torch.float16, 1, 2, 8, 4)
    update = net.network.add_kv_cache_update(
        cache, net.input(torch.float16, 1, 2, 1, 4), net.input(torch.int32, 1), trt.KVCacheMode.LINEAR
    )
    stale = net.network.add_identity(cache)
    with pytest.raises(ValueError, match="another layer reads the cache"):
        net.interpreter(update.get_output(0), stale.get_output(0))


def test_kv_cache_must_be_an_input_and_an_output(net: _Network) -> None:
    update = net.network.add_kv_cache_update(
        net.input(torch.float16, 1, 2, 8, 4),
        net.input(torch.float16, 1, 2, 1, 4),
        net.input(torch.int32, 1),
        trt.KVCacheMode.LINEAR,
    )
    with pytest.raises(ValueError, match="must be a network input"):
        net.interpreter(net.network.add_identity(update.get_output(0)).get_output(0))


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("mask_kind", ["none", "bool", "float"])
def test_attention(net: _Network, mask_kind: str, dtype: torch.dtype) -> None:
    # Unscaled: "TensorRT requires Q or K to be multiplied with attention scale ... before going into IAttention"; a
    # bool mask is true where a position may be attended to, a float one is added to q k^T; heads may be grouped
    # (https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-fused-attention.html).
    q, k, v = (
        _rand(2, 6, 3, 8, dtype=dtype),
        _rand(2, 2, 5, 8, dtype=dtype, seed=1),
        _rand(2, 2, 5, 8, dtype=dtype, seed=2),
    )
    mask = {"none": None, "bool": _rand(2, 1, 3, 5) > 0, "float": _rand(2, 1, 3, 5, dtype=dtype)}[mask_kind]
    shapes = (-1, 6, -1, 8), (-1, 2, 5, 8), (-1, 2, 5, 8)
    attention = net.network.add_attention_v2(
        *(net.input(dtype, *shape) for shape in shapes), trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
    )
    inputs = [q, k, v]
    if mask is not None:
        mask[..., 0] = mask[..., 0] if mask_kind == "float" else True  # every query sees a key
        attention.mask = net.input(mask.dtype, -1, 1, -1, 5)
        inputs.append(mask)
    (result,) = net.run(attention.get_output(0), *inputs)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(),
        k.double().repeat_interleave(3, 1),
        v.double().repeat_interleave(3, 1),
        attn_mask=mask.double() if mask is not None and mask_kind == "float" else mask,
        scale=1.0,
    )
    torch.testing.assert_close(result, expected.to(dtype))


@pytest.mark.parametrize("change", ["causal", "lengths", "norm"])
def test_attention_of_other_kinds_raises(net: _Network, change: str) -> None:
    q = net.input(torch.float16, 1, 2, 4, 8)
    causal = trt.CausalMaskKind.LOWER_RIGHT if change == "causal" else trt.CausalMaskKind.NONE
    norm = trt.AttentionNormalizationOp.NONE if change == "norm" else trt.AttentionNormalizationOp.SOFTMAX
    attention = net.network.add_attention_v2(q, q, q, norm, causal)
    if change == "lengths":
        attention.key_value_lengths = net.input(torch.int32, 1)
    with pytest.raises(NotImplementedError, match=r"attention|causal"):
        net.interpreter(attention.get_output(0))


# --- quantization ----------------------------------------------------------------------------------------------------
# Formulas: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-schemes.html.


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("per_axis", [False, True])
def test_quantize_and_dequantize_fp8(net: _Network, per_axis: bool, dtype: torch.dtype) -> None:
    x = _rand(4, 6, dtype=dtype)
    x[0, 0], x[1, 1], x[2, 2] = 1000.0, -1000.0, torch.nan
    scale = torch.tensor([0.5, 1.0, 0.25, 2.0, 1.0, 0.125] if per_axis else 0.5).to(dtype)
    tensor = net.constant(scale)
    quantize = net.network.add_quantize(net.input(dtype, -1, 6), tensor, trt.fp8)
    dequantize = net.network.add_dequantize(quantize.get_output(0), tensor, _TRT_DTYPE[dtype])
    if per_axis:
        quantize.axis = dequantize.axis = 1
    (result,) = net.run(dequantize.get_output(0), x)
    codes = (x.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    _same(result, (codes.float() * scale.float()).to(dtype))
    assert result[0, 0] == 448 * scale.flatten()[0]


def test_quantize_int8_rounds_ties_to_even_and_saturates(net: _Network) -> None:
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, 100.0, -100.0])
    scale = net.constant(torch.tensor(0.5))
    quantize = net.network.add_quantize(net.input(torch.float32, 6), scale, trt.int8).get_output(0)
    (result,) = net.run(net.network.add_dequantize(quantize, scale, trt.float32).get_output(0), x)
    _same(result, torch.tensor([0.0, 1.0, 1.0, 0.0, 63.5, -64.0]))


def test_dequantize_fp8_weights_per_output(net: _Network) -> None:
    codes, scale = _rand(4, 6).to(torch.float8_e4m3fn), _rand(4, dtype=torch.float16).abs()
    layer = net.network.add_dequantize(net.constant(codes), net.constant(scale), trt.float16)
    layer.axis = 0
    (result,) = net.run(layer.get_output(0))
    _same(result, (codes.float() * scale.float()[:, None]).half())


def _pack_int4(values: Tensor) -> Tensor:
    # "The first element is stored in the 4 LSB and the second element is stored in the 4 MSB": so ONNX
    # (https://github.com/onnx/onnx/pull/5811). No page of NVIDIA's that says so of TensorRT was found.
    low, high = (values.flatten().to(torch.uint8) & 15).unflatten(0, (-1, 2)).unbind(-1)
    return low | high << 4


@pytest.mark.parametrize("dtype", _HALVES)
@pytest.mark.parametrize("block_shape", [None, (4, 1), (4, -1)])
def test_dequantize_int4_blocks(net: _Network, block_shape: tuple[int, int] | None, dtype: torch.dtype) -> None:
    values = torch.randint(-8, 8, (12, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scale = _rand(3, 1 if block_shape == (4, -1) else 6, dtype=dtype).abs()
    weights = net.constant(_pack_int4(values), trt.int4, (12, 6))
    layer = net.network.add_dequantize(weights, net.constant(scale), _TRT_DTYPE[dtype])
    if block_shape is not None:
        layer.block_shape = block_shape
    (result,) = net.run(layer.get_output(0))
    _same(result, (values.float() * scale.float().repeat_interleave(4, 0)).to(dtype))


def test_dequantized_weights_are_evaluated_once(net: _Network) -> None:
    x, scale = _rand(2, 4, dtype=torch.float16), net.constant(torch.tensor(0.5, dtype=torch.float16))
    codes = torch.arange(-6, 6, dtype=torch.int8).reshape(4, 3)
    weights = net.network.add_dequantize(net.constant(codes), scale, trt.float16).get_output(0)
    product = net.network.add_matrix_multiply(net.input(torch.float16, -1, 4), _NONE, weights, _NONE)
    interpreter = net.interpreter(product.get_output(0))
    assert [step.kind for step in interpreter._steps] == ["MATRIX_MULTIPLY"]
    assert [(c.dtype, tuple(c.shape)) for c in interpreter._constants.values()] == [(torch.float64, (4, 3))]
    for _ in range(2):
        _same(interpreter.run({"x0": x})["y0"], (x.double() @ (codes.double() * 0.5)).half())


# --- the network -----------------------------------------------------------------------------------------------------


def _identity_interpreter(net: _Network) -> NetworkInterpreter:
    return net.interpreter(net.network.add_identity(net.input(torch.float16, -1, 4)).get_output(0))


def test_wrong_inputs_raise(net: _Network) -> None:
    interpreter = _identity_interpreter(net)
    good = _rand(3, 4, dtype=torch.float16)
    _same(interpreter.run({"x0": good})["y0"], good)
    with pytest.raises(ValueError, match=r"missing inputs \['x0'\]"):
        interpreter.run({})
    with pytest.raises(ValueError, match=r"unknown \['other'\]"):
        interpreter.run({"x0": good, "other": good})
    with pytest.raises(ValueError, match=r"x0 is torch.float32, declared torch.float16"):
        interpreter.run({"x0": good.float()})
    for shape in ((3, 5), (3, 4, 1)):
        with pytest.raises(ValueError, match=r"x0 is .*, declared"):
            interpreter.run({"x0": torch.zeros(shape, dtype=torch.float16)})


def test_a_network_can_be_read_twice(net: _Network) -> None:
    layer = net.network.add_activation(net.input(torch.float32, 3), trt.ActivationType.RELU)
    held = [net.network.get_layer(i) for i in range(net.network.num_layers)]  # downcast by the first reading
    x = _rand(3)
    first = net.interpreter(layer.get_output(0))
    second = NetworkInterpreter(trt, net.network)
    assert len(held) == 1
    _same(first.run({"x0": x})["y0"], second.run({"x0": x})["y0"])


def test_inner_tensors_may_share_a_name(net: _Network) -> None:
    x = net.input(torch.float32, 2)
    a, b = (net.network.add_unary(x, op).get_output(0) for op in (trt.UnaryOperation.NEG, trt.UnaryOperation.ABS))
    a.name = b.name = "same"
    (result,) = net.run(net.network.add_elementwise(a, b, _OP.SUM).get_output(0), torch.tensor([3.0, -2.0]))
    _same(result, torch.tensor([0.0, 4.0]))


def test_a_network_that_tensorrt_refuses_raises(net: _Network) -> None:
    mixed = net.network.add_elementwise(net.input(torch.float32, 1), net.input(torch.float16, 1), _OP.SUM)
    with pytest.raises(ValueError, match="TensorRT refuses"):
        NetworkInterpreter(trt, net.network)
    assert mixed.type == trt.LayerType.ELEMENTWISE


def test_unsupported_layers_attributes_and_types_raise(net: _Network) -> None:
    x = net.input(torch.float32, 2, 3)
    net.network.add_einsum([x, x], "ij,ij->i")
    with pytest.raises(NotImplementedError, match="EINSUM"):
        NetworkInterpreter(trt, net.network)

    other = _Network()
    window = other.network.add_slice(other.input(torch.float32, 4), (2,), (4,), (1,))
    window.mode = trt.SampleMode.CLAMP
    with pytest.raises(NotImplementedError, match="slice mode CLAMP") as raised:
        NetworkInterpreter(trt, other.network)
    assert any("in SLICE" in note for note in raised.value.__notes__)

    activation = _Network()
    activation.network.add_activation(activation.input(torch.float32, 4), trt.ActivationType.SELU)
    with pytest.raises(NotImplementedError, match="SELU"):
        NetworkInterpreter(trt, activation.network)
