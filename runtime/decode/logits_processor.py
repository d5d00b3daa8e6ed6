"""What a request changes of its logits before a token is chosen: a bias, penalties on what the text has already, tokens
that may not be chosen, and min-p.

It is part of the target's own choice at every node of a tree, where the text is that of the node's own path, so that
every lossless method gives plain decoding's text. A draft's logits are changed alike, so that it proposes what the
target may choose.

The order is vLLM's: the bias; the penalty on repetition (Keskar et al. 2019, arXiv:1909.05858); those on frequency and
presence, of the output alone; tokens that may not be chosen, by the output's grammar or by name; min-p (Nguyen et al.
2024, arXiv:2407.01082), before top-k and top-p.

Shapes: R rows of logits, V columns, P tokens that are penalised.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ssv.runtime.grammar import GrammarState, TokenMask
from ssv.runtime.request import SamplingParams

_NO_TOKENS = np.empty(0, dtype=np.int64)


class Columns:
    """Which tokens the columns of logits are.

    Attributes:
        ids_V: int64, of each column; None where a column is its token.
    """

    def __init__(self, ids_V: Tensor | None = None) -> None:
        self.ids_V = ids_V
        self._column: np.ndarray | None = None

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Columns of tokens; -1 of those that have none."""
        if self.ids_V is None:
            return ids
        if self._column is None:
            own = self.ids_V.cpu().numpy()
            self._column = np.full(int(own.max()) + 1, -1)
            self._column[own] = np.arange(len(own))
        known = ids < len(self._column)
        return np.where(known, self._column[np.where(known, ids, 0)], -1)


@dataclass(frozen=True, slots=True)
class Edit:
    """What is changed of one row of logits. Arrays of tokens have each token once.

    Attributes:
        biased, bias: tokens, and what is added to their logits, fp32.
        penalised_P: tokens that the text has.
        repetition: what their logits are divided by, or multiplied with where they are below 0.
        taken_P: what is taken from them then, fp32.
        allowed: tokens that can be chosen; None for all.
        banned: tokens that cannot be chosen.
        least: the distance below the largest logit at which those begin that cannot be chosen either.
    """

    biased: np.ndarray
    bias: np.ndarray
    penalised_P: np.ndarray
    repetition: float
    taken_P: np.ndarray
    allowed: TokenMask | None
    banned: np.ndarray
    least: float


class LogitsProcessor:
    """What one request changes, as its text grows."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        eos_ids: Collection[int],
        grammar: GrammarState | None = None,
    ) -> None:
        """Begins an output.

        Args:
            eos_ids: which, like the request's own stop tokens, cannot be chosen before its `min_tokens`.
            grammar: of the output, where nothing has been said; None for any text.
        """
        self._params, self._grammar = params, grammar
        self._biased = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
        self._bias = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        self._ends = np.array(sorted({*eos_ids, *params.stop_token_ids}), dtype=np.int64)
        self._banned = np.array(sorted({ids[0] for ids in params.bad_token_ids if len(ids) == 1}), dtype=np.int64)
        # Last tokens of those sequences that are longer, by what comes before them.
        self._bad: dict[tuple[int, ...], list[int]] = {}
        for *before, last in (ids for ids in params.bad_token_ids if len(ids) > 1):
            self._bad.setdefault(tuple(before), []).append(last)
        self._penalises_output = params.presence_penalty != 0 or params.frequency_penalty != 0
        self._penalises = self._penalises_output or params.repetition_penalty != 1
        self._least = -math.inf
        if params.min_p > 0 and not params.greedy:
            self._least = float(np.float32(params.temperature * math.log(params.min_p)))
        # How often the output has each token that is penalised, and where that token stands among them.
        self._num_prompt = self._num_tokens = len(prompt_ids)
        known = dict.fromkeys(prompt_ids) if params.repetition_penalty != 1 else {}
        self._place = {token: place for place, token in enumerate(known)}
        self._count = [0] * len(known)
        self._penalised_P, self._count_P = _NO_TOKENS, np.empty(0, dtype=np.float32)
        self._is_stale = True

    def edit(self, tokens: Sequence[int], path: Sequence[int], num_output: int) -> Edit | None:
        """What is changed of the logits of one token; None for nothing.

        Args:
            tokens: prompt and output, as far as it is settled: as many as before, or more.
            path: what follows them and is not settled.
            num_output: tokens of the output before the one that is chosen; more than is known where a guess is made
                without knowing what comes before it.
        """
        params, num_prompt = self._params, self._num_prompt
        allowed = None
        # A grammar says what follows a text, and nothing of what follows one that is not known.
        if self._grammar is not None and num_output == len(tokens) - num_prompt + len(path):
            allowed = self._grammar.allowed(tokens[num_prompt:], path)
        banned = self._banned
        if self._bad:
            banned = np.union1d(banned, self._completing([*tokens[num_prompt:], *path]))
        if num_output < params.min_tokens:
            banned = np.union1d(banned, self._ends)
        penalised_P, taken_P = _NO_TOKENS, self._count_P[:0]
        if self._penalises:
            penalised_P, count_P = self._counted(tokens, path)
            taken_P = np.float32(params.frequency_penalty) * count_P + np.float32(params.presence_penalty) * (
                count_P > 0
            )
        named = len(penalised_P) or len(banned) or len(self._biased)
        if not named and allowed is None and self._least == -math.inf:
            return None
        repetition = params.repetition_penalty
        return Edit(self._biased, self._bias, penalised_P, repetition, taken_P, allowed, banned, self._least)

    def is_idle(self, num_output: int) -> bool:
        """Whether it changes nothing from so many tokens of the output on."""
        return self._grammar is None and self._only_masks(num_output)

    def may_keep(self, num_output: int) -> bool:
        """Whether what would be chosen of unchanged logits is chosen of the changed ones too, if it is allowed: nothing
        but a grammar changes them, and no other token's absence lets further ones in, as with top-k and top-p."""
        params = self._params
        return self._only_masks(num_output) and (params.greedy or (params.top_k == 0 and params.top_p == 1))

    def keeps(self, tokens: Sequence[int], path: Sequence[int], num_output: int, token: int) -> bool:
        """Whether a token that is chosen of unchanged logits is allowed, where `may_keep` says so; arguments as for
        `edit`."""
        if self._grammar is None or num_output != len(tokens) - self._num_prompt + len(path):
            return True
        return token >= 0 and self._grammar.accepts(tokens[self._num_prompt :], path, token) is not False

    def _only_masks(self, num_output: int) -> bool:
        """Whether nothing but a grammar changes logits from so many tokens of the output on."""
        lasting = len(self._biased) or len(self._banned) or self._bad or self._penalises
        return not lasting and self._least == -math.inf and num_output >= self._params.min_tokens

    def forced(self, tokens: Sequence[int]) -> list[int]:
        """Tokens behind the settled ones that the grammar leaves no choice for."""
        return [] if self._grammar is None else self._grammar.forced(tokens[self._num_prompt :])

    def allows(self, tokens: Sequence[int], path: Sequence[int], token: int) -> bool:
        """Whether the grammar allows a token behind a path."""
        if self._grammar is None:
            return True
        return self._grammar.accepts(tokens[self._num_prompt :], path, token) is True

    @property
    def has_failed(self) -> bool:
        """Whether the output had to end before it had its form."""
        return self._grammar is not None and self._grammar.has_failed

    def end(self) -> None:
        """Lets go of what the output's form took: nothing is asked any more."""
        if self._grammar is not None:
            self._grammar.end()

    def _completing(self, output: Sequence[int]) -> np.ndarray:
        """Tokens that would complete what the output may not have."""
        found = [last for before, ends in self._bad.items() if tuple(output[-len(before) :]) == before for last in ends]
        return np.array(found, dtype=np.int64)

    def _counted(self, tokens: Sequence[int], path: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that are penalised, and how often the output has each, fp32."""
        for token in tokens[self._num_tokens :]:
            if (place := self._place.setdefault(token, len(self._count))) == len(self._count):
                self._count.append(0)
            self._count[place] += 1
        if self._is_stale or len(tokens) > self._num_tokens:
            self._penalised_P = np.array(list(self._place), dtype=np.int64)
            self._count_P = np.array(self._count, dtype=np.float32)
            self._is_stale = False
        self._num_tokens = len(tokens)
        if not path:
            return self._penalised_P, self._count_P
        count_P, new = self._count_P.copy(), dict[int, int]()
        for token in path:
            if (known := self._place.get(token)) is not None:
                count_P[known] += 1
            else:
                new[token] = new.get(token, 0) + 1
        if not new:
            return self._penalised_P, count_P
        return (
            np.concatenate((self._penalised_P, np.array(list(new), dtype=np.int64))),
            np.concatenate((count_P, np.array(list(new.values()), dtype=np.float32))),
        )


def processor_of(
    params: SamplingParams,
    prompt_ids: Sequence[int],
    eos_ids: Collection[int],
    grammar: GrammarState | None = None,
) -> LogitsProcessor | None:
    """The processor of a request that begins; None of one that changes nothing."""
    changes = (
        grammar is not None
        or params.logit_bias
        or params.bad_token_ids
        or params.min_tokens
        or params.min_p
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
    )
    return LogitsProcessor(params, prompt_ids, eos_ids, grammar) if changes else None


def processed(logits_RV: Tensor, edits: Sequence[Edit | None], columns: Columns) -> Tensor:
    """Logits with their edits, fp32, or the same tensor where there are none.

    A row of which nothing would be left keeps the tokens that it may not choose by name: there has to be one. What a
    grammar does not allow it does not keep, so that of a vocabulary's part there may be nothing left.
    """
    if not any(edit is not None for edit in edits):
        return logits_RV
    vocab = logits_RV.shape[1]
    changed_RV = logits_RV.float().clone()
    flat = changed_RV.view(-1)
    own = [(r, edit) for r, edit in enumerate(edits) if edit is not None]

    biased = [_placed(edit.biased, edit.bias, r * vocab, columns) for r, edit in own if len(edit.biased)]
    if biased:
        at, bias = _joined(biased, flat.device)
        flat[at] += bias
    penalised = [_placed(edit.penalised_P, edit.taken_P, r * vocab, columns) for r, edit in own]
    if any(len(at) for at, _ in penalised):
        at, taken = _joined(penalised, flat.device)
        repetition = torch.from_numpy(
            np.repeat(
                np.array([edit.repetition for _, edit in own], dtype=np.float32), [len(at) for at, _ in penalised]
            )
        ).to(flat.device)
        value = flat[at]
        flat[at] = torch.where(value > 0, value / repetition, value * repetition) - taken

    for r, edit in own:
        if edit.allowed is not None:
            bias_V = torch.from_numpy(edit.allowed.bias())
            changed_RV[r] += (bias_V if columns.ids_V is None else bias_V[columns.ids_V.cpu()]).to(flat.device)
        if len(edit.banned):
            banned = columns.of(edit.banned)
            free_V = changed_RV[r].index_fill(0, torch.from_numpy(banned[banned >= 0]).to(flat.device), -torch.inf)
            # Where nothing is left, what is not allowed is: a choice there has to be.
            changed_RV[r] = torch.where(free_V.amax() > -torch.inf, free_V, changed_RV[r])
        if edit.least > -math.inf:
            # What is at most the next lower number is below the least.
            least = np.nextafter(np.float32(float(changed_RV[r].amax() + edit.least)), np.float32(-np.inf))
            changed_RV[r] = functional.threshold(changed_RV[r], float(least), -torch.inf)
    return changed_RV


def _placed(ids: np.ndarray, values: np.ndarray, start: int, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Places of tokens in the flat logits whose row begins at `start`, and their values; without those that have no
    column."""
    at = columns.of(ids)
    if columns.ids_V is not None:
        values, at = values[at >= 0], at[at >= 0]
    return at + start, values


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device) -> tuple[Tensor, Tensor]:
    at, values = (np.concatenate(each) for each in zip(*parts, strict=True))
    return torch.from_numpy(at).to(device), torch.from_numpy(values).to(device)
