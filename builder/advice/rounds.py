"""What rounds take beside the steps of their engines: the host grows trees, ranks guesses, judges them and hands text
on. `ssv.runtime.decode.costs` measures steps alone, and decoding decides by these what pays; its speed is another
matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from ssv.bundle.policy import Policy, verify_all
from ssv.runtime.counters import Counters
from ssv.runtime.request import Request, SamplingParams

if TYPE_CHECKING:
    from ssv.runtime.llm import LLM

Decode = Callable[[tuple[int, ...], Policy, int], Counters]
"""Decodes a prompt by a policy, greedily, to at most so many tokens; tells its counters."""

NUM_PROMPTS = 3
"""That are decoded by each shape."""

SHAPES = (
    verify_all(0),
    verify_all(3),
    verify_all(12, children=(4,), beam=4, max_depth=3),
    verify_all(48, children=(8,), beam=8, max_depth=6),
)
"""What is decoded by: none of them is a method whose speed is predicted, but plain decoding."""

MOST_BESIDE = 0.5
"""Of a step: with more than that beside it a round is that of a busy machine, or of a tiny model. On two idle cores it
is 0.04 to 0.08 of the demo's."""

MAX_TOKENS = 48
"""Of each output. The last rounds of an output draft less, and are few."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds of a round beside its steps.

    Attributes:
        round: of any.
        level: more, for each step of the draft.
        guess: more, for each token that it guesses, whether it is verified or not.
    """

    round: float = 0.0
    level: float = 0.0
    guess: float = 0.0

    def doubts(self, step: float) -> str | None:
        """What makes it doubtful, in words; None where nothing does.

        Args:
            step: seconds of a pass of one token.
        """
        if self.round <= MOST_BESIDE * step:
            return None
        return f"a round of plain decoding took {1 + self.round / step:.1f} times its step. Is the machine idle?"

    def of(self, levels: float, guesses: float) -> float:
        """Seconds of a round of so many steps of the draft and guesses."""
        return self.round + self.level * levels + self.guess * guesses


NOTHING = Overhead()
"""Of shapes alone, where no round can be run."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A round of some shape, as it was measured and as its steps explain it.

    Attributes:
        levels, guesses: see `Overhead.of`.
        seconds: that it took.
        steps: that its steps take, by costs.
    """

    levels: float
    guesses: float
    seconds: float
    steps: float


def fitted(rounds: Sequence[Timed]) -> Overhead:
    """The overhead that explains best what steps do not, relative to a round's seconds; none of its parts is below
    0. Without rounds nothing is known of it."""
    if not rounds:
        return NOTHING
    weight = np.array([1 / each.seconds for each in rounds])
    columns = np.array([[1.0, each.levels, each.guesses] for each in rounds]) * weight[:, None]
    left = np.array([each.seconds - each.steps for each in rounds]) * weight
    best, best_error = np.zeros(3), float(np.square(left).sum())
    for count in (1, 2, 3):
        for some in map(list, combinations(range(3), count)):
            found = np.zeros(3)
            found[some] = np.linalg.lstsq(columns[:, some], left, rcond=None)[0]
            error = float(np.square(left - columns @ found).sum())
            if (found >= 0).all() and error < best_error:
                best, best_error = found, error
    return Overhead(*best.tolist())


def seconds_of_rounds(prompts: Sequence[tuple[int, ...]], decode: Decode) -> list[tuple[Policy, float]]:
    """Decodes some prompts by each of `SHAPES`, in turns; tells what a round takes behind the first token, for the
    middle one of the prompts.

    Args:
        prompts: token ids, of which the first few are taken.

    Returns:
        Each shape that had a round, with its seconds.
    """
    found: dict[Policy, list[float]] = {shape: [] for shape in SHAPES}
    decode(prompts[0], SHAPES[-1], MAX_TOKENS)  # the first steps of each size are slower
    for number, prompt in enumerate(prompts[:NUM_PROMPTS]):
        for turn in range(len(SHAPES)):
            shape = SHAPES[(number + turn) % len(SHAPES)]
            counters = decode(prompt, shape, MAX_TOKENS)
            if counters.target_passes:
                found[shape].append((counters.total_s - counters.first_token_s) / counters.target_passes)
    return [(shape, median(seconds)) for shape, seconds in found.items() if seconds]


def decoding(llm: LLM) -> Decode:
    """Decoding by an LLM."""

    def decode(prompt: tuple[int, ...], policy: Policy, max_tokens: int) -> Counters:
        request = Request(prompt, "speculative", SamplingParams(max_tokens=max_tokens), policy=policy)
        return llm.generate([request])[0].counters

    return decode
