"""The ways to decode, by name. Each is a `Policy`; one loop (`ssv.runtime.decode.batch`) runs them all, mixed in one batch."""

from __future__ import annotations

from collections.abc import Mapping

from ssv.bundle.policy import Policy
from ssv.runtime.request import RequestError
from ssv.runtime.strategies.autoregressive import AUTOREGRESSIVE
from ssv.runtime.strategies.speculative import speculative
from ssv.runtime.strategies.ssv import TIERS, tier_policy

METHODS = ("autoregressive", "speculative", *TIERS)


def policy_for(method: str, tiers: Mapping[str, Policy], num_draft_tokens: int = 5) -> Policy:
    """The policy of a method.

    Args:
        tiers: the bundle's tiers.
        num_draft_tokens: of `speculative`.

    Raises:
        RequestError: unknown method, or a tier that the bundle was not calibrated for.
    """
    if method == "autoregressive":
        return AUTOREGRESSIVE
    if method == "speculative":
        return speculative(num_draft_tokens)
    if method in TIERS:
        return tier_policy(method, tiers)
    raise RequestError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
