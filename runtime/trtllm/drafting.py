"""Drafts for requests of an engine that this project does not run: it says what each text is now, and gets the tokens
that may follow.

Nothing is heard of verdicts. What was kept of a draft shows in the next text, so the draft's cache follows the texts:
what they still have in common stays, the rest is computed again.

A chain for each text, as long as the scorer's thresholds let it be, or as it pays where the costs of steps are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from ssv.bundle.policy import MAX_PENDING, RESERVED_LENGTH, Policy
from ssv.bundle.profile import Costs
from ssv.bundle.survival import Survival
from ssv.runtime.counters import Counters
from ssv.runtime.decode.costs import FIRST_GUESSES, Prices
from ssv.runtime.decode.drafters.model import ModelDrafter
from ssv.runtime.decode.drafters.suffix import Suffix
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.tree import Tree
from ssv.runtime.engines.contract import Engine
from ssv.runtime.request import MAX_COUNT, SamplingParams

PREFILL_CHUNK = 512

_GREEDY = SamplingParams(max_tokens=MAX_COUNT)
"""The likeliest tokens are drafted for sampled requests too: nobody here knows the noise that they are chosen with."""


@dataclass(frozen=True, slots=True)
class Text:
    """What a request has so far.

    Attributes:
        tokens: prompt and output; the last one has not been run by the target.
        room: tokens that a draft may add.
    """

    tokens: Sequence[int]
    room: int


def chain_policy(tier: Policy, most: int, *, pays: bool) -> Policy:
    """A tier's policy as a chain of at most `most` tokens, all of which are judged.

    Args:
        pays: draft only what saves time, by what steps cost, in place of the tier's thresholds.
    """
    changes = {"accept_below": 0.0, "children": (1,), "beam": 1, "pays": pays, "max_pending": most}
    return tier.model_copy(update=changes | ({"verify_above": 1.0, "risk_budget": 1.0} if pays else {}))


def most_drafted_for(costs: Costs, most: int, max_rows: int) -> int:
    """Most requests at a time that full chains pay for, on average; beyond, a pass with drafts costs more than it
    brings. At least 1."""
    share = sum(FIRST_GUESSES) / len(FIRST_GUESSES)
    tokens = 1 + sum(share**depth for depth in range(1, most + 1))

    def pays(rows: int) -> bool:
        drafted = costs.target.at(rows * (1 + most)) + costs.begin + most * costs.draft.at(rows)
        return tokens * costs.target.at(rows) > drafted

    return max(sum(1 for _ in takewhile(pays, range(1, max_rows + 1))), 1)


class Drafting:
    """A standalone draft's engine over the requests of another one.

    A request has a row from its first draft on, until it is forgotten, or another needs its row while it is not asked
    for: a request that was paused and comes back is drafted for as if it were new.
    """

    def __init__(
        self,
        engine: Engine,
        eos_ids: Sequence[int],
        policy: Policy,
        *,
        survival: Survival | None = None,
        costs: Costs | None = None,
    ) -> None:
        """Begins without requests.

        Args:
            engine: of a draft that takes no features of the target's.
            policy: see `chain_policy`.
            costs: of steps there; with a policy that pays.
        """
        assert not engine.num_features and policy.is_chain and not policy.accept_below
        assert policy.pays == (costs is not None)
        self._engine, self._policy, self._costs = engine, policy, costs
        ends = torch.tensor(sorted(eos_ids), dtype=torch.long)
        recall = Suffix(frozenset(eos_ids))  # of trees alone
        self._drafter = ModelDrafter(engine, engine, ends, survival or Survival(), recall)
        self._rows: list[Row] = []
        self._ids: list[int] = []
        self._asked: dict[int, int] = {}
        self._left: set[int] = set()
        self._round = 0

    @property
    def held(self) -> dict[int, tuple[int, ...]]:
        """Tokens of each request that the draft's cache has entries for, by request, in the order of their rows."""
        return {each: tuple(row.tokens[: row.draft_length]) for each, row in zip(self._ids, self._rows, strict=True)}

    def forget(self, request: int) -> None:
        """A request has ended, or does not go on for now."""
        self._left.add(request)

    def propose(self, texts: Mapping[int, Text]) -> dict[int, list[int]]:
        """Tokens that may follow each text; none where there is no room for them, or none pays.

        Args:
            texts: by request.
        """
        self._round += 1
        # What was drafted last is known by its row: rows move only afterwards.
        fitting = {request: text for request, text in texts.items() if self._fits(text)}
        leaving = self._left | (texts.keys() - fitting.keys())
        self._left = set()
        for b, request in enumerate(self._ids):
            if request in fitting and request not in leaving:
                self._follow(b, fitting[request].tokens)
        for request in leaving.intersection(self._ids):
            self._remove(self._ids.index(request))
        for request, text in fitting.items():
            if request not in self._asked:
                self._admit(request, text.tokens, fitting)
        limits = [0] * len(self._rows)
        for b, (request, row) in enumerate(zip(self._ids, self._rows, strict=True)):
            row.tree = Tree()
            if (found := fitting.get(request)) is not None:
                self._asked[request] = self._round
                limits[b] = min(self._policy.max_pending, found.room)
        prices = Prices(self._costs, max(len(texts), 1)) if self._costs is not None else None
        self._drafter.propose(self._rows, limits, prices)
        drafted = {request: row.first_path for request, row in zip(self._ids, self._rows, strict=True)}
        return {request: drafted.get(request, []) for request in texts}

    def _fits(self, text: Text) -> bool:
        return text.room > 0 and len(text.tokens) + RESERVED_LENGTH <= self._engine.max_length

    def _follow(self, b: int, tokens: Sequence[int]) -> None:
        """Takes a row's text as it is now."""
        row, known = self._rows[b], len(self._rows[b].tokens)
        if list(tokens[:known]) == row.tokens and len(tokens) > known:
            self._drafter.observe(b, row, range(_common(row.tree.tokens, tokens[known:-1])), (), None)
        else:
            row.draft_length = min(row.draft_length, _common(row.tokens, tokens), len(tokens) - 1)
        row.tokens = list(tokens)
        if len(tokens) - row.draft_length > MAX_PENDING:
            self._fill(b, row)

    def _admit(self, request: int, tokens: Sequence[int], texts: Mapping[int, Text]) -> None:
        """Gives a request a row, if one is free or held for somebody who is not asked for."""
        if len(self._rows) == self._engine.max_batch:
            idle = [each for each in self._ids if each not in texts]
            if not idle:
                return
            self._remove(self._ids.index(min(idle, key=self._asked.__getitem__)))
        row = Row(_GREEDY, self._policy, lambda _: False, Counters(), tokens=list(tokens))
        self._rows.append(row)
        self._ids.append(request)
        self._asked[request] = self._round
        self._fill(len(self._rows) - 1, row)

    def _fill(self, b: int, row: Row) -> None:
        """Makes the entries of all but the last token."""
        ids_1T, stop = torch.tensor([row.tokens]), len(row.tokens) - 1
        for start in range(row.draft_length, stop, PREFILL_CHUNK):
            self._drafter.prefill(b, ids_1T, start, min(start + PREFILL_CHUNK, stop), None)
        row.draft_length = stop

    def _remove(self, b: int) -> None:
        """Ends a row; the last one takes its place."""
        last = len(self._rows) - 1
        del self._asked[self._ids[b]]
        if b != last:
            self._drafter.move(last, b, self._rows[last])
            self._rows[b], self._ids[b] = self._rows[last], self._ids[last]
        self._rows.pop()
        self._ids.pop()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
