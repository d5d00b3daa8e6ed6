"""The ops in a TensorRT network, in two forms with one interface: plugins, and TensorRT's own layers.

`PluginOps` are "quickly deployable plugins" of full TensorRT (`ssv.plugins.registration`). TensorRT for RTX has no
plugins; `NativeOps` builds the same ops from layers that both have.

Tensors are TensorRT's, weights torch's. Sizes H and V have to be known when the network is built, and row indices have
to be valid.

Shapes: see `ssv.plugins.contract`.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch
from torch import Tensor

from ssv.builder.tensorrt.graph import Graph
from ssv.plugins.contract import OpError, Score
from ssv.plugins.reference import MAX_LOGIT, MIN_BELOW, MIN_REST
from ssv.plugins.registration import register_plugins


class NetworkOps(Protocol):
    """The ops on tensors of a network; `ssv.plugins.reference` describes and defines them."""

    def score(self, hidden_RH: Any, logits_RV: Any, weight_F: Tensor, bias_1: Tensor) -> Score:
        """The scorer's risk of each row's likeliest token, with what it computes on the way."""
        ...

    def sparse_gather(self, hidden_MH: Any, row_R: Any, weight_H: Tensor, eps: float) -> tuple[Any, Any]:
        """The gathered rows of hidden states, as they are and behind the RMS norm."""
        ...


class PluginOps:
    """The ops as plugins of full TensorRT.

    Args:
        graph: of the network that they are added to.

    Raises:
        OpError: Triton is missing, which compiles the kernels.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._ops = register_plugins(importlib.import_module(f"{graph.trt.__name__}.plugin"))

    def score(self, hidden_RH: Any, logits_RV: Any, weight_F: Tensor, bias_1: Tensor) -> Score:
        """Scores by the plugin; see `NetworkOps.score`."""
        fp32 = torch.float32
        weights = self._graph.constant(weight_F, fp32), self._graph.constant(bias_1, fp32)
        return Score(*self._added("score", hidden_RH, logits_RV, *weights))

    def sparse_gather(self, hidden_MH: Any, row_R: Any, weight_H: Tensor, eps: float) -> tuple[Any, Any]:
        """Gathers by the plugin; see `NetworkOps.sparse_gather`."""
        weight = self._graph.constant(weight_H, self._graph.dtype)
        gathered, normed = self._added("sparse_gather", hidden_MH, row_R, weight, eps=float(eps))
        return gathered, normed

    def _added(self, name: str, *tensors: Any, **attributes: float) -> list[Any]:
        layer = self._graph.network.add_plugin(getattr(self._ops, name)(*tensors, **attributes), aot=True)
        if layer is None:
            raise OpError(f"{name}: plugin", "one that TensorRT takes", self._graph.complaint())
        return [layer.get_output(i) for i in range(layer.num_outputs)]


class NativeOps:
    """The ops by layers that every TensorRT has.

    Args:
        graph: of the network that they are added to.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def score(self, hidden_RH: Any, logits_RV: Any, weight_F: Tensor, bias_1: Tensor) -> Score:
        """Scores by TensorRT's own layers; see `NetworkOps.score`."""
        g, fp32 = self._graph, torch.float32
        logits_RV = g.cast(logits_RV, fp32)
        vocab = logits_RV.shape[1]
        top_RK, index_RK = g.top(logits_RV, min(2, vocab))
        first_R1, index_R1 = g.columns(top_RK, 0, 1), g.columns(index_RK, 0, 1)
        below_RV = self._at_least(MIN_BELOW, g.sub(logits_RV, first_R1))
        # The top-1's own summand is left out: subtracting it from the sum would lose what is left once its probability
        # is near 1.
        column_1V = g.constant(torch.arange(vocab, dtype=torch.int32)[None], torch.int32)
        exp_RV = g.select(g.equal(column_1V, index_R1), g.scalar(0.0, rank=2), g.exp(below_RV))
        others_R1 = g.sum(exp_RV)
        # NaN for a row without a distribution, which all that is found of it is added to: its largest logit may hide
        # it.
        most = g.scalar(MAX_LOGIT, rank=2)
        is_within_R1 = g.and_(g.greater(first_R1, g.scalar(-MAX_LOGIT, rank=2)), g.greater(most, first_R1))
        is_known_R1 = g.and_(is_within_R1, g.greater(most, others_R1))
        unknown_R1 = g.select(is_known_R1, g.scalar(0.0, rank=2), g.scalar(torch.nan, rank=2))
        others_R1 = g.add(others_R1, unknown_R1)
        total_R1 = g.add(others_R1, g.scalar(1.0, rank=2))
        rest_R1 = g.log(self._at_least(MIN_REST, g.div(others_R1, total_R1)))
        entropy_R1 = g.sub(g.log(total_R1), g.div(g.sum(g.mul(exp_RV, below_RV)), total_R1))
        second_R1 = g.sub(g.columns(top_RK, 1, 1), first_R1) if vocab > 1 else g.scalar(MIN_BELOW, rank=2)
        margin_R1 = g.sub(unknown_R1, self._at_least(MIN_BELOW, second_R1))
        features = [rest_R1, entropy_R1, margin_R1]
        if len(weight_F) > len(features):
            features.insert(0, g.over_rms(g.cast(hidden_RH, fp32), 1e-6))
        score_R1 = g.matmul(g.concat(features, axis=1), g.constant(weight_F[:, None], fp32), transpose=False)
        reject_R1 = g.sigmoid(g.add(score_R1, g.constant(bias_1[None], fp32)))
        prob_R1 = g.div(g.scalar(1.0, rank=2), total_R1)
        return Score(*(g.reshape(x, (-1,)) for x in (index_R1, prob_R1, entropy_R1, margin_R1, reject_R1)))

    def _at_least(self, least: float, x_RX: Any) -> Any:
        """The larger of both; NaN stays NaN, of which TensorRT's MAX says nothing."""
        g, bound = self._graph, self._graph.scalar(least, rank=2)
        return g.select(g.greater(bound, x_RX), bound, x_RX)

    def sparse_gather(self, hidden_MH: Any, row_R: Any, weight_H: Tensor, eps: float) -> tuple[Any, Any]:
        """Gathers by TensorRT's own layers; see `NetworkOps.sparse_gather`."""
        g = self._graph
        gathered_RH = g.gather(hidden_MH, row_R)
        return gathered_RH, g.rms_norm(g.cast(gathered_RH, torch.float32), weight_H, eps)
