"""A TensorRT network under construction: layers by what they compute, and names for what is wrong.

Shapes: V vocab, R rows, T tokens, H hidden, I inputs and O outputs of a linear layer; X any axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ssv.builder.tensorrt.spill import Spill
from ssv.bundle.tensorrt_api import EngineBuildError, data_type
from ssv.model.quantized import AwqLinear, Fp8Linear, QuantizedLinear


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
        """Begins, in the block, the names of layers with this one, for profiles and error messages."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        """An input of the network.

        Args:
            shape: -1 of what varies.
        """
        self.inputs[name] = shape
        return self.network.add_input(name, data_type(self.trt, dtype), shape)

    def output(self, name: str, tensor: Any) -> None:
        """Makes a tensor an output, by a name."""
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
        """An fp32 constant with as many axes as what it is combined with."""
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
        """Product with a weight, or with the weight transposed."""
        op = self.trt.MatrixOperation
        right = op.TRANSPOSE if transpose else op.NONE
        return self._add("product", self.network.add_matrix_multiply(x, op.NONE, weight, right))

    def rotary(self, x_BNTD: Any, cos_SP: Any, sin_SP: Any, position_BT: Any) -> Any:
        """Rotates queries or keys by their positions (RoPE), whose cosines and sines are given by position."""
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
        """Attention with keys and values, masked, as one fused layer where TensorRT has a kernel for the shapes.

        Raises:
            EngineBuildError: TensorRT refuses it.
        """
        softmax, uncausal = self.trt.AttentionNormalizationOp.SOFTMAX, self.trt.CausalMaskKind.NONE
        attention = self.network.add_attention_v2(q_BKXD, keys_BKVD, values_BKVD, softmax, uncausal)
        if attention is None:
            raise EngineBuildError(f"TensorRT refuses attention{self._where()}: {self.complaint()}")
        attention.mask = mask_B1XV
        attention.decomposable = True  # where there is no fused kernel for these shapes
        return attention.get_output(0)

    def split_heads(self, x_MX: Any, shape_BT: Any, heads: int, dim: int) -> Any:
        """Turns [M, N * D] into [B, N, T, D]."""
        key = (heads, dim)
        if key not in self._head_shapes:
            sizes = self._new_constant(torch.tensor(key), torch.int64)
            self._head_shapes[key] = self.concat((shape_BT, sizes), axis=0)
        shuffle = self.network.add_shuffle(x_MX)
        shuffle.set_input(1, self._head_shapes[key])
        shuffle.second_transpose = (0, 2, 1, 3)
        return self._add("heads", shuffle)

    def join_heads(self, x_BKXD: Any, heads: int, groups: int, dim: int) -> Any:
        """Turns [B, K, G * T, D] into [M, K * G * D]."""
        shuffle = self.network.add_shuffle(x_BKXD)
        shuffle.reshape_dims = (0, heads, groups, -1, dim)
        shuffle.second_transpose = (0, 3, 1, 2, 4)
        return self.reshape(self._add("heads", shuffle), (-1, heads * groups * dim))

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

    def last_size(self, x: Any, rank: int) -> Any:
        """The size of the last axis, [1], known when the engine runs."""
        return self._add("size", self.network.add_slice(self.shape(x), (rank - 1,), (1,), (1,)))

    def shape(self, x: Any) -> Any:
        """Sizes of a tensor, int64."""
        return self._add("shape", self.network.add_shape(x))

    def reshape(self, x: Any, sizes: tuple[int, ...]) -> Any:
        """The same numbers in another shape: 0 keeps a size, -1 is what is left."""
        shuffle = self.network.add_shuffle(x)
        shuffle.reshape_dims = sizes
        return self._add("reshape", shuffle)

    def unsqueeze(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Inserts axes of size 1."""
        axes_constant = self._new_constant(torch.tensor(axes, dtype=torch.int32), torch.int32)
        return self._add("unsqueeze", self.network.add_unsqueeze(x, axes_constant))

    def gather(self, x: Any, rows: Any) -> Any:
        """Rows of the first axis."""
        return self._add("gather", self.network.add_gather(x, rows, 0))

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        """Joins tensors along an axis."""
        layer = self.network.add_concatenation(list(parts))
        layer.axis = axis
        return self._add("concat", layer)

    def top(self, x_RV: Any, k: int) -> tuple[Any, Any]:
        """The k largest of each row and their columns, int32."""
        layer = self.network.add_topk(x_RV, self.trt.TopKOperation.MAX, k, 1 << 1)
        return self._add("top", layer), layer.get_output(1)

    def select(self, condition: Any, yes: Any, no: Any) -> Any:
        """Elements of `yes` where the condition holds, else of `no`."""
        return self._add("select", self.network.add_select(condition, yes, no))

    def cast(self, x: Any, dtype: torch.dtype) -> Any:
        """The same numbers as another type."""
        return self._add("cast", self.network.add_cast(x, self._type(dtype)))

    def sum(self, x: Any) -> Any:
        """Sum over the last axis, which stays with size 1."""
        return self._reduce(x, self.trt.ReduceOperation.SUM)

    def mean(self, x: Any) -> Any:
        """Mean over the last axis, which stays with size 1."""
        return self._reduce(x, self.trt.ReduceOperation.AVG)

    def _reduce(self, x: Any, op: Any) -> Any:
        last = 1 << (len(x.shape) - 1)
        return self._add("reduce", self.network.add_reduce(x, op, last, True))

    def over_rms(self, x: Any, eps: float) -> Any:
        """fp32 divided by its root mean square over the last axis."""
        mean_square = self.mean(self.mul(x, x))
        return self.div(x, self.sqrt(self.add(mean_square, self.scalar(eps, rank=len(x.shape)))))

    def rms_norm(self, x: Any, weight_H: Tensor, eps: float) -> Any:
        """Norm over the last axis of fp32, rounded to the compute type.

        TensorRT's own normalization subtracts the mean.
        """
        weight = weight_H.view(*[1] * (len(x.shape) - 1), -1)
        return self.cast(self.mul(self.over_rms(x, eps), self.constant(weight, torch.float32)), self.dtype)

    def and_(self, a: Any, b: Any) -> Any:
        """Where both are true."""
        return self._elementwise(a, b, self.trt.ElementWiseOperation.AND)

    def add(self, a: Any, b: Any) -> Any:
        """a + b, elementwise."""
        return self._elementwise(a, b, self.trt.ElementWiseOperation.SUM)

    def sub(self, a: Any, b: Any) -> Any:
        """a - b, elementwise."""
        return self._elementwise(a, b, self.trt.ElementWiseOperation.SUB)

    def mul(self, a: Any, b: Any) -> Any:
        """a * b, elementwise."""
        return self._elementwise(a, b, self.trt.ElementWiseOperation.PROD)

    def div(self, a: Any, b: Any) -> Any:
        """a / b, elementwise."""
        return self._elementwise(a, b, self.trt.ElementWiseOperation.DIV)

    def max(self, a: Any, b: Any) -> Any:
        """The larger of a and b, elementwise."""
        return self._elementwise(a, b, self.trt.ElementWiseOperation.MAX)

    def equal(self, a: Any, b: Any) -> Any:
        """Where a and b are equal."""
        return self._elementwise(a, b, self.trt.ElementWiseOperation.EQUAL)

    def greater(self, a: Any, b: Any) -> Any:
        """Where a is greater than b."""
        return self._elementwise(a, b, self.trt.ElementWiseOperation.GREATER)

    def _elementwise(self, a: Any, b: Any, op: Any) -> Any:
        return self._add(op.name.lower(), self.network.add_elementwise(a, b, op))

    def exp(self, x: Any) -> Any:
        """e to the power of x, elementwise."""
        return self._unary(x, self.trt.UnaryOperation.EXP)

    def log(self, x: Any) -> Any:
        """Natural logarithm, elementwise."""
        return self._unary(x, self.trt.UnaryOperation.LOG)

    def sqrt(self, x: Any) -> Any:
        """Square root, elementwise."""
        return self._unary(x, self.trt.UnaryOperation.SQRT)

    def _unary(self, x: Any, op: Any) -> Any:
        return self._add(op.name.lower(), self.network.add_unary(x, op))

    def sigmoid(self, x: Any) -> Any:
        """1 / (1 + exp(-x)), elementwise."""
        return self._add("sigmoid", self.network.add_activation(x, self.trt.ActivationType.SIGMOID))

    def _new_constant(self, tensor: Tensor, dtype: torch.dtype) -> Any:
        held = tensor.detach().cpu().to(dtype).contiguous()
        if dtype == torch.float16 and tensor.dtype != dtype and bool(held.isinf().any()):
            raise EngineBuildError("a weight exceeds fp16's range", "build with --precision bf16")
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
