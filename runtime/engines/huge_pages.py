"""Memory for weights, which a decode step reads from end to end.

In pages of 4 KiB a 4-bit product of one row takes a seventh longer than in huge ones (`benchmarks/cpu_linear.py`): each
page costs a look-up, and the processor does not read ahead over its end.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_CHUNK = 32 << 20
_ALIGNMENT = 64


class _Memory:
    """Chunks that are handed out in pieces. A chunk is freed with the last of its pieces."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        rounded = -(-size // _ALIGNMENT) * _ALIGNMENT
        if rounded > len(self._left):
            self._left = _huge(max(rounded, _CHUNK))
        taken, self._left = self._left[:size], self._left[rounded:]
        return taken


def _huge(size: int) -> Tensor:
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Advice: a system without huge pages gives others.
    with contextlib.suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


_memory = _Memory()


def weight_memory(size: int) -> Tensor:
    """So many bytes, uint8, zeros."""
    return _memory.take(size)
