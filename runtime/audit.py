"""What the target says of an output, after the fact.

May import: ssv.runtime.engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssv.runtime.engine import Engine


@dataclass(frozen=True, slots=True)
class Audit:
    """Emitted tokens that the target, given the same prefix, would not have chosen greedily.

    Attributes:
        strict: any other argmax. `margin`: only where it prefers its argmax by more than 1 nat, which leaves near-ties out.
    """

    strict: int
    margin: int


def audit(target: Engine, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Audit:
    """Runs one full target pass over prompt and output (in cache row 0, which is overwritten)."""
    tokens = torch.tensor([*prompt_ids, *output_ids])
    first = len(prompt_ids) - 1
    rows = torch.arange(first, first + len(output_ids))
    logits_RV = target.step(tokens[None, :-1], torch.zeros(1, dtype=torch.int32), rows).logits_RV
    emitted_R1 = tokens[len(prompt_ids) :, None].to(logits_RV.device)
    gap_R = logits_RV.amax(dim=1) - logits_RV.gather(1, emitted_R1)[:, 0]
    return Audit(strict=int((gap_R > 0).sum()), margin=int((gap_R > 1).sum()))
