"""Tensors behind file maps: the bytes at the addresses are theirs, also after the memory has been let go."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import pytest
import torch

from ssv.builder.tensorrt.spill import Spill


@pytest.mark.parametrize("count", [1, 3, 1 << 14, (1 << 17) + 5])
def test_bytes_stay_readable(count: int, tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    tensors = [torch.randn(count), torch.arange(count, dtype=torch.int64), torch.randn(count).to(torch.float8_e4m3fn)]
    addresses = [spill.address(tensor) for tensor in tensors]
    expected = [bytes(tensor.view(torch.uint8).numpy()) for tensor in tensors]
    with spill.not_in_memory(seconds=0.001):
        for _ in range(3):
            assert [ctypes.string_at(a, len(e)) for a, e in zip(addresses, expected, strict=True)] == expected
            time.sleep(0.005)


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    Spill(tmp_path).address(torch.zeros(1 << 16))
    assert not list(tmp_path.iterdir())
