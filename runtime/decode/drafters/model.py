"""A draft model proposes token after token, each with the scorer's probability that the target rejects it.

Conditioned drafts take the target's features (EAGLE-3, Li et al. 2025, arXiv:2503.01840); standalone ones are language models of their own.

Shapes: B rows in use, T tokens of a step, R gathered rows, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssv.runtime.decode.choice import check_chosen, choices
from ssv.runtime.decode.drafters.contract import Drafter
from ssv.runtime.decode.row import Row, padded
from ssv.runtime.engines.contract import Engine, EngineError, StepOutput


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """What a chunk of a prompt left in the draft.

    Attributes:
        cache: see `Engine.read_cache`.
        last_feature_11F: of the chunk's last token, for a conditioned draft.
    """

    cache: Tensor
    last_feature_11F: Tensor | None

    @property
    def num_bytes(self) -> int:
        parts = (self.cache, self.last_feature_11F)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


class ModelDrafter(Drafter):
    """A draft engine over the rows of a batch.

    A conditioned draft's entry i joins token i + 1 with the features of token i, so its cache runs one token behind.
    """

    has_cache = True

    def __init__(self, target: Engine, engine: Engine, eos_ids: Tensor) -> None:
        """Args:
        engine: with as many rows as the target's.
        eos_ids: int64.
        """
        if engine.max_batch < target.max_batch:
            raise EngineError(
                f"the draft's cache has {engine.max_batch} rows, the target's {target.max_batch}", "make them the same"
            )
        self.engine, self.has_scores = engine, engine.has_scorer
        self.needs_features = engine.num_features > 0
        self._offset = 1 if self.needs_features else 0
        self._max_batch, self._eos_ids = target.max_batch, frozenset(eos_ids.tolist())
        self._eos_columns = _positions_of(eos_ids, engine.token_ids_V)
        # What the next step of each row takes for its first tokens.
        self._features_BTF: Tensor | None = None
        # Of the last token of the prompt that joins.
        self._last_feature_11F: Tensor | None = None

    # --- prompts ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._last_feature_11F = None

    def prefill(self, b: int, ids_1T: Tensor, start: int, stop: int, features_BTF: Tensor | None) -> None:
        """Makes the entries up to the one that waits for a token after the chunk."""
        first, last = self._entries(start, stop)
        if self.needs_features:
            assert features_BTF is not None
            held = self._last_feature_11F
            self._last_feature_11F = features_BTF[:, -1:].clone()
            features_BTF = features_BTF[:, :-1] if held is None else torch.cat((held, features_BTF[:, :-1]), dim=1)
        if last > first:
            ids = ids_1T[:, first + self._offset : last + self._offset]
            no_rows = torch.empty(0, dtype=torch.long)
            at = torch.tensor([first], dtype=torch.int32)
            self.engine.step(ids, at, no_rows, features_BTF, first_row=b)

    def join(self, b: int, row: Row) -> None:
        row.draft_length = row.target_length - self._offset
        if self._last_feature_11F is not None:
            self._hold([b], b + 1, self._last_feature_11F)

    def snapshot(self, b: int, start: int, stop: int) -> DraftBlock:
        return DraftBlock(self.engine.read_cache(b, *self._entries(start, stop)), self._last_feature_11F)

    def restore(self, b: int, start: int, stop: int, block: DraftBlock) -> None:
        self.engine.write_cache(b, self._entries(start, stop)[0], block.cache)
        self._last_feature_11F = block.last_feature_11F

    def _entries(self, start: int, stop: int) -> tuple[int, int]:
        """Those that tokens `start` to `stop` of a prompt complete."""
        return max(start - self._offset, 0), stop - self._offset

    # --- rounds -----------------------------------------------------------------------------------------------------

    def propose(self, rows: Sequence[Row], limits: Sequence[int]) -> None:
        drafting = [b for b, limit in enumerate(limits) if limit > 0]
        while drafting:
            out = self._step(rows, drafting)
            ahead = [(b, rows[b].num_pending) for b in drafting]
            tokens = choices(rows, out.logits_RV, ahead, self._eos_columns, out.token_R, self.engine.token_ids_V)
            check_chosen(tokens)
            scored = out.reject_prob_R.tolist() if out.reject_prob_R is not None else [0.0] * len(drafting)
            for b, token, reject_prob in zip(drafting, tokens, scored, strict=True):
                rows[b].propose(token, reject_prob)
            drafting = [b for b in drafting if not rows[b].asks_for_pass(limits[b], self._eos_ids)]

    def observe(self, rows: Sequence[Row], features_BTF: Tensor | None) -> None:
        if features_BTF is not None:
            self._hold(range(len(rows)), len(rows), features_BTF)

    def commit(self, row: Row, length: int) -> None:
        # Entries that a conditioned draft made of its own hidden states are made again from the target's features.
        row.draft_length = row.target_length if self.needs_features else min(row.draft_length, length)

    def move(self, source: int, dest: int, row: Row) -> None:
        self.engine.move_row(source, dest, row.draft_length)
        if self._features_BTF is not None:
            self._features_BTF[dest] = self._features_BTF[source]

    def move_joining(self, source: int, dest: int, done: int) -> None:
        self.engine.move_row(source, dest, max(done - self._offset, 0))

    def _step(self, rows: Sequence[Row], drafting: Sequence[int]) -> StepOutput:
        """Feeds each drafting row what the draft has not seen yet; the others are padding."""
        starts = [row.draft_length for row in rows]
        counts = [len(rows[b].tokens) - self._offset - starts[b] for b in drafting]
        width = max(counts)
        all_counts = [0] * len(rows)
        for b, count in zip(drafting, counts, strict=True):
            all_counts[b] = count
        windows = [padded(row.tokens, row.draft_length + self._offset, width) for row in rows]
        out = self.engine.step(
            torch.tensor(windows),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([b * width + count - 1 for b, count in zip(drafting, counts, strict=True)]),
            self._features_BTF[: len(rows), :width] if self._features_BTF is not None else None,
            count_B=torch.tensor(all_counts, dtype=torch.int32),
        )
        for b, count in zip(drafting, counts, strict=True):
            rows[b].draft_length += count
        if self.needs_features:
            self._hold(drafting, len(rows), out.hidden_RH[:, None])
        return out

    def _hold(self, rows: Sequence[int], num_rows: int, features_RTF: Tensor) -> None:
        tokens = features_RTF.shape[1]
        held = self._features_BTF
        if held is None or held.shape[1] < tokens:
            grown = features_RTF.new_zeros(self._max_batch, tokens, features_RTF.shape[2])
            if held is not None:
                grown[:, : held.shape[1]] = held
            self._features_BTF = held = grown
        if len(rows) == num_rows:  # all of them, in their order
            held[: len(rows), :tokens] = features_RTF
        else:
            held[list(rows), :tokens] = features_RTF


def _positions_of(ids: Tensor, ids_V: Tensor | None) -> Tensor:
    """Where `ids` stand in `ids_V`; those that do not are left out."""
    return ids if ids_V is None else torch.isin(ids_V.cpu(), ids).nonzero()[:, 0]
