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
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.bundle.profile import Costs
from ssv.bundle.survival import Survival
from ssv.runtime.decode.ahead import Ahead
from ssv.runtime.decode.choice import check_chosen, choices, gaps, scaled
from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.drafters import drafters
from ssv.runtime.decode.drafters.contract import Drafter
from ssv.runtime.decode.drafters.model import MANY_ROWS, ModelDrafter
from ssv.runtime.decode.fates import fates_of
from ssv.runtime.decode.logits_processor import Columns, LogitsProcessor, processor_of
from ssv.runtime.decode.logprobs import logprobs_of
from ssv.runtime.decode.pace import Pace
from ssv.runtime.decode.prompt_cache import PromptCache
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.tree import ROOT, Tree, branches_of
from ssv.runtime.decode.typical import judge
from ssv.runtime.decode.verify import Verdict, choice_by_row, judged_rows, walk, walk_typical
from ssv.runtime.engines.contract import Branches, Engine, HeadsEngine, RoundsEngine
from ssv.runtime.grammar import Grammars
from ssv.runtime.request import RequestError, SamplingParams, TokenFate

PREFILL_CHUNK = 64
"""Tokens of a prompt that a round takes at the most, unless told otherwise: a tenth of a second on two CPU cores."""

MIN_JUMP = 3
"""Tokens without a choice that are drafted by themselves. Fewer are left to the drafter, which goes on behind them."""

ALONE = 3
"""With fewer beside it a row that joins gets a draft in any case: it may soon be the only one, and gain by it."""

_LACKING = {
    "model": ("this method needs a draft, and none is loaded",),
    "heads": (
        "this method needs Medusa's heads, and none are loaded",
        "distill them with `ssv-build distill --kind medusa`, name them in the recipe (`heads.file`), build the bundle "
        "again, and load it with the engine torch",
    ),
}
"""What to say where a drafter is not there."""


@dataclass(frozen=True, slots=True)
class PromptBlock:
    """What a chunk of a prompt left behind.

    Attributes:
        target: see `Engine.read_cache`.
        draft: see `Drafter.snapshot`; None of a row whose drafter keeps nothing.
    """

    target: Tensor
    draft: Any

    @property
    def num_bytes(self) -> int:
        return self.target.numel() * self.target.element_size() + (
            self.draft.num_bytes if self.draft is not None else 0
        )


@dataclass(slots=True)
class _Joining:
    """A row whose prompt has been run up to `done`."""

    row: Row
    ids_1T: Tensor
    done: int = 0


class DecodeBatch:
    """Rows over a target and whoever proposes tokens for it.

    A row joins behind the others: its prompt is run a chunk at a time, between their rounds.
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
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        pace: Pace | None = None,
    ) -> None:
        """Args:
        draft: None where no draft model is loaded.
        max_length: tokens of prompt and output together.
        prefill_chunk: tokens of a prompt that `prefill` runs at a time.
        prompt_cache: where prompts are looked up and kept, in blocks of a chunk.
        pass_tokens: of a target pass, beyond which a drafted token costs more than it may save; None for no such bound.
        costs: of steps here, for policies that draft only what pays.
        recorded_costs: those that the bundle has for this place, which lossy rows go by; None where it has none.
        survival: how far the draft's shares are to be trusted; None to take them as they are.
        heads: Medusa's, over the target's hidden states; None where none are loaded.
        grammars: over the target's vocabulary; None where outputs cannot have one.
        rounds: the same engines, where they run rounds by themselves.
        around: what rounds of the host and chunks of prompts run within.
        pace: has the last word on whether rows draft that draft what pays; None for one without a clock.
        """
        # A block of another length would be put where others belong.
        assert prompt_cache is None or prompt_cache.block_tokens == prefill_chunk
        self.target, self.pass_tokens, self.costs, self._recorded_costs = target, pass_tokens, costs, recorded_costs
        self.max_length, self.prefill_chunk, self.prompt_cache = max_length, prefill_chunk, prompt_cache
        self.eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long)
        self._columns, self._grammars, self._around, self._pace = Columns(), grammars, around, pace or Pace(None)
        self.drafters = drafters(target, draft, self.eos_ids, survival or Survival(), heads)
        self.rows: list[Row] = []
        self._joining: _Joining | None = None
        model = self.drafters.get("model")
        assert model is None or isinstance(model, ModelDrafter)
        self._ahead = Ahead(rounds, model, frozenset(eos_ids)) if rounds is not None else None

    def run(self) -> Iterator[list[list[int]]]:
        """One round over all rows, by the engines themselves where they can; yields what each row gains as it comes:
        trusted tokens before the pass."""
        may_draft = self._may_draft()
        if self._ahead is not None and self._joining is None:
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

    def _may_draft(self) -> bool:
        """Whether rows may in this round whose drafts follow the load, by the clock."""
        num = len(self.rows)
        if not any(map(self._follows_load, self.rows)):
            return True
        policies = frozenset(row.policy_hash for row in self.rows)
        return self._pace.begin(num, policies, sum(len(row.tokens) for row in self.rows), self._plain_seconds())

    def _follows_load(self, row: Row) -> bool:
        """Whether a row drafts what pays in the company it has. The text of lossy rows is to be the same in any, but
        where engines run rounds by themselves: their trees have one shape, that of the moment."""
        if not row.policy.pays or not row.policy.max_pending:
            return False
        return row.lossless or (self._ahead is not None and len(self.rows) > 1)

    def _plain_seconds(self) -> float | None:
        """Of a round without a draft, by costs; None where they are not known."""
        if self._ahead is not None:
            return self._ahead.plain_seconds(len(self.rows))
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
            prices = Prices(self.costs, len(self.rows), recorded=self._recorded_costs)
        for b, row in enumerate(self.rows):
            row.tree = Tree()
            jumps = row.processor is not None and self._jump(row, limits[b])
            if jumps or (self._follows_load(row) and not may_draft):
                limits[b] = 0
        for drafter in self.drafters.values():
            own = [
                limit if self.drafter_of(row) is drafter else 0 for row, limit in zip(self.rows, limits, strict=True)
            ]
            if any(own):
                drafter.propose(self.rows, own, prices)

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
        wanting = {drafter for row in rows if (drafter := self.drafter_of(row)) is not None}
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
            if (drafter := self.drafter_of(self.rows[b])) is not None and drafter.needs_hidden:
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
        if (drafter := self.drafter_of(row)) is not None:
            drafter.observe(b, row, path, chosen, None if features_BTF is None else features_BTF[b])
        row.tokens += [*(tree.tokens[node] for node in path), verdict.next_token]
        row.tree = Tree()
        gained = row.tokens[start + row.released :]
        row.released = 0
        row.last_commit = time.monotonic()
        return gained

    def _most_pending(self, row: Row) -> int:
        """Fewer where many rows share a pass, if the row's output is the same whenever it is verified."""
        most = row.policy.max_pending
        if row.policy.is_chain or row.rest <= 0:
            most = min(most, row.rest)
        is_priced = row.policy.pays and self.costs is not None
        if self.pass_tokens is None or not row.lossless or len(self.rows) == 1 or is_priced:
            return most
        return min(most, max(self.pass_tokens // len(self.rows) - 1, 1))

    def drafter_of(self, row: Row) -> Drafter | None:
        """None of a row that does not draft."""
        return self.drafters[row.policy.drafter] if row.policy.max_pending and not row.has_lost_draft else None

    # --- rows come and go -------------------------------------------------------------------------------------------

    def check(self, prompt_ids: Sequence[int], params: SamplingParams, policy: Policy) -> None:
        """Raises RequestError if a request cannot run here."""
        prompt_length = len(prompt_ids)
        if not prompt_length:
            raise RequestError("the prompt is empty")
        if not all(0 <= token < self.target.vocab_size for token in prompt_ids):
            raise RequestError(f"the prompt has token ids outside the target's vocabulary of {self.target.vocab_size}")
        if params.grammar is not None:
            if self._grammars is None:
                raise RequestError("outputs cannot have a form here: no tokenizer's file is loaded")
            self._grammars.prepare(params.grammar)
        for name, tokens in params.named_tokens.items():
            if (token := next((t for t in tokens if not 0 <= t < self.target.vocab_size), None)) is not None:
                raise RequestError(f"{name}: token {token} is outside the vocabulary of {self.target.vocab_size}")
        if prompt_length + params.max_tokens > self.max_length:
            raise RequestError(
                f"prompt of {prompt_length} tokens and max_tokens {params.max_tokens} exceed the cache of "
                f"{self.max_length}",
                "shorten one of them or load with a larger max length",
            )
        if policy.max_pending > MAX_PENDING:
            raise RequestError(
                f"{policy.max_pending} tokens may not be pending at a time (num_draft_tokens, or the tier's "
                f"max_pending): at most {MAX_PENDING} can"
            )
        if not policy.max_pending:
            return
        if policy.drafter not in self.drafters:
            raise RequestError(*_LACKING[policy.drafter])
        if policy.pays and policy.drafter == "model" and self.costs is None:
            raise RequestError(
                "this method drafts what pays, and the costs of steps here are not known", "give them (`costs`)"
            )
        if policy.accept_below > 0 and not self.drafters[policy.drafter].has_scores:
            raise RequestError("this tier trusts tokens by their score, and the draft was loaded without a scorer")

    def begin(self, prompt_ids: Sequence[int], row: Row) -> None:
        """Takes a row whose prompt `prefill` runs; no other may be on its way.

        Raises:
            RequestError: see `check`.
        """
        self.check(prompt_ids, row.params, row.policy)
        assert self._joining is None, "one row joins at a time"
        row.tokens = list(prompt_ids)
        row.counters.prompt_tokens = len(prompt_ids)
        row.processor = self.processor(row.params, prompt_ids)
        row.has_lost_draft = self._follows_load(row) and not self._would_draft(row)
        self._joining = _Joining(row, torch.tensor([row.tokens]))
        if (drafter := self.drafter_of(row)) is not None:
            drafter.begin()
        self._restore(self._joining)

    def _would_draft(self, row: Row) -> bool:
        """Whether a row that joins will be let draft: a draft that will hardly be asked is not made ready."""
        if self._ahead is not None and len(self.rows) >= MANY_ROWS:
            return False
        policies = frozenset(each.policy_hash for each in (*self.rows, row))
        return len(self.rows) < ALONE or self._pace.would_draft(1 + len(self.rows), policies)

    def processor(self, params: SamplingParams, prompt_ids: Sequence[int]) -> LogitsProcessor | None:
        """What a request that begins changes of its logits; None of one that changes nothing."""
        grammar = None
        if params.grammar is not None:
            assert self._grammars is not None
            grammar = self._grammars.begin(params.grammar)
        return processor_of(params, prompt_ids, self.eos_ids.tolist(), grammar)

    @property
    def num_prefilled(self) -> int:
        """Tokens of the prompt of the row that joins that have been run, or were known."""
        return self._joining.done if self._joining is not None else 0

    def prefill(self) -> int | None:
        """Runs the next chunk of the prompt of the row that joins; returns its first token when that was the last."""
        with self._around():
            return self._prefill()

    def _prefill(self) -> int | None:
        joining = self._joining
        assert joining is not None
        row, b, length = joining.row, len(self.rows), joining.ids_1T.shape[1]
        drafter = self.drafter_of(row)
        start, stop = joining.done, min(joining.done + self.prefill_chunk, length)
        num_top = row.params.prompt_logprobs
        out = self.target.step(
            joining.ids_1T[:, start:stop],
            torch.tensor([start], dtype=torch.int32),
            torch.tensor([stop - start - 1] if num_top is None else list(range(stop - start))),
            features_out=drafter is not None and drafter.needs_features,
            first_row=b,
        )
        if drafter is not None:
            drafter.prefill(b, joining.ids_1T, start, stop, out.features_BTF)
        if num_top is not None:
            following = row.tokens[start + 1 : stop + 1]
            row.prompt_logprobs += [
                logprobs_of(logits_V, token, num_top) for logits_V, token in zip(out.logits_RV, following, strict=False)
            ]
        joining.done = stop
        if stop - start == self.prefill_chunk:
            self._keep(joining, start, stop)
        if stop < length:
            return None
        self._joining = None
        self.rows.append(row)
        self._pace.forget()
        (first,) = chosen = choices(self.rows, out.logits_RV[-1:], [(b, 0)], self._columns)
        check_chosen(chosen)
        if row.params.logprobs is not None:
            row.logprobs.append(logprobs_of(out.logits_RV[-1], first, row.params.logprobs))
        if row.params.fates:
            row.fates.append(TokenFate(first, "target", 0))
        row.tokens.append(first)
        if drafter is not None:
            if drafter.needs_hidden:
                drafter.see(b, out.hidden_RH[-1])
            drafter.join(b, row)
        row.last_commit = time.monotonic()
        return first

    def abandon(self) -> None:
        """Drops the row that joins."""
        if self._joining is not None:
            _end(self._joining.row)
        self._joining = None

    def remove(self, row: int, moved: int) -> None:
        """Ends a row: row `moved`, the last one, takes its place, and the row that joins stays behind the others."""
        _end(self.rows[row])
        if row != moved:
            self.rows[row] = self.rows[moved]
            self.target.move_row(moved, row, self.rows[row].target_length)
            if (drafter := self.drafter_of(self.rows[row])) is not None:
                drafter.move(moved, row, self.rows[row])
        self.rows.pop()
        self._pace.forget()
        if self._joining is not None:
            source, dest, done = len(self.rows) + 1, len(self.rows), self._joining.done
            self.target.move_row(source, dest, done)
            if (drafter := self.drafter_of(self._joining.row)) is not None:
                drafter.move_joining(source, dest, done)

    def _restore(self, joining: _Joining) -> None:
        """Takes the beginning of a prompt from the cache of prompts: all but its last token at the most, which has to
        give logits."""
        if self.prompt_cache is None or joining.row.params.prompt_logprobs is not None:
            return
        b, drafter = len(self.rows), self._caching(joining.row)
        for block in self.prompt_cache.find(joining.row.tokens[:-1], drafter is not None):
            stop = joining.done + self.prefill_chunk
            self.target.write_cache(b, joining.done, block.target)
            if drafter is not None:
                drafter.restore(b, joining.done, stop, block.draft)
            joining.done = stop
        joining.row.counters.cached_tokens = joining.done

    def _keep(self, joining: _Joining, start: int, stop: int) -> None:
        """Puts a chunk into the cache of prompts."""
        b, drafter, tokens = len(self.rows), self._caching(joining.row), joining.row.tokens[:stop]
        if self.prompt_cache is None or not self.prompt_cache.wants(tokens, drafter is not None):
            return
        draft = drafter.snapshot(b, start, stop) if drafter is not None else None
        block = PromptBlock(self.target.read_cache(b, start, stop), draft)
        self.prompt_cache.put(tokens, drafter is not None, block, block.num_bytes)

    def _caching(self, row: Row) -> Drafter | None:
        """The row's drafter if it keeps something of a prompt."""
        drafter = self.drafter_of(row)
        return drafter if drafter is not None and drafter.has_cache else None


def _end(row: Row) -> None:
    if row.processor is not None:
        row.processor.end()


def _note_fates(row: Row, path: Sequence[int], choice_J: Sequence[int | None], next_token: int | None = None) -> None:
    """Notes how tokens of the coming pass came about: arguments as `fates_of` has them."""
    told = 0 if next_token is None else row.released
    row.fates += fates_of(row.tree, path, choice_J, row.counters.target_passes + 1, next_token, told=told)
