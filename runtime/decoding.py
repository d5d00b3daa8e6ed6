"""Rows being decoded: draft, verify, commit. All methods are policies of this one loop.

A round drafts in all rows until each of them asks for a target pass, then runs one pass over every token that the target has not
seen. Control is on the CPU; the engines may be anywhere.

Shapes: B rows in use, T tokens of a step, K pending tokens, J = K + 1, R gathered rows, S length, V vocab, F features.

May import: ssv.builder.tiers; ssv.runtime.engine, .request, .sampling, .stats, .verify.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssv.builder.tiers import Policy
from ssv.runtime.engine import Engine, EngineError, StepOutput
from ssv.runtime.request import RequestError, SamplingParams
from ssv.runtime.sampling import SamplingTensors, probabilities
from ssv.runtime.stats import Counters
from ssv.runtime.verify import (
    Verdict,
    asks_for_pass,
    draw,
    greedy_verdict,
    is_trusted,
    judged_rows,
    sampled_verdict,
)

MAX_PENDING = 32
"""Most tokens that may be pending. Engines need this much cache beyond the longest sequence, for padding."""

_PREFILL_CHUNK = 512


@dataclass(slots=True)
class Row:
    """Settings and state of one row that are not tensors.

    Attributes:
        would_stop: whether drafted token ids would complete a stop string.
        released: pending tokens that have already left, being trusted like all before them.
    """

    params: SamplingParams
    policy: Policy
    would_stop: Callable[[Sequence[int]], bool]
    counters: Counters
    rng: random.Random = field(init=False)
    released: int = 0
    last_commit: float = 0.0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.params.seed)
        # Probabilities are fp32: a threshold must be the same number beside a tensor and beside a float.
        names = ("accept_below", "verify_above", "risk_budget")
        rounded = torch.tensor([getattr(self.policy, name) for name in names]).tolist()
        self.policy = self.policy.model_copy(update=dict(zip(names, rounded, strict=True)))

    def uniform(self) -> float:
        return self.rng.random()


class DecodeBatch:
    """Rows over a target and, unless all are autoregressive, a draft.

    A row holds its tokens in `tokens_BS`: those the target has seen (`target_length_B`), one more that it has
    not, then the pending ones. A conditioned draft's entry i joins token i + 1 with the features of token i, so its cache runs one token behind.
    """

    def __init__(self, target: Engine, draft: Engine | None, eos_ids: Sequence[int], max_length: int) -> None:
        rows = target.max_batch
        if draft is not None and draft.max_batch < rows:
            raise EngineError(f"the draft's cache has {draft.max_batch} rows, the target's {rows}: make them the same")
        self.target, self.draft_engine = target, draft
        self.max_length = max_length
        self.eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long)
        self._eos_set = frozenset(eos_ids)
        self.conditioned = draft is not None and draft.num_features > 0
        self._draft_offset = 1 if self.conditioned else 0
        self._draft_eos = _positions_of(self.eos_ids, draft.token_ids_V) if draft is not None else self.eos_ids
        self.rows: list[Row] = []
        self.tokens_BS = torch.zeros(rows, max_length + 2 * MAX_PENDING, dtype=torch.long)
        self.target_length_B = torch.zeros(rows, dtype=torch.long)
        self.draft_length_B = torch.zeros(rows, dtype=torch.long)
        self.num_pending_B = torch.zeros(rows, dtype=torch.long)
        self.reject_prob_BK = torch.zeros(rows, MAX_PENDING)
        self.accept_below_B = torch.zeros(rows)
        self.sampling = SamplingTensors(torch.zeros(rows), torch.zeros(rows, dtype=torch.long), torch.ones(rows))
        # Allocated by the first sampled request: greedy decoding never needs whole distributions.
        self.draft_prob_BKV: Tensor | None = None
        self._vocab_size = 0
        self._features_BTF: Tensor | None = None

    def check(self, prompt_ids: Sequence[int], params: SamplingParams, policy: Policy) -> None:
        """Raises RequestError if a request cannot run here."""
        prompt_length = len(prompt_ids)
        if not prompt_length:
            raise RequestError("the prompt is empty")
        if not all(0 <= token < self.target.vocab_size for token in prompt_ids):
            raise RequestError(f"the prompt has token ids outside the target's vocabulary of {self.target.vocab_size}")
        if prompt_length + params.max_tokens > self.max_length:
            raise RequestError(
                f"prompt of {prompt_length} tokens and max_tokens {params.max_tokens} exceed the cache of "
                f"{self.max_length}: shorten one of them or load with a larger max length"
            )
        if policy.max_pending > MAX_PENDING:
            raise RequestError(
                f"{policy.max_pending} tokens may not be pending at a time (num_draft_tokens, or the tier's max_pending): "
                f"at most {MAX_PENDING} can"
            )
        if policy.max_pending and self.draft_engine is None:
            raise RequestError("this method needs a draft, and none is loaded")
        if not policy.lossless and self.draft_engine is not None and not self.draft_engine.has_scorer:
            raise RequestError("this tier trusts tokens by their score, and the draft was loaded without a scorer")

    def add(self, prompt_ids: Sequence[int], row: Row) -> int:
        """Starts a row after the last one: runs its prompt, returns its first token."""
        self.check(prompt_ids, row.params, row.policy)
        b, length = len(self.rows), len(prompt_ids)
        self.rows.append(row)
        self._set_row(b, row)
        self.tokens_BS[b, :length] = torch.tensor(prompt_ids)
        drafts = row.policy.max_pending > 0
        for start in range(0, length, _PREFILL_CHUNK):
            stop = min(start + _PREFILL_CHUNK, length)
            out = self.target.step(
                self.tokens_BS[b : b + 1, start:stop],
                torch.tensor([start], dtype=torch.int32),
                torch.tensor([stop - start - 1]),
                features_out=drafts and self.conditioned,
                first_row=b,
            )
            if drafts:
                self._prefill_draft(b, start, stop, last=stop == length, features_BTF=out.features_BTF)
        self._vocab_size = out.logits_RV.shape[1]
        first = int(self._choose_first(out.logits_RV, b))
        self.tokens_BS[b, length] = first
        self.target_length_B[b] = length
        self.num_pending_B[b] = 0
        row.counters.prompt_tokens = length
        row.last_commit = time.monotonic()
        return first

    def draft(self) -> None:
        """Drafts in every row until it asks for a target pass."""
        if not any(row.policy.max_pending for row in self.rows):
            return
        # The pass itself gives one more token, so no more than the rest but one is of use.
        limits = [min(row.policy.max_pending, row.params.max_tokens - row.counters.emitted - 1) for row in self.rows]
        drafting = [b for b, limit in enumerate(limits) if limit > 0]
        reject_prob: list[list[float]] = [[] for _ in self.rows]
        while drafting:
            at = torch.tensor(drafting)
            out = self._draft_step(at)
            token_R = self._choose_drafted(out, at)
            column_R = self.num_pending_B[at]
            self.tokens_BS[at, self.target_length_B[at] + 1 + column_R] = token_R
            if out.reject_prob_R is not None:
                self.reject_prob_BK[at, column_R] = out.reject_prob_R.to("cpu", torch.float32)
            self.num_pending_B[at] = column_R + 1
            go_on = []
            drafted = zip(drafting, token_R.tolist(), self.reject_prob_BK[at, column_R].tolist(), strict=True)
            for b, token, probability in drafted:
                row = self.rows[b]
                row.counters.drafted += 1
                reject_prob[b].append(probability)
                if not (asks_for_pass(reject_prob[b], row.policy, limits[b]) or self._must_ask(b, token)):
                    go_on.append(b)
            drafting = go_on

    def release(self) -> list[list[int]]:
        """Pending tokens that may leave before the pass, by row: trusted, like every one before them."""
        released = []
        for b, row in enumerate(self.rows):
            pending = self.pending_ids(b)
            tokens: list[int] = []
            if pending and row.policy.accept_below > 0:
                trusted = (self.reject_prob_BK[b, : len(pending)] < row.policy.accept_below).tolist()
                # The last token may have ended the output: the pass settles that.
                run = next((i for i, ok in enumerate(trusted) if not ok), len(pending))
                tokens = pending[: min(run, len(pending) - 1)]
            row.released = len(tokens)
            released.append(tokens)
        return released

    def verify(self) -> list[list[int]]:
        """Runs a target pass; returns the tokens that each row has gained since `release`."""
        batch = len(self.rows)
        num_pending_B = self.num_pending_B[:batch]
        tokens = int(num_pending_B.max()) + 1
        start_B = self.target_length_B[:batch].clone()
        input_BT = self.tokens_BS[:batch].gather(1, start_B[:, None] + torch.arange(tokens))
        drafted_BK = input_BT[:, 1:]
        trusted_BK = is_trusted(self.reject_prob_BK[:batch, : tokens - 1], self.accept_below_B[:batch])
        judged_BJ = judged_rows(trusted_BK, num_pending_B)
        out = self.target.step(
            input_BT,
            start_B.int(),
            judged_BJ.flatten().nonzero()[:, 0],
            features_out=self.conditioned and any(row.policy.max_pending for row in self.rows),
        )
        verdict = self._verdict(out.logits_RV, drafted_BK, judged_BJ, num_pending_B)
        kept_B = verdict.num_kept_B
        self.tokens_BS[torch.arange(batch), start_B + 1 + kept_B] = verdict.next_token_B
        self.target_length_B[:batch] = start_B + 1 + kept_B
        if self.conditioned:
            # Entries made of the draft's own hidden states are made again from the target's features.
            self.draft_length_B[:batch] = start_B
            if out.features_BTF is not None:
                self._put_features(torch.arange(batch), out.features_BTF)
        else:
            self.draft_length_B[:batch] = torch.minimum(self.draft_length_B[:batch], start_B + 1 + kept_B)
        gained = self._account(start_B, num_pending_B, judged_BJ, verdict)
        self.num_pending_B[:batch] = 0
        return gained

    def remove(self, row: int, moved: int) -> None:
        """Ends a row: row `moved`, the last one, takes its place."""
        if row != moved:
            length = int(self.target_length_B[moved])
            self.target.move_row(moved, row, length)
            if self.draft_engine is not None:
                self.draft_engine.move_row(moved, row, int(self.draft_length_B[moved]))
            for tensor in (self.tokens_BS, self.target_length_B, self.draft_length_B, self.num_pending_B):
                tensor[row] = tensor[moved]
            if self._features_BTF is not None:
                self._features_BTF[row] = self._features_BTF[moved]
            self.rows[row] = self.rows[moved]
            self._set_row(row, self.rows[row])
        self.rows.pop()

    def pending_ids(self, row: int) -> list[int]:
        """Token ids drafted since the last pass."""
        start = int(self.target_length_B[row]) + 1
        return self.tokens_BS[row, start : start + int(self.num_pending_B[row])].tolist()

    # --- drafting ---------------------------------------------------------------------------------------------------

    def _prefill_draft(self, b: int, start: int, stop: int, last: bool, features_BTF: Tensor | None) -> None:
        # The last entry waits for the token that the target is about to choose (conditioned), or for the first draft step.
        assert self.draft_engine is not None
        end = stop
        if self.conditioned:
            assert features_BTF is not None
            if last:
                end -= 1
                self._put_features(torch.tensor([b]), features_BTF[:, -1:])
            features_BTF = features_BTF[:, : end - start]
        if end > start:
            ids = self.tokens_BS[b : b + 1, start + self._draft_offset : end + self._draft_offset]
            no_rows = torch.empty(0, dtype=torch.long)
            self.draft_engine.step(ids, torch.tensor([start], dtype=torch.int32), no_rows, features_BTF, first_row=b)
        self.draft_length_B[b] = end

    def _draft_step(self, drafting: Tensor) -> StepOutput:
        """Feeds each drafting row what its draft has not seen yet; the others are padding."""
        assert self.draft_engine is not None
        batch = len(self.rows)
        start_B = self.draft_length_B[:batch]
        end_B = self.target_length_B[:batch] + 1 + self.num_pending_B[:batch] - self._draft_offset
        count_R = (end_B - start_B)[drafting]
        tokens = int(count_R.max())
        index_BT = start_B[:, None] + self._draft_offset + torch.arange(tokens)
        out = self.draft_engine.step(
            self.tokens_BS[:batch].gather(1, index_BT.clamp(max=self.tokens_BS.shape[1] - 1)),
            start_B.int(),
            drafting * tokens + count_R - 1,
            self._features_BTF[:batch, :tokens] if self._features_BTF is not None else None,
        )
        self.draft_length_B[drafting] = end_B[drafting]
        if self.conditioned:
            self._put_features(drafting, out.hidden_RH[:, None])
        return out

    def _put_features(self, rows: Tensor, features_RTF: Tensor) -> None:
        """What the next draft step of these rows takes for its first tokens."""
        tokens = features_RTF.shape[1]
        held = self._features_BTF
        if held is None or held.shape[0] < self.target.max_batch or held.shape[1] < tokens:
            grown = features_RTF.new_zeros(
                self.target.max_batch, max(tokens, held.shape[1] if held is not None else 1), features_RTF.shape[2]
            )
            if held is not None:
                grown[: held.shape[0], : held.shape[1]] = held
            self._features_BTF = held = grown
        held[rows.to(held.device), :tokens] = features_RTF

    def _must_ask(self, b: int, token: int) -> bool:
        """Whether a row asks for a pass because its draft came to an end, or its caller waits too long."""
        row = self.rows[b]
        if token in self._eos_set and not row.params.ignore_eos:
            return True
        if row.params.stop and row.would_stop(self.pending_ids(b)):
            return True
        return row.params.max_delay is not None and time.monotonic() - row.last_commit >= row.params.max_delay

    # --- choosing tokens --------------------------------------------------------------------------------------------

    def _choose_first(self, logits_1V: Tensor, b: int) -> Tensor:
        rows = torch.tensor([b])
        logits_1V = self._without_early_eos(logits_1V, rows, torch.zeros_like(rows), self.eos_ids)
        if self._all_greedy():
            return logits_1V.argmax(dim=1).cpu()
        prob_1V = probabilities(logits_1V.cpu(), self.sampling[rows])
        return draw(prob_1V, torch.tensor([self.rows[b].uniform()]))

    def _choose_drafted(self, out: StepOutput, drafting: Tensor) -> Tensor:
        assert self.draft_engine is not None
        ids_V = self.draft_engine.token_ids_V
        logits_RV = self._without_early_eos(out.logits_RV, drafting, self.num_pending_B[drafting], self._draft_eos)
        if self._all_greedy():
            index_R = logits_RV.argmax(dim=1)
            return (ids_V[index_R] if ids_V is not None else index_R).cpu()
        prob_RV = probabilities(logits_RV.cpu(), self.sampling[drafting])
        index_R = draw(prob_RV, torch.tensor([self.rows[b].uniform() for b in drafting.tolist()]))
        token_R = ids_V.cpu()[index_R] if ids_V is not None else index_R
        self._keep_draft_prob(prob_RV, ids_V, drafting)
        return token_R

    def _keep_draft_prob(self, prob_RV: Tensor, ids_V: Tensor | None, drafting: Tensor) -> None:
        vocab = self._vocab_size
        if self.draft_prob_BKV is None:
            self.draft_prob_BKV = torch.zeros(self.target.max_batch, MAX_PENDING, vocab)
        full_RV = prob_RV
        if ids_V is not None:
            full_RV = torch.zeros(len(prob_RV), vocab).index_copy_(1, ids_V.cpu(), prob_RV)
        self.draft_prob_BKV[drafting, self.num_pending_B[drafting]] = full_RV

    def _verdict(self, logits_RV: Tensor, drafted_BK: Tensor, judged_BJ: Tensor, num_pending_B: Tensor) -> Verdict:
        batch = len(self.rows)
        at = judged_BJ.nonzero()
        logits_RV = self._without_early_eos(logits_RV, at[:, 0], at[:, 1], self.eos_ids)
        if self._all_greedy():
            target_BJ = torch.zeros(judged_BJ.shape, dtype=torch.long)
            target_BJ[judged_BJ] = logits_RV.argmax(dim=1).cpu()
            return greedy_verdict(drafted_BK, judged_BJ, num_pending_B, target_BJ)
        width = drafted_BK.shape[1]
        prob_RV = probabilities(logits_RV.cpu(), self.sampling[at[:, 0]])
        draft_prob_BKV = self.draft_prob_BKV
        if draft_prob_BKV is None:  # nothing has ever been drafted
            draft_prob_BKV = torch.zeros(batch, max(width, 1), prob_RV.shape[1])
        # As many numbers as the row has pending tokens, whatever the other rows have: its output must not depend on them.
        uniform_BK = torch.zeros(batch, width)
        for b, (row, pending) in enumerate(zip(self.rows, num_pending_B.tolist(), strict=True)):
            uniform_BK[b, :pending] = torch.tensor([row.uniform() for _ in range(pending)])
        next_B = torch.tensor([row.uniform() for row in self.rows])
        return sampled_verdict(
            drafted_BK, judged_BJ, num_pending_B, prob_RV, draft_prob_BKV[:batch, : max(width, 1)], uniform_BK, next_B
        )

    def _all_greedy(self) -> bool:
        return all(row.params.greedy for row in self.rows)

    def _without_early_eos(self, logits_RV: Tensor, rows: Tensor, ahead: Tensor, eos: Tensor) -> Tensor:
        """Takes end-of-sequence from the logits of rows that have to go on.

        Args:
            rows: the row in use that each logits row belongs to.
            ahead: tokens of the current round before the one that is chosen.
            eos: columns of the logits.
        """
        if all(row.params.min_tokens == 0 for row in self.rows):
            return logits_RV
        early = torch.tensor([self._must_go_on(b, n) for b, n in zip(rows.tolist(), ahead.tolist(), strict=True)])
        columns = torch.zeros(logits_RV.shape[1], dtype=torch.bool)
        columns[eos] = True
        banned_RV = early[:, None] & columns
        return logits_RV.masked_fill(banned_RV.to(logits_RV.device), -torch.inf)

    def _must_go_on(self, b: int, ahead: int) -> bool:
        row = self.rows[b]
        return row.counters.emitted - row.released + ahead < row.params.min_tokens

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def _account(self, start_B: Tensor, num_pending_B: Tensor, judged_BJ: Tensor, verdict: Verdict) -> list[list[int]]:
        gained = []
        now = time.monotonic()
        for b, row in enumerate(self.rows):
            start, pending, kept = int(start_B[b]) + 1, int(num_pending_B[b]), int(verdict.num_kept_B[b])
            judged = int(judged_BJ[b, :pending].sum())
            kept_judged = int(judged_BJ[b, :kept].sum())
            counters = row.counters
            counters.judged += judged
            counters.accepted += kept_judged
            counters.trusted += kept - kept_judged
            counters.rolled_back += pending - kept
            counters.target_passes += 1
            counters.target_tokens += pending + 1
            gained.append(self.tokens_BS[b, start + row.released : start + kept + 1].tolist())
            row.released = 0
            row.last_commit = now
        return gained

    def _set_row(self, b: int, row: Row) -> None:
        policy, params = row.policy, row.params
        for tensor, value in (
            (self.accept_below_B, policy.accept_below),
            (self.sampling.temperature_R, params.temperature),
            (self.sampling.top_k_R, params.top_k),
            (self.sampling.top_p_R, params.top_p),
        ):
            tensor[b] = value


def _positions_of(ids: Tensor, ids_V: Tensor | None) -> Tensor:
    """Where `ids` stand in `ids_V`; those that do not are left out."""
    return ids if ids_V is None else torch.isin(ids_V.cpu(), ids).nonzero()[:, 0]
