"""The ways to decode, by name. Each is a `Policy`; one loop (`ssv.runtime.decode.round`) runs them all, mixed in one batch."""

from __future__ import annotations

from collections.abc import Mapping

from ssv.bundle.policy import Policy
from ssv.runtime.request import RequestError

TIERS = ("premium", "balanced", "turbo")
"""Sparse speculative verification, by what a bundle was calibrated for: the scorer decides which drafted tokens are judged and when."""

BASELINES = ("autoregressive", "prompt-lookup", "medusa", "speculative")
"""What a bundle can be decoded by beside its tiers, lossless."""

NEEDS_HEADS = ("medusa",)
"""What takes a bundle with Medusa's heads."""

METHODS = (*BASELINES, *TIERS)
"""In the order of what they save, as a rule."""

AUTOREGRESSIVE = Policy(accept_below=0.0, verify_above=1.0, risk_budget=1.0, max_pending=0)
"""Plain decoding: the target makes every token. The baseline of every comparison."""

PROMPT_LOOKUP = Policy(drafter="prompt-lookup", accept_below=0.0, verify_above=1.0, risk_budget=1.0, max_pending=10)
"""What followed the same words before is proposed, as many tokens as its author does; no draft model is asked."""

MEDUSA = Policy(
    drafter="heads",
    accept_below=0.0,
    verify_above=1.0,
    risk_budget=1.0,
    max_pending=63,
    children=(10,),
    beam=10,
)
"""Medusa's heads propose a tree of their likeliest tokens, of the size that its authors use: 63 nodes, of the ten likeliest tokens of each
head (arXiv:2401.10774, `mc_sim_7b_63`). Theirs has one shape; this one has the nodes that are likeliest after the text at hand."""


def baselines(has_heads: bool) -> tuple[str, ...]:
    """Of `BASELINES` those that a bundle with or without heads can be decoded by."""
    return tuple(name for name in BASELINES if has_heads or name not in NEEDS_HEADS)


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
    if method == "prompt-lookup":
        return PROMPT_LOOKUP
    if method == "medusa":
        return MEDUSA
    if method not in TIERS:
        raise RequestError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if method not in tiers:
        has = ", ".join(tiers) or "none"
        raise RequestError(
            f"the bundle has no tier {method!r} (it has: {has}): calibrate it with `ssv-build calibrate`"
        )
    return tiers[method]


def speculative(num_draft_tokens: int) -> Policy:
    """Speculative decoding with a fixed number of drafted tokens, all of them judged (Leviathan et al. 2023, arXiv:2211.17192).

    Raises:
        RequestError: fewer than one.
    """
    if num_draft_tokens < 1:
        raise RequestError(f"num_draft_tokens {num_draft_tokens}: speculative decoding drafts at least 1 token")
    return Policy(accept_below=0.0, verify_above=1.0, risk_budget=1.0, max_pending=num_draft_tokens)
