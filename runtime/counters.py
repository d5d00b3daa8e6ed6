"""What a request cost: the counters of every comparison; and what engines hold of a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(slots=True)
class Counters:
    """Counts of one request, or sums over several.

    Attributes:
        requests: how many these counts are of.
        prompt_tokens: length of the prompts.
        cached_tokens: of the prompts, those whose keys and values were there from a request before.
        emitted: output tokens.
        drafted: tokens proposed by the draft.
        judged: drafted tokens that the target judged.
        accepted: judged tokens that it kept.
        trusted: emitted tokens that the target never judged.
        typical: judged tokens that it kept as typical, although its own choice was another one.
        rolled_back: drafted tokens that were dropped.
        target_passes: target steps after the prompt's.
        target_tokens: tokens that went through those steps.
        queue_s: seconds from arrival until the prompt's turn.
        first_token_s: seconds from arrival to the first token (TTFT).
        total_s: seconds from arrival to the last token.
        passes_by_kept: target passes, by how many of their drafted tokens were kept.
    """

    requests: int = 1
    prompt_tokens: int = 0
    cached_tokens: int = 0
    emitted: int = 0
    drafted: int = 0
    judged: int = 0
    accepted: int = 0
    trusted: int = 0
    typical: int = 0
    rolled_back: int = 0
    target_passes: int = 0
    target_tokens: int = 0
    queue_s: float = field(default=0.0, compare=False)
    first_token_s: float = 0.0
    total_s: float = 0.0
    passes_by_kept: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: Counters) -> Counters:
        return Counters(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def acceptance_rate(self) -> float:
        """Share of the judged tokens that the target kept; 0 when none was judged."""
        return self.accepted / self.judged if self.judged else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens emitted per target pass (acceptance length).

        A request's first token does not count: the prompt's own step gives it.
        """
        return (self.emitted - self.requests) / self.target_passes if self.target_passes else 0.0

    @property
    def kept_by_depth(self) -> list[float]:
        """Share of the target passes that kept their first drafted token, their second, and so on, to the deepest that
        any kept.
        """
        deepest = max((kept for kept, passes in self.passes_by_kept.items() if passes), default=0)
        return [
            sum(passes for kept, passes in self.passes_by_kept.items() if kept >= depth) / self.target_passes
            for depth in range(1, deepest + 1)
        ]

    @property
    def kept_per_pass(self) -> list[int]:
        """How many target passes kept no drafted token, one, two, and so on, to the most that any kept."""
        most = max((kept for kept, passes in self.passes_by_kept.items() if passes), default=-1)
        return [self.passes_by_kept[kept] for kept in range(most + 1)]

    def to_dict(self) -> dict[str, Any]:
        """All counts by name, as JSON can hold them."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"passes_by_kept": dict(self.passes_by_kept)}


@dataclass(frozen=True, slots=True)
class GpuUse:
    """What engines have on their GPU.

    Attributes:
        reserved, peak: bytes that torch's allocator holds now, and has held at the most.
        in_use: bytes of the GPU's memory that are not free, whoever has them: graphs, kernels and contexts, which are
            not the allocator's, and other processes too.
        graphs: CUDA graphs that were captured.
    """

    reserved: int
    peak: int
    in_use: int
    graphs: int
