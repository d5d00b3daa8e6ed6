"""Rows being decoded: draft, verify, commit. All methods are policies of this one loop.

A round drafts in all rows until each of them asks for a target pass, then runs one pass over every token that the target has not
seen. The engines may be anywhere; control is on the CPU, in plain numbers: after a step that has read all of a model's weights, the
code of each further tensor operation has to come from memory again.

Shapes: B rows in use, T tokens of a step, K pending tokens, J = K + 1, R gathered rows, V vocab, F features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssv.bundle.policy import Policy
from ssv.plugins.reference import most_likely
from ssv.runtime.counters import Counters
from ssv.runtime.decode.prompt_cache import PromptCache
from ssv.runtime.decode.sampling import Sampling, choose, without_tokens
from ssv.runtime.decode.verify import Verdict, asks_for_pass, judged_rows, walk
from ssv.runtime.engines.contract import Engine, EngineError, StepOutput
from ssv.runtime.request import MAX_PENDING, RequestError, SamplingParams

PREFILL_CHUNK = 64
"""Tokens of a prompt that a round takes at the most, unless told otherwise: a tenth of a second on two CPU cores."""


@dataclass(slots=True)
class Row:
    """Settings and state of one row.

    Attributes:
        would_stop: whether drafted token ids would complete a stop string.
        tokens: those the target has seen, one more that it has not, then the pending ones.
        target_length, draft_length: entries in the engines' caches.
        reject_prob: of each pending token.
        released: pending tokens that have already left, being trusted like all before them.
    """

    params: SamplingParams
    policy: Policy
    would_stop: Callable[[Sequence[int]], bool]
    counters: Counters
    tokens: list[int] = field(default_factory=list)
    target_length: int = 0
    draft_length: int = 0
    reject_prob: list[float] = field(default_factory=list)
    released: int = 0
    last_commit: float = 0.0

    def __post_init__(self) -> None:
        # Probabilities are fp32: a threshold must be the same number beside a tensor and beside a float.
        names = ("accept_below", "verify_above", "risk_budget")
        rounded = torch.tensor([getattr(self.policy, name) for name in names]).tolist()
        self.policy = self.policy.model_copy(update=dict(zip(names, rounded, strict=True)))

    @property
    def pending(self) -> list[int]:
        """Token ids drafted since the last pass."""
        return self.tokens[self.target_length + 1 :]

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.target_length - 1


@dataclass(frozen=True, slots=True)
class PromptBlock:
    """What a chunk of a prompt left in the caches.

    Attributes:
        target, draft: see `Engine.read_cache`; no draft of a row that does not draft.
        last_feature_11F: of the chunk's last token, for a conditioned draft.
    """

    target: Tensor
    draft: Tensor | None
    last_feature_11F: Tensor | None

    @property
    def num_bytes(self) -> int:
        parts = (self.target, self.draft, self.last_feature_11F)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


@dataclass(slots=True)
class _Prefill:
    """A row whose prompt has been run up to `done`."""

    row: Row
    ids_1T: Tensor
    done: int = 0
    last_feature_11F: Tensor | None = None


class DecodeBatch:
    """Rows over a target and, unless all are autoregressive, a draft.

    A row joins behind the others: its prompt is run a chunk at a time, between their rounds.

    A conditioned draft's entry i joins token i + 1 with the features of token i, so its cache runs one token behind.
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
    ) -> None:
        """Args:
        max_length: tokens of prompt and output together.
        prefill_chunk: tokens of a prompt that `prefill` runs at a time.
        prompt_cache: where prompts are looked up and kept, in blocks of a chunk.
        pass_tokens: of a target pass, beyond which a drafted token costs more than it may save; None for no such bound.
        """
        if draft is not None and draft.max_batch < target.max_batch:
            raise EngineError(
                f"the draft's cache has {draft.max_batch} rows, the target's {target.max_batch}: make them the same"
            )
        self.pass_tokens = pass_tokens
        # A block of another length would be put where others belong.
        assert prompt_cache is None or prompt_cache.block_tokens == prefill_chunk
        self.target, self.draft_engine = target, draft
        self.max_length, self.prefill_chunk, self.prompt_cache = max_length, prefill_chunk, prompt_cache
        self.eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long)
        self._eos_set = frozenset(eos_ids)
        self.conditioned = draft is not None and draft.num_features > 0
        self._draft_offset = 1 if self.conditioned else 0
        self._draft_eos = _positions_of(self.eos_ids, draft.token_ids_V) if draft is not None else self.eos_ids
        self.rows: list[Row] = []
        self._joining: _Prefill | None = None
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

    def begin(self, prompt_ids: Sequence[int], row: Row) -> None:
        """Takes a row whose prompt `prefill` runs; no other may be on its way.

        Raises:
            RequestError: see `check`.
        """
        self.check(prompt_ids, row.params, row.policy)
        assert self._joining is None, "one row joins at a time"
        row.tokens = list(prompt_ids)
        row.counters.prompt_tokens = len(prompt_ids)
        self._joining = _Prefill(row, torch.tensor([row.tokens]))
        self._restore(self._joining)

    @property
    def num_prefilled(self) -> int:
        """Tokens of the prompt of the row that joins that have been run, or were known."""
        return self._joining.done if self._joining is not None else 0

    def prefill(self) -> int | None:
        """Runs the next chunk of the prompt of the row that joins; returns its first token when that was the last."""
        joining = self._joining
        assert joining is not None
        row, b, length = joining.row, len(self.rows), joining.ids_1T.shape[1]
        drafts = row.policy.max_pending > 0
        start, stop = joining.done, min(joining.done + self.prefill_chunk, length)
        out = self.target.step(
            joining.ids_1T[:, start:stop],
            torch.tensor([start], dtype=torch.int32),
            torch.tensor([stop - start - 1]),
            features_out=drafts and self.conditioned,
            first_row=b,
        )
        if drafts:
            self._prefill_draft(joining, start, stop, out.features_BTF)
        joining.done = stop
        if stop - start == self.prefill_chunk:
            self._keep(joining, start, stop)
        if stop < length:
            return None
        self._joining = None
        self.rows.append(row)
        if joining.last_feature_11F is not None:
            self._put_features([b], joining.last_feature_11F)
        row.target_length = length
        row.draft_length = length - self._draft_offset if drafts else 0
        first = self._choose_first(out.logits_RV, b)
        row.tokens.append(first)
        row.last_commit = time.monotonic()
        return first

    def abandon(self) -> None:
        """Drops the row that joins."""
        self._joining = None

    def draft(self) -> None:
        """Drafts in every row until it asks for a target pass."""
        if not any(row.policy.max_pending for row in self.rows):
            return
        # The pass itself gives one more token, so no more than the rest but one is of use.
        limits = [min(self._most_pending(row), row.params.max_tokens - row.counters.emitted - 1) for row in self.rows]
        drafting = [b for b, limit in enumerate(limits) if limit > 0]
        while drafting:
            out = self._draft_step(drafting)
            chosen = self._choose_drafted(out, drafting)
            scored = out.reject_prob_R.tolist() if out.reject_prob_R is not None else [0.0] * len(drafting)
            go_on = []
            for b, token, reject_prob in zip(drafting, chosen, scored, strict=True):
                row = self.rows[b]
                row.tokens.append(token)
                row.reject_prob.append(reject_prob)
                row.counters.drafted += 1
                if not (asks_for_pass(row.reject_prob, row.policy, limits[b]) or self._must_ask(row, token)):
                    go_on.append(b)
            drafting = go_on

    def _most_pending(self, row: Row) -> int:
        """Fewer where many rows share a pass, if the row's output is the same whenever it is verified."""
        most = row.policy.max_pending
        if self.pass_tokens is None or not row.policy.lossless:
            return most
        return min(most, max(self.pass_tokens // len(self.rows) - 1, 1))

    def release(self) -> list[list[int]]:
        """Pending tokens that may leave before the pass, by row: trusted, like every one before them."""
        released = []
        for row in self.rows:
            # The last pending token may have ended the output: the pass settles that.
            judged = judged_rows(row.reject_prob[:-1], row.policy.accept_below)
            row.released = judged.index(True)
            released.append(row.pending[: row.released])
        return released

    def verify(self) -> list[list[int]]:
        """Runs a target pass; returns the tokens that each row has gained since `release`."""
        width = 1 + max(row.num_pending for row in self.rows)
        judged = [judged_rows(row.reject_prob, row.policy.accept_below) for row in self.rows]
        judged_at = [(b, j) for b, flags in enumerate(judged) for j, is_judged in enumerate(flags) if is_judged]
        out = self.target.step(
            torch.tensor([_window(row.tokens, row.target_length, width) for row in self.rows]),
            torch.tensor([row.target_length for row in self.rows], dtype=torch.int32),
            torch.tensor([b * width + j for b, j in judged_at]),
            count_B=torch.tensor([row.num_pending + 1 for row in self.rows], dtype=torch.int32),
            features_out=self.conditioned and any(row.policy.max_pending for row in self.rows),
        )
        if self.conditioned and out.features_BTF is not None:
            self._put_features(range(len(self.rows)), out.features_BTF)
        choices = iter(self._chosen(out.logits_RV, judged_at, self.eos_ids, out.token_R))
        verdicts = [
            walk(row.pending, flags, [next(choices) for _ in range(sum(flags))])
            for row, flags in zip(self.rows, judged, strict=True)
        ]
        _check_chosen([verdict.next_token for verdict in verdicts])
        return [self._commit(*each) for each in zip(self.rows, judged, verdicts, strict=True)]

    def remove(self, row: int, moved: int) -> None:
        """Ends a row: row `moved`, the last one, takes its place, and the row that joins stays behind the others."""
        if row != moved:
            self.rows[row] = self.rows[moved]
            self._move(moved, row, self.rows[row].target_length, self.rows[row].draft_length)
            if self._features_BTF is not None:
                self._features_BTF[row] = self._features_BTF[moved]
        self.rows.pop()
        if self._joining is not None:
            done = self._joining.done
            self._move(len(self.rows) + 1, len(self.rows), done, max(done - self._draft_offset, 0))

    def _move(self, source: int, dest: int, target_length: int, draft_length: int) -> None:
        self.target.move_row(source, dest, target_length)
        if self.draft_engine is not None:
            self.draft_engine.move_row(source, dest, draft_length)

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _prefill_draft(self, joining: _Prefill, start: int, stop: int, features_BTF: Tensor | None) -> None:
        """Makes the draft's entries up to the one that waits for a token after the chunk."""
        assert self.draft_engine is not None
        first, last = self._draft_entries(start, stop)
        if self.conditioned:
            assert features_BTF is not None
            held = joining.last_feature_11F
            joining.last_feature_11F = features_BTF[:, -1:].clone()
            features_BTF = features_BTF[:, :-1] if held is None else torch.cat((held, features_BTF[:, :-1]), dim=1)
        if last > first:
            ids = joining.ids_1T[:, first + self._draft_offset : last + self._draft_offset]
            no_rows = torch.empty(0, dtype=torch.long)
            at = torch.tensor([first], dtype=torch.int32)
            self.draft_engine.step(ids, at, no_rows, features_BTF, first_row=len(self.rows))

    def _draft_entries(self, start: int, stop: int) -> tuple[int, int]:
        """The draft's entries that tokens `start` to `stop` of a prompt complete."""
        return max(start - self._draft_offset, 0), stop - self._draft_offset

    def _restore(self, joining: _Prefill) -> None:
        """Takes the beginning of a prompt from the cache of prompts: all but its last token at the most, which has to give logits."""
        if self.prompt_cache is None:
            return
        prompt, row, drafts = joining.row.tokens, len(self.rows), joining.row.policy.max_pending > 0
        for block in self.prompt_cache.find(prompt[:-1], drafts):
            stop = joining.done + self.prefill_chunk
            self.target.write_cache(row, joining.done, block.target)
            if drafts and block.draft is not None:
                assert self.draft_engine is not None
                self.draft_engine.write_cache(row, self._draft_entries(joining.done, stop)[0], block.draft)
            joining.done, joining.last_feature_11F = stop, block.last_feature_11F
        joining.row.counters.cached_tokens = joining.done

    def _keep(self, joining: _Prefill, start: int, stop: int) -> None:
        """Puts a chunk into the cache of prompts."""
        drafts = joining.row.policy.max_pending > 0
        if self.prompt_cache is None or not self.prompt_cache.wants(joining.row.tokens[:stop], drafts):
            return
        row = len(self.rows)
        draft = None
        if drafts:
            assert self.draft_engine is not None
            draft = self.draft_engine.read_cache(row, *self._draft_entries(start, stop))
        block = PromptBlock(self.target.read_cache(row, start, stop), draft, joining.last_feature_11F)
        self.prompt_cache.put(joining.row.tokens[:stop], drafts, block, block.num_bytes)

    # --- drafting ---------------------------------------------------------------------------------------------------

    def _draft_step(self, drafting: Sequence[int]) -> StepOutput:
        """Feeds each drafting row what its draft has not seen yet; the others are padding."""
        assert self.draft_engine is not None
        starts = [row.draft_length for row in self.rows]
        counts = [len(self.rows[b].tokens) - self._draft_offset - starts[b] for b in drafting]
        width = max(counts)
        all_counts = [0] * len(self.rows)
        for b, count in zip(drafting, counts, strict=True):
            all_counts[b] = count
        windows = [_window(row.tokens, row.draft_length + self._draft_offset, width) for row in self.rows]
        out = self.draft_engine.step(
            torch.tensor(windows),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([b * width + count - 1 for b, count in zip(drafting, counts, strict=True)]),
            self._features_BTF[: len(self.rows), :width] if self._features_BTF is not None else None,
            count_B=torch.tensor(all_counts, dtype=torch.int32),
        )
        for b, count in zip(drafting, counts, strict=True):
            self.rows[b].draft_length += count
        if self.conditioned:
            self._put_features(drafting, out.hidden_RH[:, None])
        return out

    def _put_features(self, rows: Sequence[int], features_RTF: Tensor) -> None:
        """What the next draft step of these rows takes for its first tokens."""
        tokens = features_RTF.shape[1]
        held = self._features_BTF
        if held is None or held.shape[1] < tokens:
            grown = features_RTF.new_zeros(self.target.max_batch, tokens, features_RTF.shape[2])
            if held is not None:
                grown[:, : held.shape[1]] = held
            self._features_BTF = held = grown
        if len(rows) == len(self.rows):  # all of them, in their order
            held[: len(rows), :tokens] = features_RTF
        else:
            held[list(rows), :tokens] = features_RTF

    def _must_ask(self, row: Row, token: int) -> bool:
        """Whether a row asks for a pass because its draft came to an end, or its caller waits too long."""
        if token in self._eos_set and not row.params.ignore_eos:
            return True
        if row.params.stop and row.would_stop(row.pending):
            return True
        return row.params.max_delay is not None and time.monotonic() - row.last_commit >= row.params.max_delay

    # --- choosing tokens --------------------------------------------------------------------------------------------

    def _choose_first(self, logits_1V: Tensor, b: int) -> int:
        chosen_R = self._chosen(logits_1V, [(b, 0)], self.eos_ids)
        _check_chosen(chosen_R)
        return chosen_R[0]

    def _choose_drafted(self, out: StepOutput, drafting: Sequence[int]) -> list[int]:
        assert self.draft_engine is not None
        ids_V = self.draft_engine.token_ids_V
        ahead = [(b, self.rows[b].num_pending) for b in drafting]
        chosen_R = self._chosen(out.logits_RV, ahead, self._draft_eos, out.token_R, ids_V)
        _check_chosen(chosen_R)
        return chosen_R

    def _chosen(
        self,
        logits_RV: Tensor,
        at: Sequence[tuple[int, int]],
        eos: Tensor,
        token_R: Tensor | None = None,
        ids_V: Tensor | None = None,
    ) -> list[int]:
        """The token that each row of logits chooses; -1 where they are no distribution.

        Args:
            at: the row in use that it belongs to, and the tokens of the current round before the one that is chosen.
            eos: columns of end-of-sequence.
            token_R: tokens of the largest logits, if they were found on the way.
            ids_V: tokens of the columns, where they are other numbers.
        """
        free_RV = self._without_early_eos(logits_RV, at, eos)
        is_greedy = all(self.rows[b].params.greedy for b, _ in at)
        if is_greedy and token_R is not None and free_RV is logits_RV:
            return token_R.tolist()
        index_R = most_likely(free_RV) if is_greedy else choose(free_RV, self._sampling(at), ids_V)
        return (index_R if ids_V is None else ids_V[index_R].where(index_R >= 0, -1)).tolist()

    def _sampling(self, at: Sequence[tuple[int, int]]) -> Sampling:
        params = [self.rows[b].params for b, _ in at]
        return Sampling(
            torch.tensor([p.temperature for p in params], dtype=torch.float32),
            torch.tensor([p.top_k for p in params]),
            torch.tensor([p.top_p for p in params], dtype=torch.float32),
            # 64 bits, of which the highest is a sign here.
            torch.tensor([(p.seed + 2**63) % 2**64 - 2**63 for p in params]),
            torch.tensor([self.rows[b].counters.prompt_tokens + self._output_index(b, ahead) for b, ahead in at]),
        )

    def _without_early_eos(self, logits_RV: Tensor, at: Sequence[tuple[int, int]], eos: Tensor) -> Tensor:
        """Takes end-of-sequence from the logits of rows that have to go on; see `_chosen`."""
        if all(row.params.min_tokens == 0 for row in self.rows):
            return logits_RV
        early = torch.tensor([self._output_index(b, ahead) < self.rows[b].params.min_tokens for b, ahead in at])
        return without_tokens(logits_RV, early, eos)

    def _output_index(self, b: int, ahead: int) -> int:
        """Tokens of the output before one that is chosen after `ahead` others of this round."""
        row = self.rows[b]
        return row.counters.emitted - row.released + ahead

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def _commit(self, row: Row, judged: Sequence[bool], verdict: Verdict) -> list[int]:
        """Keeps what the verdict keeps, adds the target's token; returns what has not left yet."""
        start, counters, kept = row.target_length + 1, row.counters, verdict.num_kept
        kept_judged = sum(judged[:kept])
        counters.judged += sum(judged) - 1
        counters.accepted += kept_judged
        counters.trusted += kept - kept_judged
        counters.rolled_back += row.num_pending - kept
        counters.target_passes += 1
        counters.target_tokens += row.num_pending + 1
        row.tokens[start + kept :] = [verdict.next_token]
        # Entries that a conditioned draft made of its own hidden states are made again from the target's features.
        row.draft_length = row.target_length if self.conditioned else min(row.draft_length, start + kept)
        row.target_length = start + kept
        row.reject_prob.clear()
        gained = row.tokens[start + row.released :]
        row.released = 0
        row.last_commit = time.monotonic()
        return gained


def _check_chosen(tokens: Sequence[int]) -> None:
    """Raises EngineError where logits were no distribution to choose from."""
    if min(tokens) < 0:
        raise EngineError(
            "an engine gave logits that are not numbers: its weights are damaged, or their type too narrow"
        )


def _window(tokens: Sequence[int], start: int, width: int) -> list[int]:
    """`width` tokens from `start` on, padded on the right."""
    window = list(tokens[start : start + width])
    return window + [0] * (width - len(window))


def _positions_of(ids: Tensor, ids_V: Tensor | None) -> Tensor:
    """Where `ids` stand in `ids_V`; those that do not are left out."""
    return ids if ids_V is None else torch.isin(ids_V.cpu(), ids).nonzero()[:, 0]
