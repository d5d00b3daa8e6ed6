"""Log-probabilities of tokens under the target, as its logits are: before temperature, penalties and everything else
that a request changes of them.

Shapes: V vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssv.runtime.request import TokenLogprobs

MIN_LOGPROB = -9999.0
"""In place of minus infinity, which JSON has not; as OpenAI has it."""


def logprobs_of(logits_V: Tensor, token: int, num_top: int) -> TokenLogprobs:
    """The log-probability of a token, and the likeliest tokens with theirs.

    It depends on the row alone: rows are summed one by one, in double precision.
    """
    logits_V = logits_V.double()
    logprob_V = logits_V - logits_V.logsumexp(dim=0)
    top = torch.topk(logprob_V, min(num_top, len(logprob_V)))
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprobs(
        token,
        max(float(logprob_V[token]), MIN_LOGPROB),
        tuple((each, max(logprob, MIN_LOGPROB)) for each, logprob in likeliest),
    )
