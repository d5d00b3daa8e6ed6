"""Which request is in which row, and who comes next. Imports no torch: it can be tested and reasoned about by itself.

Rows in use are always the first ones, because an engine step runs a run of rows: when a row ends, the last one moves into its place.

May import: nothing else of ssv.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Scheduler(Generic[T]):
    """First come, first served, into a fixed number of rows.

    Attributes:
        rows: what runs, by row.
        waiting: what does not yet.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.rows: list[T] = []
        self.waiting: deque[T] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self.rows or self.waiting)

    def submit(self, item: T) -> None:
        self.waiting.append(item)

    def admit(self) -> list[tuple[int, T]]:
        """Moves waiting items into free rows; returns (row, item) of each."""
        admitted = []
        while self.waiting and len(self.rows) < self.max_rows:
            self.rows.append(self.waiting.popleft())
            admitted.append((len(self.rows) - 1, self.rows[-1]))
        return admitted

    def finish(self, row: int) -> int:
        """Ends a row; returns the row whose state must be moved into it (itself when it was the last)."""
        last = len(self.rows) - 1
        self.rows[row] = self.rows[last]
        self.rows.pop()
        return last
