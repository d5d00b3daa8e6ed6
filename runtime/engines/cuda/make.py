"""Target and draft as CUDA engines, from models in any type and place, and what they take of a GPU's memory."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from ssv.model.decoder import Decoder
from ssv.model.draft import Draft, FeatureTap
from ssv.model.quantized import QuantizedLinear
from ssv.model.scorer import Scorer
from ssv.model.spec import DecoderSpec
from ssv.runtime.engines.cuda import packing, places
from ssv.runtime.engines.cuda.engine import CudaEngine, misfit
from ssv.runtime.engines.cuda.lane import CudaLane
from ssv.runtime.engines.cuda.rounds import CudaRounds
from ssv.runtime.engines.cuda.weights import Buffers
from ssv.runtime.engines.gpu_memory import weight_bytes
from ssv.runtime.engines.kv_cache import KVCache
from ssv.runtime.engines.torch_engine import prepare

LEAST_CAPABILITY = (8, 0)

M = TypeVar("M", Decoder, Draft, FeatureTap)


def why_not(decoder: Decoder, draft: Draft, device: str) -> str | None:
    """Why the kernels cannot run a pair on a GPU; None if they can."""
    if (reason := why_not_draft(draft, device)) is not None:
        return reason
    if (reason := _quantized_misfit(decoder)) is not None:
        return reason
    return misfit(decoder.spec, packing.inputs_of(draft.tap.project) if draft.tap is not None else 0)


def why_not_draft(draft: Draft, device: str) -> str | None:
    """Why the kernels cannot run a draft on a GPU; None if they can."""
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"this GPU has compute capability {'.'.join(map(str, capability))}, the kernels need 8.0"
    if (reason := _quantized_misfit(draft)) is not None:
        return reason
    if draft.spec.eagle3 is not None:
        return "its draft joins features as EAGLE-3 does"
    return misfit(draft.spec.decoder)


def _quantized_misfit(model: nn.Module) -> str | None:
    """Why a layer of a quantized checkpoint cannot be run; None if all can."""
    for name, part in model.named_modules():
        if isinstance(part, QuantizedLinear) and (reason := packing.misfit(part)) is not None:
            return f"{name} has {reason}"
    return None


def bytes_needed(decoder: Decoder, draft: Draft, max_batch: int, max_length: int) -> int:
    """What `cuda_engines`, `CudaRounds` and `CudaLane` of a pair take, while they are made: a model's weights are there
    twice then, as they are and packed."""
    target, drafting = decoder.spec, draft.spec.decoder
    sizes = (
        (target, target.vocab_size, len(draft.tap.layers) if draft.tap is not None else 0),
        (drafting, draft.spec.head_size, 0),
    )
    weights = sum(
        weight_bytes(model, torch.bfloat16, keeps_quantized=True) + _packed_bytes(model) for model in (decoder, draft)
    )
    caches = sum(
        KVCache.bytes_for(spec, rows, max_length, torch.bfloat16)
        for spec, beside in ((target, CudaLane.rows_beside(max_batch)), (drafting, 1))
        for rows in (max_batch, beside)
    )
    buffers = sum(
        2 * Buffers(spec, torch.device("meta"), max_length, vocab, num_tapped, most_tokens).nbytes
        for spec, vocab, num_tapped in sizes
        for most_tokens in (places.TOKENS, places.MANY_TOKENS)
    )
    tables = sum(_table_bytes(spec) for spec in (target, drafting))
    return weights + caches + buffers + tables + CudaRounds.held_bytes(target.hidden_size)


def _packed_bytes(model: nn.Module) -> int:
    """What the products' packed weights take: also of an LM head that is the embedding."""
    layers = [part for part in model.modules() if isinstance(part, (nn.Linear, QuantizedLinear))]
    return sum(weight_bytes(layer, torch.bfloat16, keeps_quantized=True) for layer in layers)


def _table_bytes(spec: DecoderSpec) -> int:
    """What sines and cosines of all positions take."""
    return spec.max_positions * spec.head_dim * torch.float32.itemsize


def cuda_engines(
    decoder: Decoder, draft: Draft, scorer: Scorer | None, *, device: str, max_batch: int, max_length: int
) -> tuple[CudaEngine, CudaEngine]:
    """A target with its draft's tap, and the draft; the models are left as they are. `CudaRounds` runs rounds of both.

    Raises:
        EngineError: the kernels cannot run them (`why_not`).
    """
    sizes: dict[str, Any] = {"max_batch": max_batch, "max_length": max_length}
    tap = _on_gpu(draft.tap, device) if draft.tap is not None else None
    target = CudaEngine(_on_gpu(decoder, device), tap=tap, **sizes)
    return target, cuda_draft_engine(draft, scorer, device=device, **sizes)


def cuda_draft_engine(
    draft: Draft, scorer: Scorer | None, *, device: str, max_batch: int, max_length: int
) -> CudaEngine:
    """A draft alone, whose target somebody else runs; the model is left as it is.

    Raises:
        EngineError: the kernels cannot run it (`why_not_draft`).
    """
    without_tap = copy.copy(draft)
    without_tap._modules = {**draft._modules, "tap": None}  # it runs with the target
    copied = _on_gpu(without_tap, device)
    scorer = scorer.to(device) if scorer is not None else None
    return CudaEngine(copied.decoder, draft=copied, scorer=scorer, max_batch=max_batch, max_length=max_length)


def _on_gpu(module: M, device: str) -> M:
    return prepare(module, "bf16", device, lambda _: (), keeps_quantized=True)
