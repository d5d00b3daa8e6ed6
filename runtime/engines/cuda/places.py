"""The numbers of a step for the kernels of `ssv.plugins.cuda`: where its tokens lie, what they see, which get logits.

They are one int32 vector, which is copied to the device at once; `decoder.cu` names its parts.

Shapes: B rows and T tokens of the step, M tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssv.runtime.engines.contract import Branches, EngineError

TOKENS, DEPTH = 64, 80
"""Most tokens of a block, and most slots of a path behind its prefix."""

MANY_TOKENS = 512
"""Most tokens of a block of many, none of which has a path. Its vector has its parts in the same order, each of this
size."""

_NUM_TOKENS, _NUM_GATHERED, _NUM_GROUPS, _HAS_PATHS, _NUM_GROWING = range(5)
_HEAD = 8
_ID, _ROW, _SLOT, _SEEN, _PREFIX, _GATHER, _GROUP_FIRST, _GROUP_COUNT, _GROUP_NEW, _GROUP_NUM_NEW = range(10)
_GROW_ROW, _GROW_START, _GROW_LEVEL, _GROW_END, _GROW_FOUND, _PATH = range(10, 16)


def size_of_chains(most_tokens: int) -> int:
    """Numbers of the vector of a block that has room for so many tokens, up to where paths would begin."""
    return _HEAD + _PATH * most_tokens


def size(most_tokens: int) -> int:
    """Numbers of the whole vector."""
    return size_of_chains(most_tokens) + (TOKENS * DEPTH if most_tokens == TOKENS else 0)


SIZE_OF_CHAINS, SIZE = size_of_chains(TOKENS), size(TOKENS)
"""Of what is read of the vector where no token has a path, and of all of it."""

_S_TEMPERATURE, _S_TOP_K, _S_TOP_P, _S_SEED_LOW, _S_SEED_HIGH, _S_AHEAD = range(6)
SETTINGS = 8
"""How a row chooses, in as many numbers; floats are bits."""

_WHOLE = 2**30
"""The prefix of a token of a chain: every slot that it sees is that of its position."""


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens `start` to `stop` of row `b` of a step, as tokens `first` and following of a block."""

    b: int
    start: int
    stop: int
    first: int


@dataclass(frozen=True, slots=True)
class Block:
    """What one replay computes."""

    runs: tuple[Run, ...]
    num_tokens: int


def settings(
    temperature_B: ArrayLike, top_k_B: ArrayLike, top_p_B: ArrayLike, seed_B: ArrayLike, ahead_B: ArrayLike
) -> NDArray[np.int32]:
    """How rows choose, as step.cuh has it, [B, SETTINGS].

    Args:
        seed_B: of 64 bits, with a sign or without.
        ahead_B: by how much the place of the token behind one is more than the number of keys that the one sees.
    """
    seed_B2 = np.asarray(seed_B).view(np.int32).reshape(-1, 2)
    found = np.zeros((len(seed_B2), SETTINGS), dtype=np.int32)
    floats = found.view(np.float32)
    floats[:, _S_TEMPERATURE], floats[:, _S_TOP_P] = temperature_B, top_p_B
    found[:, _S_TOP_K], found[:, _S_AHEAD] = top_k_B, ahead_B
    found[:, _S_SEED_LOW : _S_SEED_HIGH + 1] = seed_B2
    return found


def blocks(counts: Sequence[int], most_tokens: int = TOKENS) -> Iterator[Block]:
    """Cuts a step into blocks; a row's tokens stay in their order, so that each finds those before it in the cache.

    Args:
        counts: tokens of each row that are no padding.
        most_tokens: of a block.
    """
    runs: list[Run] = []
    filled = 0
    for b, count in enumerate(counts):
        start = 0
        while start < count:
            stop = min(count, start + most_tokens - filled)
            runs.append(Run(b, start, stop, filled))
            filled += stop - start
            start = stop
            if filled == most_tokens:
                yield Block(tuple(runs), filled)
                runs, filled = [], 0
    if runs:
        yield Block(tuple(runs), filled)


def write(
    numbers: NDArray[np.int32],
    block: Block,
    ids_BT: NDArray[np.int64],
    first_slots: Sequence[int],
    first_row: int,
    gathered: Sequence[int],
    branches: Branches | None,
    group_tokens: int,
    most_tokens: int = TOKENS,
) -> int:
    """Writes a block's numbers.

    Args:
        gathered: tokens of the block that get logits.
        group_tokens: most tokens that a block of the attention kernel takes.
        most_tokens: that the vector has room for.

    Returns:
        Keys that the token which sees most of them sees.

    Raises:
        EngineError: a path longer than `DEPTH`.
    """
    if branches is not None and branches.path_BTD.shape[2] > DEPTH:
        raise EngineError(f"branches of {branches.path_BTD.shape[2]} tokens: the engine has room for {DEPTH}")

    def part(index: int) -> NDArray[np.int32]:
        return _part(numbers, index, most_tokens)

    groups = most_seen = 0
    for run in block.runs:
        num, here = run.stop - run.start, slice(run.first, run.first + run.stop - run.start)
        slots = np.arange(first_slots[run.b] + run.start, first_slots[run.b] + run.stop, dtype=np.int32)
        part(_ID)[here] = ids_BT[run.b, run.start : run.stop]
        part(_ROW)[here] = first_row + run.b
        part(_SLOT)[here] = slots
        if branches is None:
            seen, prefix = slots + 1, _WHOLE
        else:
            path_TD = branches.path_BTD[run.b, run.start : run.stop].numpy()
            prefix = int(branches.prefix_B[run.b])
            seen = prefix + (path_TD >= 0).sum(axis=1, dtype=np.int32)
            numbers[SIZE_OF_CHAINS:].reshape(TOKENS, DEPTH)[here, : path_TD.shape[1]] = path_TD
        part(_SEEN)[here] = seen
        part(_PREFIX)[here] = prefix
        most_seen = max(most_seen, int(seen.max()))
        firsts = np.arange(run.first, run.first + num, group_tokens, dtype=np.int32)
        there = slice(groups, groups + len(firsts))
        part(_GROUP_FIRST)[there] = firsts
        part(_GROUP_COUNT)[there] = np.minimum(run.first + num - firsts, group_tokens)
        part(_GROUP_NEW)[there] = run.first
        part(_GROUP_NUM_NEW)[there] = num
        groups += len(firsts)
    part(_GATHER)[: len(gathered)] = gathered
    numbers[[_NUM_TOKENS, _NUM_GATHERED, _NUM_GROUPS, _HAS_PATHS]] = (
        block.num_tokens,
        len(gathered),
        groups,
        branches is not None,
    )
    return most_seen


def write_growing(numbers: NDArray[np.int32], rows: Sequence[int], ends: Sequence[int]) -> None:
    """Writes which rows' trees grow behind a step of their texts.

    Args:
        rows: of the cache.
        ends: slots of each text, with those of the step.
    """
    for at, values in ((_GROW_ROW, rows), (_GROW_START, ends), (_GROW_END, ends), (_GROW_LEVEL, 0), (_GROW_FOUND, 0)):
        _part(numbers, at)[: len(rows)] = values
    numbers[_NUM_GROWING] = len(rows)


def _part(numbers: NDArray[np.int32], index: int, most_tokens: int = TOKENS) -> NDArray[np.int32]:
    return numbers[_HEAD + index * most_tokens :][:most_tokens]
