"""Rows that come and go: who may join a batch, the prompt of the row that joins, a chunk at a time, and who leaves.

Rows in use are always the first ones. One row at a time joins: its prompt is run behind the others and between their
rounds (`ssv.runtime.decode.round`), or beside these, in a lane of its own. Short prompts that wait behind it may be run
in the same step, which costs little more than one does. When a row leaves, the last one takes its place.

Shapes: T tokens of a step, V vocab.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.runtime.decode.choice import check_chosen, choices
from ssv.runtime.decode.drafters import Drafters
from ssv.runtime.decode.drafters.contract import Drafter
from ssv.runtime.decode.drafters.model import MANY_ROWS
from ssv.runtime.decode.logits_processor import Columns, LogitsProcessor, processor_of
from ssv.runtime.decode.logprobs import logprobs_of
from ssv.runtime.decode.pace import Pace
from ssv.runtime.decode.prompt_cache import PromptCache
from ssv.runtime.decode.row import Row, RunTogether, padded
from ssv.runtime.engines.contract import Engine, PromptLane, StepOutput
from ssv.runtime.grammar import Grammars
from ssv.runtime.request import RequestError, SamplingParams, TokenFate

PREFILL_CHUNK = 64
"""Tokens of a prompt that a round takes at the most, unless told otherwise: a tenth of a second on two CPU cores."""

CHUNKS_UNDER_WAY = 2
"""Of a prompt that runs beside the rounds: the next one follows while the host is busy."""

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
        """What it takes of memory."""
        return self.target.numel() * self.target.element_size() + (
            self.draft.num_bytes if self.draft is not None else 0
        )


@dataclass(slots=True)
class _Joining:
    """A row whose prompt has been run up to `done`, or is on its way to there.

    Attributes:
        is_beside: whether that is beside the rounds.
        at: its row of the lane's cache, if it is.
        last: what its last step gives.
        blocks: what is being read meanwhile.
        others: prompts that share its step, and their rows.
    """

    row: Row
    ids_1T: Tensor
    is_beside: bool
    at: int = 0
    done: int = 0
    last: StepOutput | None = None
    blocks: Sequence[PromptBlock] = ()
    others: Sequence[tuple[Sequence[int], Row]] = ()


class Membership:
    """Which rows are in a batch, over its target and its drafters.

    Attributes:
        rows: those in use, in their order.
        prefill_chunk: tokens of a prompt that `prefill` runs at a time; where there is a lane, as many as its steps
            have room for, of which the cache of prompts keeps so many at a time.
        prompt_cache: where prompts are looked up and kept; None for nowhere.
    """

    def __init__(
        self,
        target: Engine,
        drafters: Drafters,
        eos_ids: Sequence[int],
        max_length: int,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        prompt_cache: PromptCache[PromptBlock] | None = None,
        grammars: Grammars | None = None,
        knows_costs: bool = False,
        has_rounds: bool = False,
        lane: PromptLane | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        pace: Pace,
    ) -> None:
        """Begins without rows.

        Args:
            max_length: tokens of prompt and output together.
            prompt_cache: its blocks are chunks.
            grammars: over the target's vocabulary; None where outputs cannot have one.
            knows_costs: whether the costs of steps here are known, which policies need that draft only what pays.
            has_rounds: whether engines run rounds by themselves.
            lane: runs long prompts beside the rounds; None to run all between these.
            around: what chunks of prompts run within.
            pace: says whether rows draft that draft what pays.
        """
        # A block of another length would be put where others belong.
        assert prompt_cache is None or prompt_cache.block_tokens == prefill_chunk
        self._target, self._drafters, self._eos_ids, self._max_length = target, drafters, eos_ids, max_length
        self.prefill_chunk, self.prompt_cache = prefill_chunk, prompt_cache
        self._grammars, self._knows_costs, self._has_rounds = grammars, knows_costs, has_rounds
        self._around, self._pace, self._columns, self._lane = around, pace, Columns(), lane
        self.rows: list[Row] = []
        self._joining: _Joining | None = None

    @property
    def is_joining(self) -> bool:
        """Whether a row is on its way."""
        return self._joining is not None

    def runs_beside(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the prompt that joins next is run beside the rounds: a long one, and any where no row is free, to be
        ready when one is."""
        if self._lane is None:
            return False
        return len(prompt_ids) >= self._lane.least or len(self.rows) == self._target.max_batch

    @property
    def most_sharing(self) -> int:
        """How many prompts can be run in the step of another, at the most."""
        return self._lane.most_rows - 1 if self._lane is not None else 0

    @property
    def tokens_between(self) -> int:
        """Tokens of prompts that are run between two rounds, at the most."""
        return self.prefill_chunk if self._lane is None else max(self.prefill_chunk, self._lane.least)

    @property
    def is_beside(self) -> bool:
        """Whether the row that joins has its prompt run beside the rounds: by `is_ready` and `join`, in place of
        `prefill`."""
        return self._joining is not None and self._joining.is_beside

    @property
    def shares_engines(self) -> bool:
        """Whether a prompt is being run beside a round."""
        return self._lane is not None and self.is_beside and self._lane.num_under_way > 0

    def _place(self, joining: _Joining) -> tuple[Engine, int]:
        """What runs the prompt of the row that joins, and in which row of its cache."""
        if not joining.is_beside:
            return self._target, len(self.rows)
        assert self._lane is not None
        return self._lane.target, joining.at

    def check(self, prompt_ids: Sequence[int], params: SamplingParams, policy: Policy) -> None:
        """Raises RequestError if a request cannot run here."""
        prompt_length = len(prompt_ids)
        if not prompt_length:
            raise RequestError("the prompt is empty")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self._target.vocab_size:
            raise RequestError(f"the prompt has token ids outside the target's vocabulary of {self._target.vocab_size}")
        if params.grammar is not None:
            if self._grammars is None:
                raise RequestError("outputs cannot have a form here: no tokenizer's file is loaded")
            self._grammars.prepare(params.grammar)
        for name, tokens in params.named_tokens.items():
            if (token := next((t for t in tokens if not 0 <= t < self._target.vocab_size), None)) is not None:
                raise RequestError(f"{name}: token {token} is outside the vocabulary of {self._target.vocab_size}")
        if prompt_length + params.max_tokens > self._max_length:
            raise RequestError(
                f"prompt of {prompt_length} tokens and max_tokens {params.max_tokens} exceed the cache of "
                f"{self._max_length}",
                "shorten one of them, or load with a larger max length: `ssv-serve --max-length`, or from Python "
                "`LLM.load(max_length=...)`",
            )
        if policy.max_pending > MAX_PENDING:
            raise RequestError(
                f"max_pending {policy.max_pending} of the policy: at most {MAX_PENDING} tokens can be pending"
            )
        if not policy.max_pending:
            return
        if policy.drafter not in self._drafters:
            raise RequestError(*_LACKING[policy.drafter])
        if policy.pays and policy.drafter == "model" and not self._knows_costs:
            raise RequestError(
                "this method drafts what pays, and the costs of steps here are not known", "give them (`costs`)"
            )
        if policy.accept_below > 0 and not self._drafters[policy.drafter].has_scores:
            raise RequestError("this tier trusts tokens by their score, and the draft was loaded without a scorer")

    def begin(self, prompt_ids: Sequence[int], row: Row, following: Sequence[tuple[Sequence[int], Row]] = ()) -> None:
        """Takes a row whose prompt is to be run, unless that was done with another's; no other may be on its way.

        Args:
            following: prompts of those who wait behind it, in the order in which they will be begun.

        Raises:
            RequestError: see `check`.
        """
        self.check(prompt_ids, row.params, row.policy)
        assert self._joining is None, "one row joins at a time"
        row.tokens = list(prompt_ids)
        row.counters.prompt_tokens = len(prompt_ids)
        row.processor = self.processor(row.params, prompt_ids)
        run, row.run_together = row.run_together, None
        # A drafter that keeps nothing of prompts has nothing to make ready, and can begin at any time.
        if self._caching(row) is not None:
            row.has_lost_draft = run is not None or self._joins_without_draft(row)
        is_beside = self.runs_beside(prompt_ids) if run is None else run.is_beside
        self._joining = joining = _Joining(row, torch.tensor([row.tokens]), is_beside)
        if (drafter := self._drafters.of(row)) is not None:
            drafter.begin(is_beside=is_beside)
        if run is not None:
            self._take(joining, run)
            return
        if is_beside and self._lane is not None:
            # What the prompt before has left there has been taken, and chunks that this one reads are kept.
            self._lane.hand_over(len(prompt_ids))
        self._restore(joining)
        joining.others = self._sharing(joining, following)

    def _take(self, joining: _Joining, run: RunTogether) -> None:
        """Takes a prompt that was run with another's to where it would have been run by itself."""
        length = len(joining.row.tokens)
        joining.at, joining.done, joining.last = run.at, length, run.last
        if not run.is_beside and run.at != (place := len(self.rows)):
            self._target.move_row(run.at, place, length)
        if (drafter := self._drafters.of(joining.row)) is not None:
            drafter.prefill(self._place(joining)[1], joining.ids_1T, 0, length, None)

    def _sharing(
        self, joining: _Joining, following: Sequence[tuple[Sequence[int], Row]]
    ) -> list[tuple[Sequence[int], Row]]:
        """The first of the prompts that follow, as far as one step has room for them and they are nobody's business
        but the target's."""
        lane, length = self._lane, len(joining.row.tokens)
        if lane is None or joining.done or not self._is_for_target_alone(joining.row.tokens, joining.row):
            return []
        num_rows = lane.most_rows
        if not joining.is_beside:
            num_rows = min(num_rows, self._target.max_batch - len(self.rows))
        sharing: list[tuple[Sequence[int], Row]] = []
        for prompt_ids, row in following:
            length += len(prompt_ids)
            if 1 + len(sharing) >= num_rows or length > lane.most_tokens:
                break
            if not self._is_for_target_alone(prompt_ids, row):
                break  # who waits behind it joins behind it
            sharing.append((prompt_ids, row))
        return sharing

    def _is_for_target_alone(self, prompt_ids: Sequence[int], row: Row) -> bool:
        """Whether a prompt is short, none of it is known, and a step of the target with its last token's logits is all
        that it needs."""
        assert self._lane is not None
        if len(prompt_ids) >= self._lane.least or row.params.prompt_logprobs is not None:
            return False
        drafter = self._drafters.of(row)
        sees_prompt = drafter is not None and (drafter.has_cache or drafter.needs_features)
        if sees_prompt and not self._joins_without_draft(row):
            return False
        return self.prompt_cache is None or not self.prompt_cache.knows(prompt_ids[:-1], drafts=False)

    def _joins_without_draft(self, row: Row) -> bool:
        """Whether no draft is made ready for a row that joins, as it would hardly be asked."""
        if not self.follows_load(row):
            return False
        others = min(len(self.rows), self._target.max_batch - 1)  # one of all rows leaves before it can join
        if self._has_rounds and others >= MANY_ROWS:
            return True
        policies = frozenset(each.policy_hash for each in (*self.rows, row))
        return others >= ALONE and not self._pace.would_draft(1 + others, policies)

    def follows_load(self, row: Row) -> bool:
        """Whether a row drafts what pays in the company it has. The text of lossy rows is to be the same in any, but
        where engines run rounds by themselves: their trees have one shape, that of the moment."""
        if not row.policy.pays or not row.policy.max_pending:
            return False
        return row.lossless or (self._has_rounds and len(self.rows) > 1)

    def processor(self, params: SamplingParams, prompt_ids: Sequence[int]) -> LogitsProcessor | None:
        """What a request that begins changes of its logits; None of one that changes nothing."""
        grammar = None
        if params.grammar is not None:
            assert self._grammars is not None
            grammar = self._grammars.begin(params.grammar)
        return processor_of(params, prompt_ids, self._eos_ids, grammar)

    @property
    def num_prefilled(self) -> int:
        """Tokens of the prompt of the row that joins that have been run, or were known."""
        return self._joining.done if self._joining is not None else 0

    def prefill(self) -> int | None:
        """Runs the next chunk of the prompt of the row that joins, or all of a prompt that is too short to run beside
        the rounds; returns its first token when that was the last."""
        joining = self._joining
        assert joining is not None
        with self._around():
            while joining.last is None:
                self._run_chunk(joining)
                if self._lane is None:
                    break
            return self._join(joining) if joining.last is not None else None

    def is_ready(self, *, wait: bool) -> bool:
        """Has the prompt of the row that joins go on beside the rounds; returns whether all of it has been run.

        Args:
            wait: whether to wait for a piece of it, as nobody else does anything meanwhile; not for all of it, as some
                may leave.
        """
        joining, lane = self._joining, self._lane
        assert joining is not None and lane is not None
        # A few at a time, however soon they end: others wait for the host.
        for _ in range(1 if joining.row.params.prompt_logprobs is not None else CHUNKS_UNDER_WAY):
            if joining.last is not None or lane.num_under_way >= CHUNKS_UNDER_WAY:
                break
            with lane.work():
                self._run_chunk(joining)
        if wait and lane.num_under_way:
            lane.wait()
        return joining.last is not None and not lane.num_under_way

    def join(self) -> int:
        """Puts the row that is ready behind those in use, whose rounds have come to their end; returns its first
        token."""
        joining, lane = self._joining, self._lane
        assert joining is not None and lane is not None
        self._target.write_cache(len(self.rows), 0, lane.target.read_cache(joining.at, 0, joining.done))
        return self._join(joining)

    def _run_chunk(self, joining: _Joining) -> None:
        """Runs the next chunk of a prompt, or it and those that share its step."""
        if joining.others:
            self._run_together(joining)
            return
        row, length = joining.row, joining.ids_1T.shape[1]
        engine, b = self._place(joining)
        drafter = self._drafters.of(row)
        num_top, size = row.params.prompt_logprobs, self.prefill_chunk
        if self._lane is not None and num_top is None:
            size = max(self._lane.most_tokens // size, 1) * size
        start, stop = joining.done, min(joining.done + size, length)
        out = engine.step(
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
        self._keep(row.tokens, self._caching(row), engine, b, start, stop)
        if stop == length:
            joining.last = out

    def _run_together(self, joining: _Joining) -> None:
        """Runs a prompt and those that share its step, whose rows take what it gives when they join."""
        engine, b = self._place(joining)
        prompts = [joining.row.tokens, *(prompt_ids for prompt_ids, _ in joining.others)]
        counts = [len(prompt_ids) for prompt_ids in prompts]
        width = max(counts)
        out = engine.step(
            torch.tensor([padded(prompt_ids, 0, width) for prompt_ids in prompts]),
            torch.zeros(len(prompts), dtype=torch.int32),
            torch.tensor([i * width + count - 1 for i, count in enumerate(counts)]),
            count_B=torch.tensor(counts, dtype=torch.int32),
            first_row=b,
        )
        rows = [joining.row, *(row for _, row in joining.others)]
        for i, (prompt_ids, row) in enumerate(zip(prompts, rows, strict=True)):
            last = _of_row(out, i)
            if i:
                row.run_together = RunTogether(joining.is_beside, b + i, last)
            else:
                joining.done, joining.last = counts[0], last
            self._keep(prompt_ids, None, engine, b + i, 0, counts[i])
        joining.others = ()

    def _join(self, joining: _Joining) -> int:
        """The row is in use from now on; returns its first token."""
        row, b, out = joining.row, len(self.rows), joining.last
        assert out is not None
        drafter = self._drafters.of(row)
        self._joining = None
        self.rows.append(row)
        self._pace.forget()
        token_R = out.token_R[-1:] if out.token_R is not None else None
        (first,) = chosen = choices(self.rows, out.logits_RV[-1:], [(b, 0)], self._columns, token_R)
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
            _let_go(self._joining.row)
            while self._lane is not None and self._lane.num_under_way:
                self._lane.wait()  # or what it reads and writes could be somebody else's meanwhile
        self._joining = None

    def abandon_all(self) -> None:
        """Drops all rows, and that which joins."""
        self.abandon()
        for row in self.rows:
            _let_go(row)
        self.rows.clear()

    def remove(self, row: int, moved: int) -> None:
        """Ends a row: row `moved`, the last one, takes its place; who joins behind the others stays there."""
        _let_go(self.rows[row])
        if row != moved:
            self.rows[row] = self.rows[moved]
            self._target.move_row(moved, row, self.rows[row].target_length)
            if (drafter := self._drafters.of(self.rows[row])) is not None:
                drafter.move(moved, row, self.rows[row])
        self.rows.pop()
        self._pace.forget()
        if self._joining is not None and not self._joining.is_beside:
            source, dest, done = len(self.rows) + 1, len(self.rows), self._joining.done
            self._target.move_row(source, dest, done)
            if (drafter := self._drafters.of(self._joining.row)) is not None:
                drafter.move_joining(source, dest, done)

    def _restore(self, joining: _Joining) -> None:
        """Takes the beginning of a prompt from the cache of prompts: all but its last token at the most, which has to
        give logits."""
        if self.prompt_cache is None or joining.row.params.prompt_logprobs is not None:
            return
        drafter = self._caching(joining.row)
        engine, b = self._place(joining)
        joining.blocks = self.prompt_cache.find(joining.row.tokens[:-1], drafter is not None)
        with self._lane.work() if self._lane is not None and joining.is_beside else nullcontext():
            for block in joining.blocks:
                stop = joining.done + self.prefill_chunk
                engine.write_cache(b, joining.done, block.target)
                if drafter is not None:
                    drafter.restore(b, joining.done, stop, block.draft)
                joining.done = stop
        joining.row.counters.cached_tokens = joining.done

    def _keep(
        self, tokens: Sequence[int], drafter: Drafter | None, engine: Engine, b: int, start: int, stop: int
    ) -> None:
        """Puts the whole chunks of what a step has run into the cache of prompts.

        Args:
            tokens: the prompt.
            drafter: that keeps something of it, too.
            engine, b: where it lies.
            start, stop: tokens of the step.
        """
        if (cache := self.prompt_cache) is None:
            return
        for end in range(start + self.prefill_chunk, stop + 1, self.prefill_chunk):
            if not cache.wants(before := tokens[:end], drafter is not None):
                continue
            begin = end - self.prefill_chunk
            draft = drafter.snapshot(b, begin, end) if drafter is not None else None
            block = PromptBlock(engine.read_cache(b, begin, end), draft)
            cache.put(before, drafter is not None, block, block.num_bytes)

    def _caching(self, row: Row) -> Drafter | None:
        """The row's drafter if it keeps something of a prompt."""
        drafter = self._drafters.of(row)
        return drafter if drafter is not None and drafter.has_cache else None


def _of_row(out: StepOutput, i: int) -> StepOutput:
    """What a step gives the i-th gathered token, whatever the engine does next."""
    token_R = out.token_R[i : i + 1].clone() if out.token_R is not None else None
    return StepOutput(out.hidden_RH[i : i + 1].clone(), out.logits_RV[i : i + 1].clone(), None, None, token_R)


def _let_go(row: Row) -> None:
    """Ends what a row's output has taken beside the engines."""
    if row.processor is not None:
        row.processor.end()
