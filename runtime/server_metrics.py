"""The server's metrics: names, meanings, and how a request's counters become them. Imports no torch.

Names of judged tokens are those that dashboards for speculative decoding already have (vLLM's); trusted tokens are not among them.

May import: ssv.runtime.audit, .service, .stats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ssv.runtime.stats import Counters

if TYPE_CHECKING:
    from ssv.runtime.service import Load

COUNTERS = {
    "spec_decode_num_drafts": "Target passes that judged drafted tokens",
    "spec_decode_num_draft_tokens": "Drafted tokens that the target judged",
    "spec_decode_num_accepted_tokens": "Drafted tokens that the target judged and kept",
    "ssv_target_passes": "Target passes after the prompt's",
    "ssv_target_tokens": "Tokens that went through target passes after the prompt's",
    "ssv_tokens_verified": "Drafted tokens that the target judged",
    "ssv_tokens_trusted": "Emitted tokens that the target never judged",
    "ssv_tokens_rolled_back": "Drafted tokens that were dropped",
    "ssv_tokens_emitted": "Output tokens",
    "ssv_prompt_tokens": "Prompt tokens",
    "ssv_prompt_tokens_cached": "Prompt tokens whose keys and values were there from a request before",
    "ssv_first_token_seconds": "Seconds from submission to the first token, summed over requests",
    "ssv_request_seconds": "Seconds from submission to the last token, summed over requests",
    "ssv_audited_tokens": "Emitted tokens of lossy tiers that the target judged afterwards",
    "ssv_audit_mismatches": "Audited tokens that the target would not have chosen",
}
"""Counters, one for each tier (label `tier`)."""

REQUESTS = ("ssv_requests", "Requests that ended (labels: tier; reason stop, length, cancelled, deadline or error)")

GAUGES = {
    "ssv_requests_decoding": "Requests in a row",
    "ssv_requests_joining": "Requests whose prompt is being run",
    "ssv_requests_waiting": "Requests that wait for a row",
    "ssv_prompt_cache_bytes": "Memory that beginnings of prompts take",
    "ssv_prompt_cache_blocks": "Blocks of prompts held",
    "ssv_engine_alive": "1 while the engines work, 0 once one has failed",
}


def counts_of(counters: Counters) -> Mapping[str, float]:
    """What a finished request adds to the counters."""
    return {
        "spec_decode_num_drafts": counters.target_passes if counters.judged else 0,
        "spec_decode_num_draft_tokens": counters.judged,
        "spec_decode_num_accepted_tokens": counters.accepted,
        "ssv_target_passes": counters.target_passes,
        "ssv_target_tokens": counters.target_tokens,
        "ssv_tokens_verified": counters.judged,
        "ssv_tokens_trusted": counters.trusted,
        "ssv_tokens_rolled_back": counters.rolled_back,
        "ssv_tokens_emitted": counters.emitted,
        "ssv_prompt_tokens": counters.prompt_tokens,
        "ssv_prompt_tokens_cached": counters.cached_tokens,
        "ssv_first_token_seconds": counters.first_token_s,
        "ssv_request_seconds": counters.total_s,
    }


def gauges_of(load: Load, alive: bool) -> Mapping[str, float]:
    return {
        "ssv_requests_decoding": load.decoding,
        "ssv_requests_joining": load.joining,
        "ssv_requests_waiting": load.waiting,
        "ssv_prompt_cache_bytes": load.prompts.num_bytes,
        "ssv_prompt_cache_blocks": load.prompts.blocks,
        "ssv_engine_alive": float(alive),
    }
