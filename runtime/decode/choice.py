"""The tokens that rows choose, of a draft's logits as well as the target's.

Shapes: R rows of logits, V columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssv.plugins.reference import most_likely
from ssv.runtime.decode import sampling
from ssv.runtime.decode.logits_processor import Columns, processed
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.sampling import Sampling, choose, filtered, ranked
from ssv.runtime.engines.contract import EngineError

At = Sequence[tuple[int, int]]
"""Of each row of logits, the row in use that it belongs to, and the tokens of the current round before the one that is
chosen."""

Before = Callable[[int], Sequence[int]]
"""Gives these tokens, of a row of logits. Asked for rows alone whose requests change their logits."""


def choices(
    rows: Sequence[Row],
    logits_RV: Tensor,
    at: At,
    columns: Columns,
    token_R: Tensor | None = None,
    before: Before = lambda _: (),
) -> list[int]:
    """The token that each row of logits chooses; -1 where they are no distribution.

    Args:
        token_R: tokens of the largest logits, if they were found on the way.
    """
    own_RV = _own_logits(rows, logits_RV, at, columns, before)
    is_greedy = all(rows[b].params.greedy for b, _ in at)
    if is_greedy and token_R is not None and own_RV is logits_RV:
        return token_R.tolist()
    ids_V = columns.ids_V
    index_R = most_likely(own_RV) if is_greedy else choose(own_RV, _sampling(rows, at), ids_V)
    return (index_R if ids_V is None else ids_V[index_R].where(index_R >= 0, -1)).tolist()


def ranking(
    rows: Sequence[Row], logits_RV: Tensor, at: At, columns: Columns, count: int, before: Before = lambda _: ()
) -> list[tuple[list[int], list[float]]]:
    """The tokens that each row of logits chooses first, second and so on, and their shares (see `ranked`); arguments as
    for `choices`.

    A row has `count` of them, or as many as it can choose from; a single -1 where the logits are no distribution.
    """
    ids_V = columns.ids_V
    own_RV = _own_logits(rows, logits_RV, at, columns, before)
    index_RK, share_RK = ranked(own_RV, _sampling(rows, at), count, ids_V)
    token_RK = index_RK if ids_V is None else ids_V[index_RK.to(ids_V.device)].cpu().where(index_RK >= 0, -1)
    found = []
    for tokens, shares in zip(token_RK.tolist(), share_RK.tolist(), strict=True):
        num = max(sum(token >= 0 for token in tokens), 1)
        found.append((tokens[:num], shares[:num]))
    return found


def scaled(rows: Sequence[Row], logits_RV: Tensor, at: At, columns: Columns, before: Before) -> Tensor:
    """Logits over the temperature of what each row may choose (see `filtered`); arguments as for `choices`."""
    own_RV = _own_logits(rows, logits_RV, at, columns, before)
    return filtered(own_RV, _sampling(rows, at).to(logits_RV.device))


def gaps(
    rows: Sequence[Row], logits_RV: Tensor, at: At, columns: Columns, before: Before, tokens: Sequence[int]
) -> list[float]:
    """By how much what each row of logits chooses is ahead of another token (see `ssv.runtime.decode.sampling.gaps`);
    arguments as for `choices`."""
    own_RV = _own_logits(rows, logits_RV, at, columns, before)
    return sampling.gaps(own_RV, _sampling(rows, at), torch.tensor(tokens))


def check_ranked(rows: Sequence[Row], at: At, ranked: Sequence[tuple[list[int], list[float]]]) -> None:
    """Raises EngineError where logits were no distribution to rank, of rows without a grammar: what that allows may
    have no column among those of a draft."""
    check_chosen(
        [0, *(tokens[0] for (b, _), (tokens, _) in zip(at, ranked, strict=True) if not rows[b].params.grammar)]
    )


def check_chosen(tokens: Sequence[int]) -> None:
    """Raises EngineError where logits were no distribution to choose from."""
    if min(tokens) < 0:
        raise EngineError(
            "an engine gave logits that are not numbers: its weights are damaged, or their type too narrow"
        )


def _sampling(rows: Sequence[Row], at: At) -> Sampling:
    positions = [rows[b].counters.prompt_tokens + rows[b].output_index(ahead) for b, ahead in at]
    return Sampling.of([rows[b].params for b, _ in at], positions)


def _own_logits(rows: Sequence[Row], logits_RV: Tensor, at: At, columns: Columns, before: Before) -> Tensor:
    """The logits as the rows' requests change them."""
    if all(row.processor is None for row in rows):
        return logits_RV
    edits = [
        None if (processor := rows[b].processor) is None
        else processor.edit(rows[b].tokens, before(r), rows[b].output_index(ahead))
        for r, (b, ahead) in enumerate(at)
    ]  # fmt: skip
    return processed(logits_RV, edits, columns)
