"""Who drafts, and the four numbers that decide when a draft is verified."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssv.support.strict import Strict

MAX_PENDING = 32
"""Most tokens that may be pending. Engines need this much cache beyond the longest sequence, for padding."""

RESERVED_LENGTH = 2 * MAX_PENDING
"""Tokens of each row of a cache that no sequence can have: room for what is pending, and for its padding."""

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Policy(Strict):
    """When drafted tokens are trusted, and when the target is asked.

    With r the scorer's probability that the target would reject a token:

    Attributes:
        drafter: who proposes tokens, see `ssv.runtime.decode.drafters`.
        accept_below: r below it: trusted, committed without being judged. 0 trusts nothing, which is lossless.
        verify_above: r above it: critical, asks for a target pass now.
        risk_budget: a pass also runs when 1 - prod(1 - r) over the pending, not trusted tokens exceeds it. 1 never
            does.
        max_pending: and when so many tokens are pending. 0 drafts nothing: autoregressive decoding.
    """

    drafter: Literal["model", "prompt-lookup"] = "model"

    accept_below: Probability
    verify_above: Probability
    risk_budget: Probability
    max_pending: Annotated[int, Field(ge=0)]

    @property
    def lossless(self) -> bool:
        """Whether output is plain decoding's, token for token, greedy or sampled."""
        return self.accept_below == 0.0 or self.max_pending == 0
