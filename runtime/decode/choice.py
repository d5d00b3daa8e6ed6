"""The tokens that rows choose, of a draft's logits as well as the target's.

Shapes: R rows of logits, V columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssv.plugins.reference import most_likely
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.sampling import Sampling, choose, filtered, ranked, without_tokens
from ssv.runtime.engines.contract import EngineError

At = Sequence[tuple[int, int]]
"""Of each row of logits, the row in use that it belongs to, and the tokens of the current round before the one that is
chosen."""


def choices(
    rows: Sequence[Row],
    logits_RV: Tensor,
    at: At,
    eos: Tensor,
    token_R: Tensor | None = None,
    ids_V: Tensor | None = None,
) -> list[int]:
    """The token that each row of logits chooses; -1 where they are no distribution.

    Args:
        eos: columns of end-of-sequence.
        token_R: tokens of the largest logits, if they were found on the way.
        ids_V: tokens of the columns, where they are other numbers.
    """
    free_RV = _without_early_eos(rows, logits_RV, at, eos)
    is_greedy = all(rows[b].params.greedy for b, _ in at)
    if is_greedy and token_R is not None and free_RV is logits_RV:
        return token_R.tolist()
    index_R = most_likely(free_RV) if is_greedy else choose(free_RV, _sampling(rows, at), ids_V)
    return (index_R if ids_V is None else ids_V[index_R].where(index_R >= 0, -1)).tolist()


def ranking(
    rows: Sequence[Row], logits_RV: Tensor, at: At, eos: Tensor, count: int, ids_V: Tensor | None = None
) -> list[tuple[list[int], list[float]]]:
    """The tokens that each row of logits chooses first, second and so on, and their shares (see `ranked`); arguments as
    for `choices`.

    A row has `count` of them, or as many as it can choose from; a single -1 where the logits are no distribution.
    """
    index_RK, share_RK = ranked(_without_early_eos(rows, logits_RV, at, eos), _sampling(rows, at), count, ids_V)
    token_RK = index_RK if ids_V is None else ids_V[index_RK.to(ids_V.device)].cpu().where(index_RK >= 0, -1)
    found = []
    for tokens, shares in zip(token_RK.tolist(), share_RK.tolist(), strict=True):
        num = max(sum(token >= 0 for token in tokens), 1)
        found.append((tokens[:num], shares[:num]))
    return found


def scaled(rows: Sequence[Row], logits_RV: Tensor, at: At, eos: Tensor) -> Tensor:
    """Logits over the temperature of what each row may choose (see `filtered`); arguments as for `choices`."""
    free_RV = _without_early_eos(rows, logits_RV, at, eos)
    return filtered(free_RV, _sampling(rows, at).to(logits_RV.device))


def columns_of(ids: Tensor, ids_V: Tensor | None) -> Tensor:
    """Columns of logits whose tokens are among `ids`; those that have none are left out."""
    return ids if ids_V is None else torch.isin(ids_V.cpu(), ids).nonzero()[:, 0]


def check_chosen(tokens: Sequence[int]) -> None:
    """Raises EngineError where logits were no distribution to choose from."""
    if min(tokens) < 0:
        raise EngineError(
            "an engine gave logits that are not numbers: its weights are damaged, or their type too narrow"
        )


def _sampling(rows: Sequence[Row], at: At) -> Sampling:
    positions = [rows[b].counters.prompt_tokens + rows[b].output_index(ahead) for b, ahead in at]
    return Sampling.of([rows[b].params for b, _ in at], positions)


def _without_early_eos(rows: Sequence[Row], logits_RV: Tensor, at: At, eos: Tensor) -> Tensor:
    """Takes end-of-sequence from the logits of rows that have to go on."""
    if all(row.params.min_tokens == 0 for row in rows):
        return logits_RV
    early = torch.tensor([rows[b].output_index(ahead) < rows[b].params.min_tokens for b, ahead in at])
    return without_tokens(logits_RV, early, eos)
