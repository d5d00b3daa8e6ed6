"""The ops in TensorRT networks compute what their definition computes.

Built from TensorRT's own layers they are interpreted, and built into plans by TensorRT for RTX. As plugins they are driven by TensorRT's plugin
library, for which tests/qdp.py stands in where it is not Python.

Shapes: see `ssv.plugins.contract`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from interpreted import new_graph

from ssv.plugins.tensorrt import NativeOps

FP32, FP16, BF16, INT32 = torch.float32, torch.float16, torch.bfloat16, torch.int32
EPS = 1e-5
HIDDEN = 24

# --- networks of one op ---------------------------------------------------------------------------------------------


def members(result: Any) -> Sequence[Any]:
    """The tensors that an op returns."""
    return [getattr(result, f.name) for f in fields(result)] if is_dataclass(result) else result


class OneOp:
    """A network of one op by TensorRT's own layers, that takes inputs of any size where `shapes` has -1."""

    def __init__(
        self, op: str, inputs: Sequence[tuple[torch.dtype, tuple[int, ...]]], fixed: Sequence[Any], dtype: torch.dtype
    ) -> None:
        self.graph, self.network, self._keep = new_graph(dtype)
        tensors = [self.graph.input(f"x{i}", *each) for i, each in enumerate(inputs)]
        self.results = members(getattr(NativeOps(self.graph), op)(*tensors, *fixed))
        for i, tensor in enumerate(self.results):
            self.graph.output(f"y{i}", tensor)

    @property
    def builder(self) -> Any:
        return self._keep[1]

    @property
    def errors(self) -> list[str]:
        return self._keep[0].errors


Step = tuple[torch.dtype, tuple[int, ...]]


def score_inputs(vocab: int, dtype: torch.dtype = FP32) -> list[Step]:
    return [(dtype, (-1, HIDDEN)), (dtype, (-1, vocab))]
