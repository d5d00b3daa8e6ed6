"""The seam below the service: whoever decodes requests, with whatever engines.

This project's own loop over the rows of a batch (`ssv.runtime.decode.loop`) does, and so does an engine of somebody
else's (`ssv.runtime.trtllm`). What is above does not know which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ssv.bundle.policy import Policy
from ssv.runtime.decode.prompt_cache import CacheStats
from ssv.runtime.request import Chunk, Request
from ssv.runtime.text import TextStream


@dataclass(frozen=True, slots=True)
class Load:
    """What there is to do.

    Attributes:
        decoding, joining, waiting: requests that are.
        prompts: of the prompt cache.
    """

    decoding: int
    joining: int
    waiting: int
    prompts: CacheStats


class Generator(Protocol):
    """Decodes requests side by side. All is called from one thread, but for `load`.

    Attributes:
        max_rows: requests that it decodes at a time.
    """

    max_rows: int

    @property
    def has_work(self) -> bool:
        """Whether there are requests that have not ended."""
        ...

    @property
    def load(self) -> Load:
        """How much there is to do; read without a lock."""
        ...

    def check(self, request: Request, policy: Policy) -> None:
        """Raises RequestError if a request cannot run here."""
        ...

    def submit(
        self, index: int, request: Request, policy: Policy, text: TextStream | None, *, is_audited: bool = False
    ) -> None:
        """Queues a request; its chunks bear `index`.

        Args:
            policy: what it is decoded by.
            text: of a request whose chunks shall have text, or that has stop strings.
            is_audited: whether its last chunk shall say what the target would not have chosen; its output is the same.

        Raises:
            RequestError: it cannot be served.
            QueueFull: too many wait.
        """
        ...

    def cancel(self, index: int) -> None:
        """Ends a request in the next step, as "cancelled"; one that has ended stays as it is."""
        ...

    def abandon(self) -> list[int]:
        """Lets go of all requests, after a step has failed: nothing may be asked of it any more.

        Returns:
            Indices of those that nothing had been done for.
        """
        ...

    def step(self) -> Iterator[Chunk]:
        """Goes on for a while; yields what the requests gain as it comes. Has to be exhausted."""
        ...


class Host(Protocol):
    """An engine of somebody else's, with batches of its own.

    Attributes:
        methods: what it decodes by.
    """

    methods: tuple[str, ...]

    def generator(self, max_waiting: int | None) -> Generator:
        """Who decodes requests; there may be one at a time.

        Args:
            max_waiting: requests that may wait beside those that are decoded; None for no bound.
        """
        ...
