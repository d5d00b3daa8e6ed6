"""What the target says of an output, after the fact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssv.runtime.decode.logits_processor import Columns, Edit, LogitsProcessor, processed, processor_of
from ssv.runtime.decode.sampling import Sampling, choose, scores
from ssv.runtime.engines.contract import Engine
from ssv.runtime.request import SamplingParams

_GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True)
class Audit:
    """Emitted tokens that the target, given the same prefix and, of sampled output, the same noise, would not have
    chosen.

    Attributes:
        strict: any other choice.
        margin: only where it prefers its own by more than 1 nat, which leaves near-ties out.
    """

    strict: int
    margin: int


class RunningAudit:
    """An audit of one output, a chunk at a time, in a cache row that nobody uses.

    Attributes:
        num_tokens: of the output.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        chunk: int,
        *,
        params: SamplingParams = _GREEDY,
        processor: Callable[[], LogitsProcessor | None] = lambda: None,
    ) -> None:
        """Args:
        chunk: tokens of a step.
        params: what the output was asked for with.
        processor: makes what the request changed of the target's logits, where nothing has been said.
        """
        self._params, self._new_processor, self._num_prompt = params, processor, len(prompt_ids)
        self.num_tokens = len(output_ids)
        self._tokens, self._first, self._chunk = torch.tensor([*prompt_ids, *output_ids]), len(prompt_ids) - 1, chunk
        self.restart()

    def restart(self) -> None:
        """Begins again, in whatever row comes next."""
        self._done = self._strict = self._margin = 0
        self._processor = self._new_processor()

    def step(self, target: Engine, row: int) -> Audit | None:
        """Runs the next chunk, in the row of the one before; returns what was found when that was the last."""
        start, stop = self._done, min(self._done + self._chunk, len(self._tokens) - 1)
        rows_R = torch.arange(min(max(self._first, start), stop), stop)
        at = torch.tensor([start], dtype=torch.int32)
        out = target.step(self._tokens[None, start:stop], at, rows_R - start, first_row=row)
        if len(rows_R):
            self._compare(processed(out.logits_RV, self._edits(rows_R.tolist()), Columns()), rows_R + 1)
        self._done = stop
        return Audit(self._strict, self._margin) if stop == len(self._tokens) - 1 else None

    def _edits(self, rows: Sequence[int]) -> list[Edit | None]:
        """What the request changed of the logits behind some of its tokens."""
        if self._processor is None:
            return []
        tokens = self._tokens.tolist()
        return [self._processor.edit(tokens[: row + 1], (), row + 1 - self._num_prompt) for row in rows]

    def _compare(self, logits_RV: Tensor, position_R: Tensor) -> None:
        """Counts the tokens, at some places of the text, that are not what the logits choose there."""

        def sampling(position_R: Tensor) -> Sampling:
            return Sampling.of([self._params] * len(position_R), position_R.tolist())

        other_R = (choose(logits_RV, sampling(position_R)).cpu() != self._tokens[position_R]).nonzero()[:, 0]
        if not len(other_R):
            return
        score_RV = scores(logits_RV[other_R.to(logits_RV.device)], sampling(position_R[other_R]))
        emitted_R1 = self._tokens[position_R[other_R], None].to(score_RV.device)
        gap_R = score_RV.amax(dim=1) - score_RV.gather(1, emitted_R1)[:, 0]
        self._strict += int((gap_R > 0).sum())
        self._margin += int((gap_R > 1).sum())


def audit(
    target: Engine, prompt_ids: Sequence[int], output_ids: Sequence[int], params: SamplingParams = _GREEDY
) -> Audit:
    """Audits at once, in cache row 0, which is overwritten."""
    chunk = len(prompt_ids) + len(output_ids)
    running = RunningAudit(
        prompt_ids, output_ids, chunk, params=params, processor=lambda: processor_of(params, prompt_ids, ())
    )
    found = running.step(target, 0)
    assert found is not None
    return found
