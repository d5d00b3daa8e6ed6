"""Who is asked what, and when: every arm the same prompts with the same seeds, in turns.

A block is some prompts, which run together at one concurrency. Every arm runs it twice: the arms in a random order,
then in the reverse of that order (A B B A), so that a machine that becomes slower all the time slows all arms alike.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ssv.support.errors import UserError


@dataclass(frozen=True, slots=True)
class Turn:
    """One arm's go at a block.

    Attributes:
        block: number in the run; `repeat`: 0 or 1.
        prompts: indices.
    """

    concurrency: int
    block: int
    arm: str
    repeat: int
    prompts: tuple[int, ...]


def block_size(concurrency: int, blocks_of: int | None) -> int:
    """Prompts of a block: as many as were asked for, and no fewer than run together."""
    return max(concurrency, blocks_of or concurrency)


def make_plan(
    num_prompts: int, arms: Sequence[str], concurrencies: Sequence[int], *, blocks_of: int | None, seed: int
) -> list[Turn]:
    """Turns in the order in which they are to run.

    Args:
        blocks_of: prompts a block; None for as many as run together. What is left over goes to the last block.

    Raises:
        UserError: a concurrency above the number of prompts.
    """
    # Blocks do not depend on the arms: runs of other arms can be compared block by block.
    rng, rng_of_arms = random.Random(seed), random.Random(f"arms {seed}")
    turns: list[Turn] = []
    block = 0
    for concurrency in concurrencies:
        size = block_size(concurrency, blocks_of)
        if size > num_prompts:
            raise UserError(
                f"{num_prompts} prompts do not fill a block of {size}, for concurrency {concurrency}",
                "give more prompts",
            )
        order = rng.sample(range(num_prompts), num_prompts)
        starts = range(0, num_prompts - size + 1, size)
        for start in starts:
            end = num_prompts if start == starts[-1] else start + size
            arms_in_turn = rng_of_arms.sample(list(arms), len(arms))
            for repeat, going in enumerate((arms_in_turn, arms_in_turn[::-1])):
                turns.extend(Turn(concurrency, block, arm, repeat, tuple(order[start:end])) for arm in going)
            block += 1
    return turns


def seed_of(seed: int, prompt_id: str, repeat: int) -> int:
    """Seed of a request, 31 bits: the same for all arms."""
    digest = hashlib.sha256(f"{seed} {repeat} {prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
