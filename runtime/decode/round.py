"""One round over the rows of a batch: draft, pass, verdict, commit. All methods are policies of this one loop, mixed in
one batch.

A round drafts a tree in every row, then runs one pass over every token that the target has not seen: the last of the
text, which is the tree's root, and the tree. The verdict walks from the root along the target's own choices, and the
path that it finds becomes text. So the target's cache is exact. What is sparse is how often a pass runs, and which rows
of it reach the LM head and are judged.

The engines may be anywhere; control is on the CPU, in plain numbers: after a step that has read all of a model's
weights, the code of each further tensor operation has to come from memory again.

Shapes: B rows in use, T tokens of a step, R gathered rows, V vocab, F features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
from torch import Tensor

from ssv.bundle.profile import Costs
from ssv.bundle.survival import Survival
from ssv.runtime.decode.ahead import Ahead
from ssv.runtime.decode.choice import check_chosen, choices, gaps, scaled
from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.drafters import drafters
from ssv.runtime.decode.drafters.model import ModelDrafter
from ssv.runtime.decode.fates import fates_of
from ssv.runtime.decode.logits_processor import Columns
from ssv.runtime.decode.logprobs import logprobs_of
from ssv.runtime.decode.membership import PREFILL_CHUNK, Membership, PromptBlock
from ssv.runtime.decode.pace import Pace
from ssv.runtime.decode.prompt_cache import PromptCache
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.tree import ROOT, Tree, branches_of
from ssv.runtime.decode.typical import judge
from ssv.runtime.decode.verify import Verdict, choice_by_row, judged_rows, walk, walk_typical
from ssv.runtime.engines.contract import BlockEngine, Branches, Engine, HeadsEngine, PromptLane, RoundsEngine
from ssv.runtime.grammar import Grammars

MIN_JUMP = 3
"""Tokens without a choice that are drafted by themselves. Fewer are left to the drafter, which goes on behind them."""


class DecodeBatch:
    """Rounds over the rows of a target and whoever proposes tokens for it.

    Attributes:
        members: the rows; here they come and go.
        drafters: those that there are, by name.
    """

    def __init__(
        self,
        target: Engine,
        draft: Engine | None,
        eos_ids: Sequence[int],
        max_length: int,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        prompt_cache: PromptCache[PromptBlock] | None = None,
        pass_tokens: int | None = None,
        costs: Costs | None = None,
        recorded_costs: Costs | None = None,
        survival: Survival | None = None,
        heads: HeadsEngine | None = None,
        grammars: Grammars | None = None,
        rounds: RoundsEngine | None = None,
        lane: PromptLane | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        pace: Pace | None = None,
    ) -> None:
        """Begins without rows.

        Args:
            draft: None where no draft model is loaded.
            max_length: tokens of prompt and output together.
            prefill_chunk, prompt_cache, grammars: see `Membership`.
            pass_tokens: of a target pass, beyond which a drafted token costs more than it may save; None for no such
                bound.
            costs: of steps here, for policies that draft only what pays.
            recorded_costs: those that the bundle has for this place, which lossy rows go by; None where it has none.
            survival: how far the draft's shares are to be trusted; None to take them as they are.
            heads: Medusa's, over the target's hidden states; None where none are loaded.
            rounds: the same engines, where they run rounds by themselves.
            lane: runs long prompts beside the rounds; None where these wait for each chunk of one.
            around: what rounds of the host and chunks of prompts run within.
            pace: has the last word on whether rows draft that draft what pays; None for one without a clock.
        """
        self.target, self.pass_tokens, self.costs, self._recorded_costs = target, pass_tokens, costs, recorded_costs
        self.eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long)
        self._columns, self._around, self._pace = Columns(), around, pace or Pace(None)
        self.drafters = drafters(
            target, draft, self.eos_ids, survival or Survival(), heads, lane.draft if lane else None
        )
        self.members = Membership(
            target,
            self.drafters,
            sorted(eos_ids),
            max_length,
            prefill_chunk=prefill_chunk,
            prompt_cache=prompt_cache,
            grammars=grammars,
            knows_costs=costs is not None,
            has_rounds=rounds is not None,
            lane=lane,
            around=around,
            pace=self._pace,
        )
        model = self.drafters.get("model")
        assert model is None or isinstance(model, ModelDrafter)
        self._ahead = Ahead(rounds, model, frozenset(eos_ids)) if rounds is not None else None

    @property
    def rows(self) -> list[Row]:
        """The rows in use, in their order."""
        return self.members.rows

    def run(self, *, is_filling: bool = False) -> Iterator[list[list[int]]]:
        """One round over all rows, by the engines themselves where they can; yields what each row gains as it comes:
        trusted tokens before the pass.

        Args:
            is_filling: whether further rows are about to join.
        """
        may_draft = self._may_draft(is_filling)
        if self._ahead is not None and (self.members.is_beside or not self.members.is_joining):
            was_under_way = self._ahead.is_under_way
            gained = self._ahead.step(self.rows, may_draft=may_draft)
            if gained is not None:
                if was_under_way and not self._ahead.is_under_way:
                    self._pace.forget()  # several rounds have come to their end at once
                yield gained
                return
        with self._around():
            self.draft(may_draft=may_draft)
            released = self.release()
        yield released
        with self._around():
            gained = self.verify()
        yield gained

    def settle(self) -> list[list[int]]:
        """Ends what the engines do by themselves, before rows come or go; returns what each row has gained by it."""
        return self._ahead.settle(self.rows) if self._ahead is not None else [[] for _ in self.rows]

    def _may_draft(self, is_filling: bool) -> bool:
        """Whether rows may in this round whose drafts follow the load, by the clock."""
        num = len(self.rows)
        if not any(map(self.members.follows_load, self.rows)):
            return True
        policies = frozenset(row.policy_hash for row in self.rows)
        num_tokens = sum(len(row.tokens) for row in self.rows)
        may = self._pace.begin(num, policies, num_tokens, self._plain_seconds(), is_filling=is_filling)
        if self.members.shares_engines:
            self._pace.forget()  # a prompt takes its part of this round's time
        return may

    def _plain_seconds(self) -> float | None:
        """What a round without a draft takes, by costs; None where they are not known."""
        if self._ahead is not None:
            return self._ahead.plain_seconds(self.rows)
        return self.costs.target.at(len(self.rows)) if self.costs is not None else None

    # --- the round --------------------------------------------------------------------------------------------------

    def draft(self, *, may_draft: bool = True) -> None:
        """Drafts in every row until it asks for a target pass.

        Args:
            may_draft: whether rows do that draft what pays.
        """
        limits = [self._most_pending(row) for row in self.rows]
        prices = None
        if self.costs is not None:
            blocks = self.target.blocks if isinstance(self.target, BlockEngine) else None
            prices = Prices(self.costs, len(self.rows), recorded=self._recorded_costs, blocks=blocks)
        for b, row in enumerate(self.rows):
            row.tree = Tree()
            jumps = row.processor is not None and self._jump(row, limits[b])
            if jumps or (self.members.follows_load(row) and not may_draft):
                limits[b] = 0
        for drafter in self.drafters.values():
            own = [
                limit if self.drafters.of(row) is drafter else 0 for row, limit in zip(self.rows, limits, strict=True)
            ]
            if any(own):
                drafter.propose(self.rows, own, prices)

    def _most_pending(self, row: Row) -> int:
        """Fewer where many rows share a pass, if the row's output is the same whenever it is verified."""
        most = row.policy.max_pending
        if row.policy.is_chain or row.rest <= 0:
            most = min(most, row.rest)
        is_priced = row.policy.pays and self.costs is not None
        if self.pass_tokens is None or not row.lossless or len(self.rows) == 1 or is_priced:
            return most
        return min(most, max(self.pass_tokens // len(self.rows) - 1, 1))

    def _jump(self, row: Row, limit: int) -> bool:
        """Has a row draft what its grammar leaves no choice for, if that is worth a pass by itself."""
        assert row.processor is not None
        if limit < MIN_JUMP or len(forced := row.processor.forced(row.tokens)[: min(limit, row.rest)]) < MIN_JUMP:
            return False
        for token in forced:
            row.tree.add(token)
        return True

    def release(self) -> list[list[int]]:
        """Pending tokens that may leave before the pass, by row: trusted, like every one before them."""
        released = []
        for row in self.rows:
            # The last token of the first path may have ended the output: the pass settles that.
            path, accept_below = row.tree.first_path[:-1], row.policy.accept_below
            if row.params.logprobs is not None or row.audited is not None:
                path = []  # the pass says how probable they are, or what the target would have chosen
            row.released = next((i for i, n in enumerate(path) if not row.tree.risks[n] < accept_below), len(path))
            if row.params.fates:
                _note_fates(row, path[: row.released], [None] * (len(row.tree) + 1))
            released.append(row.first_path[: row.released])
        return released

    def verify(self) -> list[list[int]]:
        """Runs a target pass; returns the tokens that each row has gained since `release`."""
        rows = self.rows
        width = 1 + max(len(row.tree) for row in rows)
        judged = [judged_rows(row.tree, row.policy.accept_below) for row in rows]
        judged_at = [(b, j) for b, flags in enumerate(judged) for j, is_judged in enumerate(flags) if is_judged]
        # Trusted tokens are not judged; what the target says of them may be asked for all the same.
        shown_at = [
            (b, j)
            for b, flags in enumerate(judged)
            if rows[b].params.logprobs is not None or rows[b].audited is not None
            for j, is_judged in enumerate(flags)
            if not is_judged
        ]
        gathered = judged_at + shown_at
        wanting = {drafter for row in rows if (drafter := self.drafters.of(row)) is not None}
        out = self.target.step(
            torch.tensor([row.unseen(width) for row in rows]),
            torch.tensor([row.target_length for row in rows], dtype=torch.int32),
            torch.tensor([b * width + j for b, j in gathered]),
            branches=None if all(row.tree.is_chain for row in rows) else self._branches(),
            count_B=torch.tensor([len(row.tree) + 1 for row in rows], dtype=torch.int32),
            features_out=any(drafter.needs_features for drafter in wanting),
        )
        ahead = [(b, rows[b].tree.depths[j - 1] if j else 0) for b, j in judged_at]

        def before(r: int) -> list[int]:
            b, j = judged_at[r]
            return rows[b].tree.text(j - 1)

        logits_RV, token_R = out.logits_RV, out.token_R
        if shown_at:
            logits_RV, token_R = logits_RV[: len(judged_at)], token_R[: len(judged_at)] if token_R is not None else None
        all_chosen = iter(choices(rows, logits_RV, ahead, self._columns, token_R, before))
        chosen = [list(islice(all_chosen, sum(flags))) for flags in judged]
        verdicts = self._verdicts(judged, chosen, logits_RV)
        check_chosen([verdict.next_token for verdict in verdicts])
        if any(drafter.needs_hidden for drafter in wanting):
            self._show_hidden(verdicts, dict(zip(gathered, out.hidden_RH, strict=True)))
        if any(row.params.logprobs is not None for row in rows):
            self._log(verdicts, dict(zip(gathered, out.logits_RV, strict=True)))
        if any(row.audited is not None for row in rows):
            self._audit(verdicts, dict(zip(gathered, out.logits_RV, strict=True)))
        for row, verdict, flags, choice in zip(rows, verdicts, judged, chosen, strict=True):
            if row.params.fates:
                _note_fates(row, verdict.path, choice_by_row(flags, choice), verdict.next_token)
        return [self._commit(b, verdict, chosen[b], out.features_BTF) for b, verdict in enumerate(verdicts)]

    def _verdicts(
        self, judged: Sequence[Sequence[bool]], chosen: Sequence[Sequence[int]], logits_RV: Tensor
    ) -> list[Verdict]:
        """What the target decides about each row, by what it chooses in its judged rows."""
        verdicts, start = [], 0
        for b, row in enumerate(self.rows):
            at, tree, rule = slice(start, start + len(chosen[b])), row.tree, row.policy.typical
            if rule is None or row.params.greedy:
                verdicts.append(walk(tree, judged[b], chosen[b]))
            else:
                ahead = [(b, depth) for depth in (0, *tree.depths)]
                before = [tree.text(node) for node in range(ROOT, len(tree))]
                x_JV = scaled(self.rows, logits_RV[at], ahead, self._columns, before.__getitem__)
                verdicts.append(walk_typical(tree, *judge(x_JV, tree, rule), chosen[b]))
            start = at.stop
        return verdicts

    def _show_hidden(self, verdicts: Sequence[Verdict], hidden_at: Mapping[tuple[int, int], Tensor]) -> None:
        """Shows drafters the hidden states that the next tokens were chosen after.

        Args:
            hidden_at: of each judged row of the target, by row in use and row of its pass.
        """
        for b, verdict in enumerate(verdicts):
            if (drafter := self.drafters.of(self.rows[b])) is not None and drafter.needs_hidden:
                drafter.see(b, hidden_at[b, verdict.last + 1])

    def _log(self, verdicts: Sequence[Verdict], logits_at: Mapping[tuple[int, int], Tensor]) -> None:
        """Notes how probable the tokens of the verdicts are, of rows that ask for it.

        Args:
            logits_at: of each gathered row of the target, by row in use and row of its pass.
        """
        for b, (row, verdict) in enumerate(zip(self.rows, verdicts, strict=True)):
            if (num_top := row.params.logprobs) is not None:
                places = (0, *(node + 1 for node in verdict.path))
                tokens = (*(row.tree.tokens[node] for node in verdict.path), verdict.next_token)
                row.logprobs += [
                    logprobs_of(logits_at[b, j], token, num_top) for j, token in zip(places, tokens, strict=True)
                ]

    def _audit(self, verdicts: Sequence[Verdict], logits_at: Mapping[tuple[int, int], Tensor]) -> None:
        """Notes which drafted tokens the verdicts keep although the target would have chosen others, of rows that are
        audited; arguments as for `_log`."""
        for b, (row, verdict) in enumerate(zip(self.rows, verdicts, strict=True)):
            if row.audited is None or not verdict.path:
                continue
            before = [row.tree.text(node) for node in (ROOT, *verdict.path[:-1])]
            logits_RV = torch.stack([logits_at[b, node + 1] for node in (ROOT, *verdict.path[:-1])])
            at = [(b, len(text)) for text in before]
            tokens = [row.tree.tokens[node] for node in verdict.path]
            found = gaps(self.rows, logits_RV, at, self._columns, before.__getitem__, tokens)
            row.audited += [(len(row.tokens) + i, gap) for i, gap in enumerate(found) if gap > 0]

    def _branches(self) -> Branches:
        """What roots and nodes see: a root stands in the slot behind its text, node n in the n-th behind it."""
        starts = [row.target_length for row in self.rows]
        paths = [
            [[start], *([start, *(start + 1 + n for n in row.tree.path(node))] for node in range(len(row.tree)))]
            for row, start in zip(self.rows, starts, strict=True)
        ]
        return branches_of(starts, paths, starts)

    def _commit(self, b: int, verdict: Verdict, chosen: Sequence[int], features_BTF: Tensor | None) -> list[int]:
        """Keeps the path that the verdict keeps, adds the target's token; returns what has not left yet."""
        row, path = self.rows[b], verdict.path
        counters, tree, start = row.counters, row.tree, row.target_length + 1
        counters.judged += len(chosen) - 1  # one of them is the bonus
        counters.drafted += len(tree)
        counters.accepted += verdict.num_judged
        counters.trusted += len(path) - verdict.num_judged
        counters.typical += verdict.num_typical
        counters.rolled_back += len(tree) - len(path)
        counters.target_passes += 1
        counters.target_tokens += len(tree) + 1
        counters.passes_by_kept[len(path)] += 1
        self.target.keep(b, start, [start + node for node in path])
        if (drafter := self.drafters.of(row)) is not None:
            drafter.observe(b, row, path, chosen, None if features_BTF is None else features_BTF[b])
        row.tokens += [*(tree.tokens[node] for node in path), verdict.next_token]
        row.tree = Tree()
        gained = row.tokens[start + row.released :]
        row.released = 0
        row.last_commit = time.monotonic()
        return gained


def _note_fates(row: Row, path: Sequence[int], choice_J: Sequence[int | None], next_token: int | None = None) -> None:
    """Notes how tokens of the coming pass came about: arguments as `fates_of` has them."""
    told = 0 if next_token is None else row.released
    row.fates += fates_of(row.tree, path, choice_J, row.counters.target_passes + 1, next_token, told=told)
