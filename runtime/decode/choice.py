"""The tokens that rows choose, of a draft's logits as well as the target's.

Shapes: R rows of logits, V columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ssv.plugins.reference import most_likely
from ssv.runtime.decode import sampling
from ssv.runtime.decode.logits_processor import Columns, processed
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.sampling import Sampling, choose, filtered, ranked
from ssv.runtime.engines.contract import EngineError

T = TypeVar("T")

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

    def ask(some_RV: Tensor, some_at: At) -> list[int]:
        return _chosen(rows, some_RV, some_at, columns, token_R if some_RV is logits_RV else None)

    return _asked(rows, logits_RV, at, columns, before, ask, lambda token: [token])


def ranking(
    rows: Sequence[Row], logits_RV: Tensor, at: At, columns: Columns, count: int, before: Before = lambda _: ()
) -> list[tuple[list[int], list[float]]]:
    """The tokens that each row of logits chooses first, second and so on, and their shares (see `ranked`); arguments as
    for `choices`.

    A row has `count` of them, or as many as it can choose from; a single -1 where the logits are no distribution. Where
    a grammar allows all of them anyhow, shares are of all tokens, and of those that it allows elsewhere.
    """

    def ask(some_RV: Tensor, some_at: At) -> list[tuple[list[int], list[float]]]:
        return _ranked(rows, some_RV, some_at, columns, count)

    return _asked(rows, logits_RV, at, columns, before, ask, lambda found: found[0])


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


def _chosen(
    rows: Sequence[Row], logits_RV: Tensor, at: At, columns: Columns, token_R: Tensor | None = None
) -> list[int]:
    """`choices` of logits as they are."""
    is_greedy = all(rows[b].params.greedy for b, _ in at)
    if is_greedy and token_R is not None:
        return token_R.tolist()
    ids_V = columns.ids_V
    index_R = most_likely(logits_RV) if is_greedy else choose(logits_RV, _sampling(rows, at), ids_V)
    return (index_R if ids_V is None else ids_V[index_R].where(index_R >= 0, -1)).tolist()


def _ranked(
    rows: Sequence[Row], logits_RV: Tensor, at: At, columns: Columns, count: int
) -> list[tuple[list[int], list[float]]]:
    """`ranking` of logits as they are."""
    ids_V = columns.ids_V
    index_RK, share_RK = ranked(logits_RV, _sampling(rows, at), count, ids_V)
    token_RK = index_RK if ids_V is None else ids_V[index_RK.to(ids_V.device)].cpu().where(index_RK >= 0, -1)
    found = []
    for tokens, shares in zip(token_RK.tolist(), share_RK.tolist(), strict=True):
        num = max(sum(token >= 0 for token in tokens), 1)
        found.append((tokens[:num], shares[:num]))
    return found


def _asked(
    rows: Sequence[Row],
    logits_RV: Tensor,
    at: At,
    columns: Columns,
    before: Before,
    ask: Callable[[Tensor, At], list[T]],
    tokens_of: Callable[[T], Sequence[int]],
) -> list[T]:
    """What is chosen of each row of logits: of what they are, where that may stay, and else of what the rows' requests
    make of them.

    Args:
        ask: chooses of some rows of logits, which stand at these places.
        tokens_of: that were chosen of one.
    """
    if all(row.processor is None for row in rows):
        return ask(logits_RV, at)
    may_keep = _may_keep(rows, at)
    if not any(may_keep):
        return ask(_own_logits(rows, logits_RV, at, columns, before), at)
    found = ask(logits_RV, at)
    rest = [
        r
        for r, (b, ahead) in enumerate(at)
        if not (may_keep[r] and _keeps(rows[b], before, r, ahead, tokens_of(found[r])))
    ]
    if rest:
        for r, own in zip(rest, ask(*_own_part(rows, logits_RV, at, columns, before, rest)), strict=True):
            found[r] = own
    return found


def _may_keep(rows: Sequence[Row], at: At) -> list[bool]:
    """Tells of each row of logits whether a choice may stay what it would be without its request's changes: to ask a
    grammar about one token takes a hundredth of the time of a mask over all of them."""
    return [(own := rows[b].processor) is None or own.may_keep(rows[b].output_index(ahead)) for b, ahead in at]


def _keeps(row: Row, before: Before, r: int, ahead: int, tokens: Sequence[int]) -> bool:
    """Whether all these choices of a row of logits stay, where `_may_keep` says that they may."""
    if row.processor is None:
        return True
    path, num_output = before(r), row.output_index(ahead)
    return all(row.processor.keeps(row.tokens, path, num_output, token) for token in tokens)


def _own_part(
    rows: Sequence[Row], logits_RV: Tensor, at: At, columns: Columns, before: Before, part: Sequence[int]
) -> tuple[Tensor, At]:
    """Some of the rows of logits, as the rows' requests change them, and where these are."""
    part_at = [at[r] for r in part]
    part_RV = logits_RV if len(part) == len(at) else logits_RV[torch.tensor(part, device=logits_RV.device)]
    return _own_logits(rows, part_RV, part_at, columns, lambda i: before(part[i])), part_at


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
