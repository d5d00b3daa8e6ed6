"""Networks of the builder behind the engine contract, run by the interpreter instead of a GPU.

Weights to build them from are here, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt
import torch
from network_interpreter import NetworkInterpreter
from torch import Tensor

from ssv.builder.tensorrt.graph import Graph
from ssv.builder.tensorrt.network import build_draft, build_target
from ssv.builder.tensorrt.spill import Spill
from ssv.bundle.manifest import EngineEntry
from ssv.bundle.shapes import Limits
from ssv.bundle.tensorrt_api import logger
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft
from ssv.model.scorer import Scorer
from ssv.runtime.engines.kv_cache import KVCache
from ssv.runtime.engines.tensorrt_engine import TensorRTEngine

LIMITS = Limits(max_batch=3, max_length=64, max_pending=4, prefill_chunk=16)


class InterpretedRunner:
    """A `Runner` that interprets a network; counts its runs and notes their profiles."""

    def __init__(self, network: Any, keep: object) -> None:
        self._interpreter, self._keep = NetworkInterpreter(trt, network), keep
        self.runs: list[tuple[int, tuple[int, ...], int]] = []

    def run(self, profile: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.runs.append((profile, tuple(inputs["input_ids"].shape), len(inputs["gather_rows"])))
        found = self._interpreter.run(dict(inputs))
        return {name: x for name, x in found.items() if not name.endswith("_out")}


def new_graph(dtype: torch.dtype) -> tuple[Graph, Any, object]:
    log = logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    spill = Spill(Path(tempfile.gettempdir()))
    return Graph(trt, network, dtype, log.last, spill), network, (log, builder, spill)


def entry(role: str, dtype: torch.dtype, limits: Limits = LIMITS) -> EngineEntry:
    return EngineEntry(
        role=role,
        precision="fp16",
        flavor="tensorrt_rtx",
        tensorrt="1",
        compute_capabilities=["8.9"],
        file="plan",
        compute_type="bfloat16" if dtype == torch.bfloat16 else "float16",
        max_batch=limits.max_batch,
        max_length=limits.max_length,
        max_pending=limits.max_pending,
        prefill_chunk=limits.prefill_chunk,
        source="0",
        build_seconds=0.0,
        peak_memory_bytes=0,
    )


def interpreted_target(decoder: Decoder, dtype: torch.dtype, draft: Draft | None = None) -> TensorRTEngine:
    graph, network, keep = new_graph(dtype)
    build_target(graph, decoder, LIMITS, draft.tap if draft is not None else None)
    runner = InterpretedRunner(network, keep)
    has_tap = draft is not None and draft.tap is not None
    engine = TensorRTEngine(runner, entry("target", dtype), decoder.spec, has_features_out=has_tap, device="cpu")
    return _in_fp32(engine, decoder, dtype)


def interpreted_draft(draft: Draft, dtype: torch.dtype, scorer: Scorer | None) -> TensorRTEngine:
    graph, network, keep = new_graph(dtype)
    build_draft(graph, draft, LIMITS, scorer)
    engine = TensorRTEngine(
        InterpretedRunner(network, keep),
        entry("draft", dtype),
        draft.decoder.spec,
        draft=draft.spec,
        token_ids_V=draft.token_ids,
        has_scorer=scorer is not None,
        device="cpu",
    )
    return _in_fp32(engine, draft.decoder, dtype)


def _in_fp32(engine: TensorRTEngine, decoder: Decoder, dtype: torch.dtype) -> TensorRTEngine:
    """No engine has fp32: with nothing rounded, a network can be compared to the last digits."""
    if dtype == torch.float32:
        engine.cache = KVCache(decoder.spec, engine.max_batch, engine.max_length, dtype, "cpu")
    return engine
