"""The engine contract: a function over a KV cache, which knows nothing of speculation.

Shapes: B rows of the step (a run of rows of the cache), T tokens, M = B * T, R gathered rows, H hidden, V vocab
(of the engine's LM head), F features, S cache length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ssv.support.errors import UserError


class EngineError(UserError):
    """A step or an engine that cannot be; the message says what was asked and what is possible."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step returns.

    Attributes:
        hidden_RH: hidden states of the gathered rows before the final norm.
        logits_RV: fp32.
        features_BTF: features of all tokens, if they were asked for.
        reject_prob_R: draft with a scorer: probability that the target would reject the row's argmax; otherwise None.
        token_R: vocabulary id of each row's argmax, int64, from an engine that finds it on its way.
    """

    hidden_RH: Tensor
    logits_RV: Tensor
    features_BTF: Tensor | None = None
    reject_prob_R: Tensor | None = None
    token_R: Tensor | None = None


class Engine(Protocol):
    """A decoder over its own KV cache.

    Attributes:
        max_batch, max_length: rows of the cache, and tokens that each can hold.
        vocab_size: V.
        num_features: F of `features_in`, for a feature-conditioned draft, otherwise 0.
        has_scorer: whether steps return `reject_prob_R`.
        token_ids_V: vocabulary id of each logit, int64; None where logit i is token i.
    """

    max_batch: int
    max_length: int
    vocab_size: int
    num_features: int
    has_scorer: bool
    token_ids_V: Tensor | None

    def step(
        self,
        input_ids_BT: Tensor,
        position_B: Tensor,
        gather_rows_R: Tensor,
        features_in_BTF: Tensor | None = None,
        *,
        count_B: Tensor | None = None,
        features_out: bool = False,
        first_row: int = 0,
    ) -> StepOutput:
        """Runs T tokens of B rows and stores their keys and values.

        Token t of row b is at position `position_B[b] + t` and sees the cache up to itself: prefill, decoding, ragged
        verification and decoding after a rollback are one and the same call. Rows with fewer than T tokens are
        right-padded; what padding writes lies beyond the row's length and is overwritten by its next step.

        Args:
            input_ids_BT: int64.
            position_B: int32, tokens already in each row's cache.
            gather_rows_R: int64, rows of the flattened [B * T] hidden states that get logits.
            features_in_BTF: for a feature-conditioned draft.
            count_B: int32, tokens of each row that are no padding, 0 to T; None where all rows have T. An engine may leave padding out.
            features_out: whether the features of all tokens are wanted, from a target that has a tap.
            first_row: cache row of the step's first row; the others follow it.

        Raises:
            EngineError: more rows than the cache has, or a token beyond its length.
        """
        ...

    def move_row(self, source: int, dest: int, length: int) -> None:
        """Copies the first `length` positions of one cache row over another."""
        ...

    def read_cache(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of what a cache row holds of positions `start` to `stop`, in a form of the engine's own, on its device."""
        ...

    def write_cache(self, row: int, start: int, held: Tensor) -> None:
        """Puts what `read_cache` gave into a row, from position `start` on."""
        ...


def check_step(
    engine: Engine,
    input_ids_BT: Tensor,
    position_B: Tensor,
    gather_rows_R: Tensor,
    features_in_BTF: Tensor | None,
    count_B: Tensor | None,
    first_row: int,
) -> None:
    """Raises EngineError for a step that the cache has no room for, that lacks its features, or whose indices point elsewhere:
    compiled code reads and writes where they say."""
    batch, tokens = input_ids_BT.shape
    # Plain numbers: at one token a step a reduction costs several times its list.
    positions, gathered = position_B.tolist(), gather_rows_R.tolist()
    if position_B.shape != (batch,):
        raise EngineError(f"position has shape {tuple(position_B.shape)}, the step has {batch} rows")
    if position_B.dtype != torch.int32 or min(positions) < 0:
        raise EngineError(f"position must be int32 and not negative, got {position_B.dtype} {positions}")
    if gathered and not 0 <= min(gathered) <= max(gathered) < batch * tokens:
        raise EngineError(f"gather_rows {gathered} lie outside the step's {batch * tokens} rows")
    if count_B is not None:
        counts = count_B.tolist()
        if count_B.shape != (batch,) or count_B.dtype != torch.int32 or not 0 <= min(counts) <= max(counts) <= tokens:
            raise EngineError(
                f"count must be int32, 0 to {tokens} for each of {batch} rows, got {count_B.dtype} {counts}"
            )
        if padding := [row for row in gathered if row % tokens >= counts[row // tokens]]:
            raise EngineError(f"gather_rows {padding} are padding: the rows have {counts} tokens of {tokens}")
    last_position = max(positions)
    if first_row < 0:
        raise EngineError(f"first_row {first_row} is negative")
    if first_row + batch > engine.max_batch:
        raise EngineError(
            f"step of rows {first_row} to {first_row + batch - 1}, the engine's cache has {engine.max_batch}"
        )
    if last_position + tokens > engine.max_length:
        raise EngineError(
            f"step writes position {last_position + tokens - 1}, the cache holds {engine.max_length}",
            "build or load the engine with a larger max length",
        )
    given = None if features_in_BTF is None else tuple(features_in_BTF.shape)
    wanted = (batch, tokens, engine.num_features) if engine.num_features else None
    if given != wanted:
        raise EngineError(f"features_in has shape {given}, expected {wanted}")
