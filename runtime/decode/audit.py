"""What the target says of an output, after the fact. An output that is to be audited while it is decoded has the same
found in its passes (`ssv.runtime.decode.round`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssv.runtime.decode.logits_processor import Columns, processed, processor_of
from ssv.runtime.decode.sampling import Sampling, gaps
from ssv.runtime.engines.contract import Engine
from ssv.runtime.request import Audit, SamplingParams

_GREEDY = SamplingParams()


def audit(
    target: Engine, prompt_ids: Sequence[int], output_ids: Sequence[int], params: SamplingParams = _GREEDY
) -> Audit:
    """Audits an output that was asked for with `params`, in cache row 0, which is overwritten."""
    tokens, num_prompt = [*prompt_ids, *output_ids], len(prompt_ids)
    positions = range(num_prompt, len(tokens))
    tokens_1T = torch.tensor([tokens])
    out = target.step(tokens_1T[:, :-1], torch.zeros(1, dtype=torch.int32), torch.tensor(positions) - 1)
    processor = processor_of(params, prompt_ids, ())
    edits = [processor.edit(tokens[:at], (), at - num_prompt) for at in positions] if processor is not None else []
    logits_RV = processed(out.logits_RV, edits, Columns())
    return Audit.of(gaps(logits_RV, Sampling.of([params] * len(positions), positions), tokens_1T[0, num_prompt:]))
