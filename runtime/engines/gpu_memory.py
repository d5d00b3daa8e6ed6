"""The share of a GPU's memory that a process may take, and whether weights, caches and buffers fit it: told before any
of them is allocated."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ssv.model.decoder import Decoder
from ssv.model.draft import Draft
from ssv.model.quantized import QuantizedLinear
from ssv.runtime.counters import GpuUse
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.engines.kv_cache import KVCache


def gpu_use(device: torch.device, graphs: int) -> GpuUse:
    """What this process has on a GPU now, beside so many CUDA graphs."""
    free, total = torch.cuda.mem_get_info(device)
    return GpuUse(torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device), total - free, graphs)


@dataclass(frozen=True, slots=True)
class GpuShare:
    """A share of a GPU's whole memory, as vLLM's `--gpu-memory-utilization` is one: what others use of it is taken off
    only where too little is free.

    Attributes:
        share: above 0, 1 at most.
        device: the GPU.
        spare: bytes of it that are needed later, such as for a prompt cache.
    """

    share: float
    device: str
    spare: int = 0

    def take(self, needed: Callable[[int, int], int], max_batch: int, max_length: int) -> None:
        """Holds this process to the share, so that whatever goes beyond it is an out-of-memory error.

        Args:
            needed: bytes for so many rows of so many tokens; grows with both.

        Raises:
            EngineError: they do not fit; it says what would.
        """
        named = torch.device(self.device).index
        device = torch.cuda.current_device() if named is None else named
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_allocated(device)
        allowed = int(self.share * total) - own
        there = min(allowed, free + torch.cuda.memory_reserved(device) - own)

        def fits(rows: int, length: int) -> bool:
            return needed(rows, length) + self.spare <= there

        if not fits(max_batch, max_length):
            whole = needed(max_batch, max_length) + self.spare
            rest = f", of which {_gib(there)} are free" if there < allowed else ""
            raise EngineError(
                f"{max_batch} rows of {max_length} tokens need {_gib(whole)} of the GPU's memory, weights and buffers "
                f"included; the share {self.share:g} of its {_gib(total)} is {_gib(allowed)}{rest}",
                _what_fits(fits, max_batch, max_length),
            )
        torch.cuda.set_per_process_memory_fraction(float(self.share), device)


def _what_fits(fits: Callable[[int, int], bool], max_batch: int, max_length: int) -> str:
    rows = bisect_left(range(1, max_batch + 1), True, key=lambda rows: not fits(rows, max_length))
    length = bisect_left(range(1, max_length + 1), True, key=lambda length: not fits(max_batch, length))
    found = [f"at most {rows} rows"] * (rows > 0) + [f"a length of at most {length}"] * (length > 0)
    return f"choose {' or '.join(found)}, or a larger share" if found else "choose a larger share, or a smaller model"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def weight_bytes(module: nn.Module, dtype: torch.dtype, *, keeps_quantized: bool = False) -> int:
    """What a model's tensors take on a GPU, each of them once.

    Args:
        keeps_quantized: whether a quantized checkpoint's layers stay as they are; otherwise they are of the dtype too.
    """
    quantized = [part for part in module.modules() if isinstance(part, QuantizedLinear)]
    kept = {id(x): x.nbytes for part in quantized for x in (*part.parameters(), *part.buffers())}
    rest = {id(x): x for x in (*module.parameters(), *module.buffers()) if id(x) not in kept}
    total = sum(x.numel() * dtype.itemsize if x.is_floating_point() else x.nbytes for x in rest.values())
    if keeps_quantized:
        return total + sum(kept.values())
    return total + sum(part.shape[0] * part.shape[1] * dtype.itemsize for part in quantized)


def torch_bytes(decoder: Decoder, draft: Draft, dtype: torch.dtype, max_batch: int, max_length: int) -> int:
    """What torch engines of a target and its draft take: weights and caches, without what a step works in."""
    models = (decoder, decoder.spec), (draft, draft.spec.decoder)
    return sum(
        weight_bytes(model, dtype) + KVCache.bytes_for(spec, max_batch, max_length, dtype) for model, spec in models
    )
