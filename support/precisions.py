"""The types that a model can run in, by the names that users give them."""

from __future__ import annotations

from typing import Literal, get_args

TorchPrecision = Literal["fp32", "bf16", "int8", "int4"]
"""What the torch engine runs in."""

EnginePrecision = Literal["fp16", "bf16", "fp8", "int4"]
"""What TensorRT compiles an engine in."""

QuantizedPrecision = Literal["fp8", "int4"]
"""What ModelOpt quantizes a checkpoint to."""

TORCH_PRECISIONS: tuple[TorchPrecision, ...] = get_args(TorchPrecision)
ENGINE_PRECISIONS: tuple[EnginePrecision, ...] = get_args(EnginePrecision)
QUANTIZED_PRECISIONS: tuple[QuantizedPrecision, ...] = get_args(QuantizedPrecision)
