"""What the target says of an output, after the fact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ssv.runtime.decode.logits_processor import Columns, Edit, LogitsProcessor, processed
from ssv.runtime.engines.contract import Engine


@dataclass(frozen=True, slots=True)
class Audit:
    """Emitted tokens that the target, given the same prefix, would not have chosen greedily.

    Attributes:
        strict: any other argmax. `margin`: only where it prefers its argmax by more than 1 nat, which leaves near-ties
            out.
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
        processor: Callable[[], LogitsProcessor | None] = lambda: None,
    ) -> None:
        """Args:
        chunk: tokens of a step.
        processor: makes what the request changed of the target's logits, where nothing has been said.
        """
        self.num_tokens, self._new_processor, self._num_prompt = len(output_ids), processor, len(prompt_ids)
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
        logits_RV = processed(out.logits_RV, self._edits(rows_R.tolist()), Columns())
        emitted_R1 = self._tokens[rows_R + 1, None].to(logits_RV.device)
        gap_R = logits_RV.amax(dim=1) - logits_RV.gather(1, emitted_R1)[:, 0] if len(rows_R) else torch.zeros(0)
        self._strict += int((gap_R > 0).sum())
        self._margin += int((gap_R > 1).sum())
        self._done = stop
        return Audit(self._strict, self._margin) if stop == len(self._tokens) - 1 else None

    def _edits(self, rows: Sequence[int]) -> list[Edit | None]:
        """What the request changed of the logits behind some of its tokens."""
        if self._processor is None:
            return []
        tokens = self._tokens.tolist()
        return [self._processor.edit(tokens[: row + 1], (), row + 1 - self._num_prompt) for row in rows]


def audit(target: Engine, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Audit:
    """Audits at once, in cache row 0, which is overwritten."""
    found = RunningAudit(prompt_ids, output_ids, len(prompt_ids) + len(output_ids)).step(target, 0)
    assert found is not None
    return found
