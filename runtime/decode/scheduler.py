"""Which request is in which row, and who comes next. Imports no torch: it can be tested and reasoned about by itself.

Rows in use are always the first ones, because an engine step runs a run of rows: when a row ends, the last one moves
into its place. Each cache row has room for the longest request, so free rows are free cache: a request is admitted when
there is one. One request at a time joins: its prompt is run in the row behind the others, between their rounds, or
somewhere else, beside them and before a row is free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from ssv.support.errors import UserError

T = TypeVar("T")


class QueueFull(UserError):
    """As many requests wait as may; the message says how many that is."""


class Scheduler(Generic[T]):
    """First come, first served, into a fixed number of rows.

    Attributes:
        rows: what decodes, by row.
        joining: what is on its way into the next row.
        waiting: what is not yet.
        num_admitted: how many have been let join.
    """

    def __init__(
        self, max_rows: int, max_waiting: int | None = None, joins_early: Callable[[T], bool] = lambda _: False
    ) -> None:
        """Begins with all rows free.

        Args:
            max_waiting: beside those that the free rows take; None for no bound.
            joins_early: whether somebody may be on its way while no row is free.
        """
        self.max_rows, self.max_waiting, self._joins_early = max_rows, max_waiting, joins_early
        self.rows: list[T] = []
        self.joining: T | None = None
        self.waiting: deque[T] = deque()
        self.num_admitted = 0

    @property
    def has_work(self) -> bool:
        """Whether there are requests that have not ended."""
        return bool(self.rows or self.waiting) or self.joining is not None

    @property
    def can_admit(self) -> bool:
        """Whether somebody waits whom `admit` would let join."""
        if self.joining is not None or not self.waiting:
            return False
        return self.has_room or self._joins_early(self.waiting[0])

    @property
    def has_room(self) -> bool:
        """Whether a row is free."""
        return len(self.rows) < self.max_rows

    @property
    def is_filling(self) -> bool:
        """Whether a row is free, and somebody is there to take it."""
        return self.has_room and (self.joining is not None or bool(self.waiting))

    def submit(self, item: T) -> None:
        """Raises QueueFull."""
        free = max(self.max_rows - len(self.rows) - (self.joining is not None), 0)
        if self.max_waiting is not None and len(self.waiting) >= self.max_waiting + free:
            raise QueueFull(f"{len(self.waiting)} requests are waiting already", "try again later")
        self.waiting.append(item)

    def admit(self) -> T | None:
        """Lets the first of those that wait join, if none does and a row is free (or need not be); returns it."""
        if self.can_admit:
            self.joining = self.waiting.popleft()
            self.num_admitted += 1
            return self.joining
        return None

    def joined(self) -> None:
        """What joins decodes from now on, in the row behind the others."""
        assert self.joining is not None and self.has_room
        self.rows.append(self.joining)
        self.joining = None

    def abandon(self) -> None:
        """What joins does not."""
        self.joining = None

    def finish(self, row: int) -> int:
        """Ends a row; returns the row whose state must be moved into it (itself when it was the last)."""
        last = len(self.rows) - 1
        self.rows[row] = self.rows[last]
        self.rows.pop()
        return last

    def drop(self, leaves: Callable[[T], bool]) -> None:
        """Takes those that leave out of the queue."""
        self.waiting = deque(item for item in self.waiting if not leaves(item))
