"""What weights, caches and buffers take of a GPU, and what is said where a share has no room for them; without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cuda_on_cpu import CpuEngine, as_on_a_gpu
from tiny import random_draft, tiny_decoder

from ssv.model.decoder import Decoder
from ssv.model.draft import Draft
from ssv.runtime.counters import GpuUse
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.engines.cuda.make import bytes_needed
from ssv.runtime.engines.gpu_memory import GpuShare, gpu_use, torch_bytes, weight_bytes
from ssv.runtime.engines.kv_cache import KVCache
from ssv.runtime.engines.torch_engine import draft_engine, target_engine

TOTAL = 1000


class Gpu:
    """Stands in for torch's view of a GPU's memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, free: int = TOTAL, allocated: int = 0) -> None:
        self.fractions: list[tuple[float, int]] = []
        answers: dict[str, Any] = {
            "mem_get_info": lambda device: (free, TOTAL),
            "current_device": lambda: 3,
            "memory_allocated": lambda device: allocated,
            "memory_reserved": lambda device: allocated + 5,
            "max_memory_reserved": lambda device: allocated + 7,
            "set_per_process_memory_fraction": lambda share, device: self.fractions.append((share, device)),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)


def linear(rows: int, length: int) -> int:
    """100 for the weights, and 1 for each token of a row."""
    return 100 + rows * length


def pair() -> tuple[Decoder, Draft]:
    decoder = tiny_decoder()
    return decoder, random_draft(decoder, "conditioned")


def test_a_share_is_of_the_whole_memory_and_holds_the_process_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, free=950)
    GpuShare(0.5, "cuda").take(linear, 4, 100)
    GpuShare(1, "cuda:1").take(linear, 4, 100)
    assert gpu.fractions == [(0.5, 3), (1.0, 1)]


@pytest.mark.parametrize(
    ("share", "spare", "rows", "length", "cure"),
    [
        (0.5, 0, 5, 100, "at most 4 rows or a length of at most 80, or a larger share"),
        (0.5, 250, 4, 100, "at most 1 rows or a length of at most 37, or a larger share"),
        (0.5, 0, 1, 1000, "choose a length of at most 400, or a larger share"),
        (0.5, 0, 1000, 1, "at most 400 rows, or a larger share"),
        (0.05, 0, 1, 1, "choose a larger share, or a smaller model"),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(
    monkeypatch: pytest.MonkeyPatch, share: float, spare: int, rows: int, length: int, cure: str
) -> None:
    gpu = Gpu(monkeypatch)
    with pytest.raises(
        EngineError, match=f"{rows} rows of {length} tokens need .* the share {share:g} of its"
    ) as caught:
        GpuShare(share, "cuda", spare).take(linear, rows, length)
    assert cure in str(caught.value)
    assert gpu.fractions == []


def test_what_others_use_counts_where_too_little_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, free=300)
    with pytest.raises(EngineError, match=r"of which .* are free: choose at most 2 rows"):
        GpuShare(0.9, "cuda").take(linear, 3, 100)


def test_what_this_process_has_already_is_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, free=600, allocated=400)
    with pytest.raises(EngineError, match="at most 4 rows"):
        GpuShare(0.9, "cuda").take(linear, 5, 100)


def test_use_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, free=300, allocated=400)
    assert gpu_use(torch.device("cuda"), 3) == GpuUse(405, 407, 700, 3)


def test_bytes_of_a_cache_are_those_that_it_takes() -> None:
    spec = pair()[0].spec
    cache = KVCache(spec, 3, 50, torch.bfloat16, "cpu")
    assert KVCache.bytes_for(spec, 3, 50, torch.bfloat16) == cache.keys.nbytes + cache.values.nbytes


def test_bytes_of_torch_engines_are_those_that_they_take() -> None:
    decoder, draft = pair()
    sizes: dict[str, Any] = {"device": "cpu", "precision": "fp32", "max_batch": 3, "max_length": 50}
    engines = target_engine(decoder, draft=None, ranges={}, **sizes), draft_engine(draft, **sizes)
    caches = sum(engine.cache.keys.nbytes + engine.cache.values.nbytes for engine in engines)
    modules = sum(weight_bytes(module, torch.float32) for module in (decoder, draft))
    assert torch_bytes(decoder, draft, torch.float32, 3, 50) == caches + modules
    assert weight_bytes(decoder, torch.bfloat16) == weight_bytes(decoder, torch.float32) // 2


def test_the_cuda_engines_take_no_more_than_is_said_and_little_less(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    decoder, draft = (copy.deepcopy(module).to(torch.bfloat16) for module in pair())
    # The engine's own buffers, as if they were a device's.
    said = {rows: bytes_needed(decoder, draft, rows, 48) for rows in (1, 2, 8)}
    engine = CpuEngine(decoder, max_batch=8, max_length=48)
    a_row = engine.cache.keys[:, :1].nbytes * 2
    drafting = KVCache.bytes_for(draft.spec.decoder, 1, 48, torch.bfloat16)
    assert said[2] - said[1] == a_row + drafting
    assert said[8] - said[1] == 7 * (a_row + drafting)
    packed = engine.weight_bytes if hasattr(engine, "weight_bytes") else engine._weights.nbytes
    assert said[1] > packed + weight_bytes(decoder, torch.bfloat16)
