"""Prompts that the host does not wait for: long ones on a stream of their own, where rounds go on meanwhile, at half
their pace; short ones between two rounds, on the stream of these."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ssv.runtime.engines.cuda.engine import CudaEngine
from ssv.runtime.engines.cuda.launching import MOST_GATHERED
from ssv.runtime.engines.cuda.places import MANY_TOKENS


class CudaLane:
    """See `PromptLane`."""

    # Shorter ones are a few passes, which take as long while rounds run, and make these slower meanwhile.
    least = 257

    def __init__(self, target: CudaEngine, draft: CudaEngine, most_tokens: int = MANY_TOKENS) -> None:
        self.most_tokens = most_tokens
        self.most_rows = self.rows_beside(target.max_batch)
        self.target, self.draft = target.beside(self.most_rows), draft.beside(1)
        self._own = self._stream = torch.cuda.Stream(target.device)
        self._handed_over = torch.cuda.Event()
        self._handed_over.record(torch.cuda.current_stream(target.device))
        self._ends: deque[torch.cuda.Event] = deque()

    @staticmethod
    def rows_beside(max_batch: int) -> int:
        """Rows of the target's cache beside one of so many rows: where these are many, several prompts wait for one."""
        return min(MOST_GATHERED, max(max_batch // 8, 1))

    @property
    def num_under_way(self) -> int:
        while self._ends and self._ends[0].query():
            self._ends.popleft()
        return len(self._ends)

    @contextmanager
    def work(self) -> Iterator[None]:
        """See `PromptLane.work`."""
        # Also memory of the stream that was handed over, and given back since, is used again only behind that.
        self._stream.wait_event(self._handed_over)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            end = torch.cuda.Event()
            end.record(self._stream)
            self._ends.append(end)

    def wait(self) -> None:
        """See `PromptLane.wait`."""
        self._ends.popleft().synchronize()

    def reset(self) -> None:
        """See `PromptLane.reset`."""
        while self._ends:
            self.wait()

    def hand_over(self, num_tokens: int) -> None:
        """See `PromptLane.hand_over`."""
        rounds = torch.cuda.current_stream(self.target.device)
        self._handed_over.record(rounds)
        self._stream = self._own if num_tokens >= self.least else rounds
