"""What of a draft is worth its cost, by what steps cost here.

Drafting pays if it raises the tokens per second. A tree whose nodes survive with probabilities s gives 1 + sum s tokens
a round; the round costs its draft steps and one pass over 1 + nodes tokens. Something more is worth it if its tokens
over its seconds are more than the whole's so far.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from statistics import median

import torch

from ssv.bundle.policy import MAX_PENDING
from ssv.bundle.profile import Conditions, Costs, Curve
from ssv.runtime.decode.sampling import Sampling, ranked
from ssv.runtime.engines.contract import Engine, GrowingEngine, StepOutput, TreeShape
from ssv.runtime.threads import CpuTimes, read_cpu_times
from ssv.support.environment import cpu_model

FIRST_GUESSES = (0.26, 0.45, 0.67, 0.9, 0.99)
"""What a first guess may turn out to be worth before it is drafted, each as likely as the others: shares of the demo's
draft, corrected, on its calibration prompts, in fifths."""

MOST_TEXT = 4
"""Tokens of its text that a row is priced at in a first draft step, at the most: about what it catches up with if it
drafts in every round. A row that has not drafted for long would never find it worth to catch up."""


USUAL = Costs(
    target=Curve(tokens=(1, 2, 4, 8, 16, 32, 64), seconds=(1.0, 1.0, 1.2, 1.4, 2.1, 3.7, 7.0)),
    draft=Curve(tokens=(1, 2, 4, 8, 16), seconds=(0.12, 0.12, 0.13, 0.21, 0.39)),
    text=0.0013,
)
"""In passes of one token: what the trees of lossy rows go by where nobody has recorded costs. Those of the demo in int8
on two cores with AVX-512 VNNI."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What is worth drafting and verifying, for one of the rows that share a round, each taken to do as this one does.

    Attributes:
        sharing: rows that share a draft step; the others need none, or no further one.
        recorded: costs that the bundle has for this place; None where it has none.
        blocks: see `BlockEngine.blocks`; None of an engine that runs no blocks.
    """

    costs: Costs
    num_rows: int
    sharing: int = 1
    recorded: Costs | None = None
    blocks: Callable[[int], Sequence[int]] | None = None

    def _pass(self, nodes: float) -> float:
        """A row's part of a pass over root and nodes."""
        return self.costs.target.at(self.num_rows * (1 + nodes)) / self.num_rows

    def alone(self) -> Prices:
        """The prices of a row by itself, by costs that are always the same: the text of a lossy one must not depend on
        its company, nor on what was measured when the engines were loaded."""
        return Prices(self.recorded or USUAL, 1)

    def of_draft(self, width: float) -> float:
        """A row's part of a draft step of so many tokens of each."""
        return self.costs.draft.at(self.sharing * width) / self.sharing

    def of_round(self, nodes: float, levels: int, width: int) -> float:
        """A row's part of a round: levels of trees that an engine grows by itself, each of so many nodes a row, and a
        pass over those that are kept; without levels of a pass alone."""
        growth = self.costs.begin + levels * self.costs.draft.at(self.sharing * width) if levels else 0.0
        return self._pass(nodes) + growth / self.sharing

    def worth_beginning(
        self, text_tokens: Sequence[int], kept: Sequence[Sequence[float]], left_over: Sequence[float]
    ) -> bool:
        """Whether rows shall have a draft at all: together, as the step that begins a draft costs little more for all
        than for one.

        Args:
            text_tokens: of each of them, tokens of the text that the draft has not seen, which that step runs.
            kept: of each, survival of the nodes that it has without a draft.
            left_over: of each, probability that none of these is the next token.
        """
        taken_in = sum(min(count, MOST_TEXT) - 1 for count in text_tokens)
        step = self.costs.draft.at(len(text_tokens)) + self.costs.text * taken_in
        saved = 0.0
        for survival, left in zip(kept, left_over, strict=True):
            rate = (1 + sum(survival)) / self._pass(len(survival))
            saved += _hoped(left, rate * self._further(len(survival))) / rate
        return saved > step

    def _further(self, nodes: int) -> float:
        """Seconds that a further node adds to a row's part of a pass over so many."""
        return self._pass(nodes + 1) - self._pass(nodes)

    def worth_verifying(self, survival: Sequence[float]) -> int:
        """How many nodes are worth a place in the pass, once they have been drafted.

        Args:
            survival: of the nodes, the largest first.
        """
        passes = _passes(self.costs.target, self.num_rows)
        return _most_per_second(1.0, survival, passes.__getitem__)

    def worth_together(self, survival: Sequence[float], others: Sequence[float] = ()) -> int:
        """How many nodes of all rows are worth a place in the pass that these share: a block more, which one row alone
        would not fill, may be worth it for some.

        Args:
            survival: of nodes of any rows, the largest first.
            others: of nodes that are verified in any case.
        """
        taken = self.num_rows + len(others)
        return _most_per_second(self.num_rows + sum(others), survival, lambda count: self._shared(taken + count))

    def _shared(self, tokens: int) -> float:
        """Seconds of a pass over so many tokens of all rows."""
        at = self.costs.target.at
        return at(tokens) if self.blocks is None else sum(map(at, self.blocks(tokens)))

    def worth_opening(self, kept: Sequence[float], survival: Sequence[float], spent: float = 0.0) -> int:
        """How many nodes are worth a further step of the draft, which gives them children.

        Args:
            kept: survival of the nodes that are worth verifying so far.
            survival: of those that may get children, the largest first; less what was found behind them.
            spent: seconds of the draft steps so far.
        """
        nodes = len(kept)
        rate = (1 + sum(kept)) / (self._pass(nodes) + spent)
        further = rate * self._further(nodes)
        best, best_surplus, gain = 0, 0.0, 0.0
        for count, s in enumerate(survival, start=1):
            gain += _hoped(s, further)
            if (surplus := gain - rate * self.of_draft(count)) > best_surplus:
                best, best_surplus = count, surplus
        return best


def _most_per_second(tokens: float, survival: Sequence[float], seconds: Callable[[int], float]) -> int:
    """How many nodes, the likeliest first, give the most tokens per second.

    Args:
        tokens: without any of them.
        survival: of the nodes, the largest first.
        seconds: of a pass with so many of them.
    """
    best, best_rate = 0, tokens / seconds(0)
    for count, s in enumerate(survival, start=1):
        tokens += s
        if (rate := tokens / seconds(count)) > best_rate:
            best, best_rate = count, rate
    return best


@lru_cache(maxsize=64)
def _passes(target: Curve, num_rows: int) -> tuple[float, ...]:
    """A row's part of a pass over root and nodes, by their number: asked for some dozens of times a round."""
    return tuple(target.at(num_rows * (1 + nodes)) / num_rows for nodes in range(MAX_PENDING + 1))


def _hoped(survival: float, further: float) -> float:
    """Tokens that a node's first child brings beyond its place in the pass: it gets none if it turns out to be worth
    less."""
    return sum(max(survival * guess - further, 0.0) for guess in FIRST_GUESSES) / len(FIRST_GUESSES)


PASS_SIZES = (1, 2, 4, 8, 16, 32, 64)
DRAFT_SIZES = (1, 2, 4, 8, 16)
SIZES_AT_LOAD = (1, 4, 16)
"""Of passes and of draft steps, where nobody waits for a profile: a fifth of a second on two CPU cores."""

SECONDS_AT_LOAD = 1.0
"""After which steps are not repeated there: larger models, or a single thread in fp32, take that long for one turn."""

TEXT_SIZE = 16
REPEATS = 3

_GROWN, _GROWN_LEVELS = (8, 4), 6
"""Beam and children of trees that are measured, and their levels."""

_TEXT = 128
"""Tokens of a text before the steps that are measured."""


def measure(
    target: Engine,
    draft: Engine,
    *,
    pass_sizes: Sequence[int] = PASS_SIZES,
    draft_sizes: Sequence[int] = DRAFT_SIZES,
    repeats: int = REPEATS,
    within: float = math.inf,
    threads: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    read: Callable[[bool], CpuTimes | None] = read_cpu_times,
) -> Costs:
    """Measures steps of engines that nobody uses: the least of a few each, as whatever else the machine does only adds
    to them. Where it did so all the time even the least is too much: `Costs.conditions` says what was seen of that.

    Args:
        within: seconds after which no further repeat begins.
        threads: that the engines have at the most.
        clock, read: of seconds, and of what the cores have done.
    """

    for engine in (target, draft):
        _step(engine, 0, _text(engine), gathered=0)

    def passes(tokens: int) -> None:
        out = _step(target, _text(target), tokens, gathered=tokens, features_out=draft.num_features > 0)
        out.logits_RV.argmax(dim=1).tolist()

    def drafts(tokens: int) -> None:
        logits_RV = _step(draft, _text(draft), tokens, gathered=tokens).logits_RV
        zeros_R = torch.zeros(tokens, dtype=torch.long)
        ranked(logits_RV, Sampling(zeros_R.float(), zeros_R, zeros_R.float() + 1, zeros_R, zeros_R), 4)

    def takes_in(tokens: int) -> None:
        _step(draft, _text(draft), tokens, gathered=1)

    def grows(levels: int) -> None:
        assert isinstance(draft, GrowingEngine)
        ids, at, one = torch.ones(1, 1, dtype=torch.long), torch.tensor([_text(draft)]), torch.ones(1)
        features = torch.zeros(1, 1, draft.num_features) if draft.num_features else None
        draft.grow(ids, at.int(), one.int(), features, TreeShape(levels, *_GROWN), ((0.0, 1.0),))

    repeated: list[list[float]] = []

    def least(runs: Sequence[Callable[[], None]], repeats: int) -> list[float]:
        repeated.extend(_measured(runs, repeats, within, clock))
        return [min(each) for each in repeated]

    before = read(True)  # also processes of a low priority, which do not give way in all
    if isinstance(draft, GrowingEngine):
        # Of an engine that grows trees by itself: what a level costs, and the rest of a draft.
        runs = [*(partial(passes, n) for n in pass_sizes), partial(grows, 1), partial(grows, _GROWN_LEVELS)]
        *passed, one, many = least(runs, 4 * repeats)
        level = max(many - one, 1e-6) / (_GROWN_LEVELS - 1)
        drafted, further = [level] * len(draft_sizes), {"begin": max(one - level, 0.0)}
    else:
        runs = [*(partial(passes, n) for n in pass_sizes), *(partial(drafts, n) for n in draft_sizes)]
        found = least([*runs, partial(takes_in, 1), partial(takes_in, TEXT_SIZE)], repeats)
        passed, drafted, (one, many) = found[: len(pass_sizes)], found[len(pass_sizes) : -2], found[-2:]
        further = {"text": max(many - one, 0.0) / (TEXT_SIZE - 1)}
    missing = _missing_cores(before, read(True), threads)
    return Costs(
        target=_curve(pass_sizes, passed),
        draft=_curve(draft_sizes, drafted),
        conditions=Conditions(missing_cores=missing, spread=median(median(each) / min(each) for each in repeated)),
        **further,
    )


def _missing_cores(before: CpuTimes | None, after: CpuTimes | None, threads: int) -> float | None:
    """How much others took between two looks of the cores that `threads` need, on average."""
    if before is None or after is None or after.at <= before.at:
        return None
    others = max(0.0, (after.busy - before.busy) - (after.own - before.own)) / (after.at - before.at)
    return max(0.0, min(threads, after.cores) - (after.cores - others))


def _curve(sizes: Sequence[int], seconds: Sequence[float]) -> Curve:
    return Curve(tokens=tuple(sizes), seconds=tuple(accumulate(seconds, max)))  # more tokens do not cost less


def _text(engine: Engine) -> int:
    """Tokens before those of the steps."""
    return min(_TEXT, engine.max_length - max(PASS_SIZES))


def _step(engine: Engine, start: int, tokens: int, *, gathered: int, features_out: bool = False) -> StepOutput:
    return engine.step(
        torch.ones(1, tokens, dtype=torch.long),
        torch.tensor([start], dtype=torch.int32),
        torch.arange(gathered),
        torch.zeros(1, tokens, engine.num_features) if engine.num_features else None,
        features_out=features_out,
    )


def _measured(
    runs: Sequence[Callable[[], None]], repeats: int, within: float, clock: Callable[[], float]
) -> list[list[float]]:
    """Seconds of each, time and again; they take turns, so that what disturbs one disturbs the others too."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        if 2 * sum(map(sum, seconds)) >= within:  # each is run twice
            break
        for each, run in zip(seconds, runs, strict=True):
            run()  # what the one before has left in the processor's caches is not this one's cost
            start = clock()
            run()
            each.append(clock() - start)
    return seconds


def place(engine: str, precision: str, device: str, threads: int) -> str:
    """What costs depend on, as the key of a profile: engine, precision, processor and, on a CPU, threads at the
    most."""
    if torch.device(device).type == "cuda":
        return f"{engine} {precision} on {torch.cuda.get_device_name()}"
    return f"{engine} {precision} on {cpu_model()} with {threads} threads"
