"""How probable the target finds a text: what benchmarks of multiple choice and perplexity ask for.

It does not depend on how the target's own texts are decoded, drafted or trusted: only the target is asked.

Shapes: R gathered rows, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssv.runtime.engines.contract import Engine


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What the target says of the end of a text.

    Attributes:
        logprob: natural logarithm of its probability, given what stands before it.
        is_greedy: whether greedy decoding gives it.
    """

    logprob: float
    is_greedy: bool


class Likelihoods:
    """Likelihoods of texts, one after the other, in cache row 0 of an idle target, which is overwritten.

    What a text has in common with the beginning of the one before is not run again: answers to one question.
    """

    def __init__(self, target: Engine, chunk: int) -> None:
        """Asks a target that runs nothing else meanwhile.

        Args:
            chunk: tokens of a step.
        """
        self._target, self._chunk = target, chunk
        self._held: list[int] = []

    def of(self, token_ids: Sequence[int], first: int) -> Likelihood:
        """The likelihood of a text's tokens from place `first` on, which is 1 or more.

        Raises:
            EngineError: a text longer than the cache.
        """
        assert 1 <= first < len(token_ids)
        ids = list(token_ids[:-1])  # behind the last token nothing is asked
        same = next((i for i, (a, b) in enumerate(zip(self._held, ids, strict=False)) if a != b), len(self._held))
        start = min(same, len(ids), first - 1)
        self._held = self._held[:start]
        logprob, is_greedy = 0.0, True
        for begin in range(start, len(ids), self._chunk):
            end = min(begin + self._chunk, len(ids))
            rows_R = torch.arange(min(max(first - 1, begin), end), end)
            out = self._target.step(
                torch.tensor([ids[begin:end]]), torch.tensor([begin], dtype=torch.int32), rows_R - begin
            )
            self._held += ids[begin:end]
            if len(rows_R):
                logits_RV = out.logits_RV.double().cpu()
                next_R = torch.tensor(token_ids[int(rows_R[0]) + 1 : end + 1])
                logprob_R = logits_RV.gather(1, next_R[:, None])[:, 0] - logits_RV.logsumexp(dim=1)
                logprob += float(logprob_R.sum())
                is_greedy = is_greedy and bool((logits_RV.argmax(dim=1) == next_R).all())
        return Likelihood(logprob, is_greedy)
