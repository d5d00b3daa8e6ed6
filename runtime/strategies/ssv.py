"""Sparse speculative verification: the scorer decides which drafted tokens are judged and when."""

from collections.abc import Mapping

from ssv.bundle.policy import Policy
from ssv.runtime.request import RequestError

TIERS = ("premium", "balanced", "turbo")


def tier_policy(tier: str, tiers: Mapping[str, Policy]) -> Policy:
    """The bundle's policy of a tier.

    Raises:
        RequestError: the bundle has no such tier.
    """
    if tier not in tiers:
        has = ", ".join(tiers) or "none"
        raise RequestError(f"the bundle has no tier {tier!r} (it has: {has}): calibrate it with `ssv-build calibrate`")
    return tiers[tier]
