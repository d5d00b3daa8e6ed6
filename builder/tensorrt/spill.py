"""Tensors in a file instead of memory, at addresses that stay readable.

TensorRT wants the address of every constant until an engine is built, and reads each of them once or twice. Behind
read-only maps of a file they need no memory in between: what is let go comes back from the file when it is read.
"""

from __future__ import annotations

import mmap
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_SMALL = 1 << 16
"""Bytes below which a tensor stays in memory."""


class Spill:
    """A nameless file in a folder, which vanishes with the object."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the object
        self._maps: list[tuple[mmap.mmap, np.ndarray]] = []
        self._small: list[np.ndarray] = []

    def address(self, tensor: Tensor) -> int:
        """Address of a copy of a tensor's bytes, valid as long as this object is there.

        Raises:
            OSError: no space left.
        """
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        if content.nbytes < _SMALL:
            self._small.append(content)
            return int(content.ctypes.data)
        start = -(-self._file.seek(0, 2) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file.seek(start)
        self._file.write(content.data)
        self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), content.nbytes, access=mmap.ACCESS_READ, offset=start)
        view = np.frombuffer(mapped, dtype=np.uint8)
        self._maps.append((mapped, view))
        return int(view.ctypes.data)

    @contextmanager
    def not_in_memory(self, seconds: float = 0.01) -> Iterator[None]:
        """Keeps freeing, while the block runs, the memory of what has been read from the file.

        What is freed stays readable. `seconds` lie between two times.
        """
        done = threading.Event()
        thread = threading.Thread(target=lambda: self._let_go_until(done, seconds), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _let_go_until(self, done: threading.Event, seconds: float) -> None:
        while not done.wait(seconds):
            for mapped, _ in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)
