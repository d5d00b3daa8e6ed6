"""One row of a batch: the settings of its request, its text, what is drafted behind it, and how far everybody has come
with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ssv.bundle.policy import Policy
from ssv.runtime.counters import Counters
from ssv.runtime.decode.logits_processor import LogitsProcessor
from ssv.runtime.decode.tree import Tree
from ssv.runtime.decode.verify import asks_for_pass
from ssv.runtime.engines.contract import StepOutput
from ssv.runtime.request import SamplingParams, TokenFate, TokenLogprobs


@dataclass(frozen=True, slots=True)
class RunTogether:
    """A prompt that was run in one step with another's, whose row joined first.

    Attributes:
        is_beside: whether that was beside the rounds, in a cache of its own.
        at: the row of the cache.
        last: what its last token gives.
    """

    is_beside: bool
    at: int
    last: StepOutput


@dataclass(slots=True)
class Row:
    """Settings and state of one row.

    Attributes:
        would_stop: whether token ids that follow the text would complete a stop string.
        tokens: the text, prompt and output: those the target has seen, and one more that it has not, the root of the
            tree.
        tree: what is drafted behind it.
        processor: of its logits; None where its request changes none.
        logprobs, prompt_logprobs: of the output's and of the prompt's tokens, where the request asks for them, until
            they leave.
        fates: of the output's tokens, likewise.
        draft_length: entries of the text in the draft's cache.
        released: tokens of the tree's first path that have already left, being trusted like all before them.
        has_lost_draft: it has not drafted for so long that it will not again: what its draft would need is gone.
        ended: its output has come to its end, though it is still in use.
        audited: of a row that is audited, the drafted tokens of the text, by place, that the target's choices are ahead
            of, and by how much (see `ssv.runtime.decode.choice.gaps`).
        run_together: of its prompt, if that was run beside another's before the row joins.
        policy_hash: tells policies apart, at no cost in each round.
    """

    params: SamplingParams
    policy: Policy
    would_stop: Callable[[Sequence[int]], bool]
    counters: Counters
    tokens: list[int] = field(default_factory=list)
    tree: Tree = field(default_factory=Tree)
    processor: LogitsProcessor | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    fates: list[TokenFate] = field(default_factory=list)
    draft_length: int = 0
    released: int = 0
    has_lost_draft: bool = False
    ended: bool = False
    last_commit: float = 0.0
    audited: list[tuple[int, float]] | None = None
    run_together: RunTogether | None = None
    policy_hash: int = field(init=False)

    def __post_init__(self) -> None:
        # Probabilities are fp32: a threshold must be the same number beside a tensor and beside a float.
        names = ("accept_below", "verify_above", "risk_budget")
        rounded = torch.tensor([getattr(self.policy, name) for name in names]).tolist()
        self.policy = self.policy.model_copy(update=dict(zip(names, rounded, strict=True)))
        self.policy_hash = hash(self.policy)

    @property
    def lossless(self) -> bool:
        """Whether its output is plain decoding's."""
        return self.policy.lossless_for(greedy=self.params.greedy)

    @property
    def target_length(self) -> int:
        """Tokens that the target has seen, which is also the slot of the root."""
        return len(self.tokens) - 1

    @property
    def rest(self) -> int:
        """Tokens that a draft may add to the output: the pass itself gives one more."""
        return self.params.max_tokens - self.counters.emitted - 1

    @property
    def first_path(self) -> list[int]:
        """Token ids of the tree's first path."""
        return [self.tree.tokens[node] for node in self.tree.first_path]

    def unseen(self, width: int) -> list[int]:
        """What the target has not seen, root and tree, padded on the right to `width` tokens."""
        return padded((self.tokens[-1], *self.tree.tokens), 0, width)

    def output_index(self, ahead: int) -> int:
        """Tokens of the output before one that is chosen after `ahead` others of this round."""
        return self.counters.emitted - self.released + ahead

    def ends(self, eos_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that the output ends with."""
        eos_ids = frozenset() if self.params.ignore_eos else eos_ids
        return eos_ids.union(self.params.stop_token_ids) if self.params.stop_token_ids else eos_ids

    def asks_for_pass(self, limit: int, eos_ids: frozenset[int]) -> bool:
        """Whether it asks for a target pass now: by its policy, because its draft came to an end, or because its caller
        waits too long.

        Args:
            limit: most tokens that may be pending.
        """
        tree = self.tree
        if asks_for_pass(tree.risks, self.policy, limit):
            return True
        if tree.tokens and tree.tokens[-1] in self.ends(eos_ids):
            return True
        return bool(self.params.stop and self.would_stop(self.first_path)) or self.waits_too_long

    @property
    def waits_too_long(self) -> bool:
        """Whether its caller has waited for a token as long as it may."""
        bound = self.params.latency_bound_ms
        return bound is not None and 1e3 * (time.monotonic() - self.last_commit) >= bound


def padded(tokens: Sequence[int], start: int, width: int) -> list[int]:
    """`width` tokens from `start` on, padded on the right."""
    found = list(tokens[start : start + width])
    return found + [0] * (width - len(found))
