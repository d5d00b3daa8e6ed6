"""One row of a batch: the settings of its request, its tokens, and how far everybody has come with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ssv.bundle.policy import Policy
from ssv.runtime.counters import Counters
from ssv.runtime.decode.verify import asks_for_pass
from ssv.runtime.request import SamplingParams


@dataclass(slots=True)
class Row:
    """Settings and state of one row.

    Attributes:
        would_stop: whether drafted token ids would complete a stop string.
        tokens: those the target has seen, one more that it has not, then the pending ones.
        target_length, draft_length: entries in the engines' caches.
        reject_prob: of each pending token.
        released: pending tokens that have already left, being trusted like all before them.
    """

    params: SamplingParams
    policy: Policy
    would_stop: Callable[[Sequence[int]], bool]
    counters: Counters
    tokens: list[int] = field(default_factory=list)
    target_length: int = 0
    draft_length: int = 0
    reject_prob: list[float] = field(default_factory=list)
    released: int = 0
    last_commit: float = 0.0

    def __post_init__(self) -> None:
        # Probabilities are fp32: a threshold must be the same number beside a tensor and beside a float.
        names = ("accept_below", "verify_above", "risk_budget")
        rounded = torch.tensor([getattr(self.policy, name) for name in names]).tolist()
        self.policy = self.policy.model_copy(update=dict(zip(names, rounded, strict=True)))

    @property
    def pending(self) -> list[int]:
        """Token ids drafted since the last pass."""
        return self.tokens[self.target_length + 1 :]

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.target_length - 1

    def unseen(self, width: int) -> list[int]:
        """What the target has not seen, padded on the right to `width` tokens."""
        return padded(self.tokens, self.target_length, width)

    def output_index(self, ahead: int) -> int:
        """Tokens of the output before one that is chosen after `ahead` others of this round."""
        return self.counters.emitted - self.released + ahead

    def propose(self, token: int, reject_prob: float = 0.0) -> None:
        """Adds a drafted token to the pending ones."""
        self.tokens.append(token)
        self.reject_prob.append(reject_prob)
        self.counters.drafted += 1

    def asks_for_pass(self, limit: int, eos_ids: frozenset[int]) -> bool:
        """Whether it asks for a target pass now: by its policy, because its draft came to an end, or because its caller waits too long.

        Args:
            limit: most tokens that may be pending.
        """
        if asks_for_pass(self.reject_prob, self.policy, limit):
            return True
        if self.tokens[-1] in eos_ids and not self.params.ignore_eos:
            return True
        if self.params.stop and self.would_stop(self.pending):
            return True
        return self.params.max_delay is not None and time.monotonic() - self.last_commit >= self.params.max_delay


def padded(tokens: Sequence[int], start: int, width: int) -> list[int]:
    """`width` tokens from `start` on, padded on the right."""
    found = list(tokens[start : start + width])
    return found + [0] * (width - len(found))
