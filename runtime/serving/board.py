"""Numbers that outlive the process that counts them: a file of doubles, mapped into memory, with one writer and any
readers.

A killed process loses nothing that it has counted, and its successor goes on counting in the same file. Aligned doubles
are written whole on every machine that the server runs on, so that a reader needs no lock.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Hashable, Sequence
from pathlib import Path


class Board:
    """Numbers by key. Threads of the writing process may share it."""

    def __init__(self, keys: Sequence[Hashable], path: Path | None = None) -> None:
        """Opens a board, or makes it.

        Args:
            keys: what is counted, in an order that all processes agree on.
            path: of the file, made if it is not there; None keeps the numbers in this process.

        Raises:
            ValueError: the file is of other keys.
        """
        self._places = {key: place for place, key in enumerate(keys)}
        num_bytes = 8 * len(keys)
        memory: mmap.mmap | bytearray = bytearray(num_bytes)
        if path is not None:
            with path.open("a+b") as file:
                if file.tell() == 0:
                    file.truncate(num_bytes)
                elif file.tell() != num_bytes:
                    raise ValueError(f"{path} has {file.tell()} bytes, not {num_bytes}: remove it")
                memory = mmap.mmap(file.fileno(), num_bytes)
        self._numbers = memoryview(memory).cast("d")
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> float:
        """A number."""
        return self._numbers[self._places[key]]

    def set(self, key: Hashable, value: float) -> None:
        """Sets a number."""
        self._numbers[self._places[key]] = value

    def add(self, key: Hashable, value: float = 1.0) -> None:
        """Adds to a number; threads may do so at the same time."""
        with self._lock:
            self._numbers[self._places[key]] += value
