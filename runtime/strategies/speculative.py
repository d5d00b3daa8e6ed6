"""Speculative decoding with a fixed number of drafted tokens, all of them judged (Leviathan et al. 2023, arXiv:2211.17192)."""

from ssv.bundle.policy import Policy
from ssv.runtime.request import RequestError


def speculative(num_draft_tokens: int) -> Policy:
    """The policy that drafts so many tokens a pass.

    Raises:
        RequestError: fewer than one.
    """
    if num_draft_tokens < 1:
        raise RequestError(f"num_draft_tokens {num_draft_tokens}: speculative decoding drafts at least 1 token")
    return Policy(accept_below=0.0, verify_above=1.0, risk_budget=1.0, max_pending=num_draft_tokens)
