"""A lane for prompts over fakes: its work is done at once, and it does not say so before it was asked some times."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fakes import FakeDraft, FakeTarget, _TokenCache


class FakeLane:
    """See `PromptLane`.

    Attributes:
        num_works: pieces of work so far.
        num_waits: of the host, for one of them.
    """

    def __init__(
        self,
        target: FakeTarget,
        draft: FakeDraft | None = None,
        *,
        patience: int = 2,
        least: int = 0,
        most_rows: int = 1,
        most_tokens: int = 1,
    ) -> None:
        """Begins without work.

        Args:
            patience: how often a piece of work is asked for before it has ended.
            least, most_rows, most_tokens: see `PromptLane`.
        """
        self.most_rows, self.most_tokens = most_rows, most_tokens
        self.target = _beside(target, self, most_rows)
        self.draft = None
        if draft is not None:
            self.draft = _beside(draft, self, 1)
            self.draft.target = self.target
        self._patience, self._left, self.least = patience, list[int](), least
        self.num_works = self.num_waits = 0
        self.is_working = self._is_taken = False

    @property
    def num_under_way(self) -> int:
        if self._left:
            self._left[0] -= 1
        while self._left and self._left[0] < 0:
            self._left.pop(0)
        return len(self._left)

    @contextmanager
    def work(self) -> Iterator[None]:
        assert not self._is_taken, "what is still to be taken would be overwritten"
        self.is_working = True
        yield
        self.is_working = False
        self.num_works += 1
        self._left.append(self._patience)

    def wait(self) -> None:
        self._left.pop(0)
        self.num_waits += 1

    def reset(self) -> None:
        self._left.clear()
        self._is_taken = False

    def hand_over(self, num_tokens: int) -> None:
        assert not self._left, "the work of a prompt that nobody waits for"
        self._is_taken = False

    def note_read(self) -> None:
        """Somebody reads a cache."""
        if not self.is_working:
            assert not self._left, "read while it is written"
            self._is_taken = True


def _beside(engine: Any, lane: FakeLane, num_rows: int) -> Any:
    """An engine of the same tables over a cache of its own."""
    other = copy.copy(engine)
    other.max_batch = num_rows
    other.cache = _TokenCache(num_rows, engine.max_length, engine.cache.vocab_size, engine.cache.weight_S)
    for name in ("steps_B", "features_BSF", "written_BS"):
        if hasattr(engine, name):
            setattr(other, name, torch.zeros_like(getattr(engine, name)[:num_rows]))

    def step(*args: Any, **options: Any) -> Any:
        assert lane.is_working
        return type(engine).step(other, *args, **options)

    def read_cache(row: int, start: int, stop: int) -> Any:
        lane.note_read()
        return type(engine).read_cache(other, row, start, stop)

    other.step, other.read_cache = step, read_cache
    return other
