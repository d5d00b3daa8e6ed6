"""What of a draft is worth its cost, by what steps cost here.

Drafting pays if it raises the tokens per second. A tree whose nodes survive with probabilities s gives 1 + sum s tokens a round; the round
costs its draft steps and one pass over 1 + nodes tokens. Something more is worth it if its tokens over its seconds are more than the
whole's so far.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch

from ssv.bundle.profile import Costs, Curve
from ssv.runtime.decode.sampling import Sampling, ranked
from ssv.runtime.engines.contract import Engine, StepOutput

FIRST_GUESS = 0.7
"""What is taken for the share of a node's first child before it is drafted: about what a draft's first guess is worth."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What is worth drafting and verifying, for one of the rows that share a round, each of which is taken to do as this one does."""

    costs: Costs
    num_rows: int

    def _pass(self, nodes: int) -> float:
        """A row's part of a pass over root and nodes."""
        return self.costs.target.at(self.num_rows * (1 + nodes)) / self.num_rows

    def of_draft(self, width: int) -> float:
        """A row's part of a draft step of so many nodes of each row."""
        return self.costs.draft.at(self.num_rows * width) / self.num_rows

    def worth_verifying(self, survival: Sequence[float]) -> int:
        """How many nodes are worth a place in the pass, once they have been drafted.

        Args:
            survival: of the nodes, the largest first.
        """
        best, best_rate, gain = 0, 1 / self._pass(0), 1.0
        for count, s in enumerate(survival, start=1):
            gain += s
            if (rate := gain / self._pass(count)) > best_rate:
                best, best_rate = count, rate
        return best

    def worth_opening(self, kept: Sequence[float], survival: Sequence[float], spent: float = 0.0) -> int:
        """How many nodes are worth a further step of the draft, which gives them children.

        Args:
            kept: survival of the nodes that are worth verifying so far.
            survival: of those that may get children, the largest first.
            spent: seconds of the draft steps so far.
        """
        nodes = len(kept)
        rate = (1 + sum(kept)) / (self._pass(nodes) + spent)
        best, best_surplus, gain = 0, 0.0, 0.0
        for count, s in enumerate(survival, start=1):
            gain += FIRST_GUESS * s
            cost = self.of_draft(count) + self._pass(nodes + count) - self._pass(nodes)
            if (surplus := gain - rate * cost) > best_surplus:
                best, best_surplus = count, surplus
        return best


PASS_SIZES = (1, 2, 4, 8, 16, 32, 64)
DRAFT_SIZES = (1, 2, 4, 8, 16)
REPEATS = 5

_TEXT = 128
"""Tokens of a text before the steps that are measured."""


def measure(target: Engine, draft: Engine, repeats: int = REPEATS) -> Costs:
    """Measures steps of engines that nobody uses: the least of a few each, as whatever else the machine does only adds to them."""

    for engine in (target, draft):
        _step(engine, 0, _text(engine), gathered=0)

    def passes(tokens: int) -> None:
        out = _step(target, _text(target), tokens, gathered=tokens, features_out=draft.num_features > 0)
        out.logits_RV.argmax(dim=1).tolist()

    def drafts(tokens: int) -> None:
        logits_RV = _step(draft, _text(draft), tokens, gathered=tokens).logits_RV
        zeros_R = torch.zeros(tokens, dtype=torch.long)
        ranked(logits_RV, Sampling(zeros_R.float(), zeros_R, zeros_R.float() + 1, zeros_R, zeros_R), 4)

    found = _measured([*(partial(passes, n) for n in PASS_SIZES), *(partial(drafts, n) for n in DRAFT_SIZES)], repeats)
    split = len(PASS_SIZES)
    return Costs(target=_curve(PASS_SIZES, found[:split]), draft=_curve(DRAFT_SIZES, found[split:]))


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


def _measured(runs: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """The least seconds of each; they take turns, so that what disturbs one disturbs the others too."""
    least = [math.inf] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            least[i] = min(least[i], time.perf_counter() - start)
    return least


def place(engine: str, precision: str, device: str, threads: int) -> str:
    """What costs depend on, as the key of a profile: engine, precision, processor and, on a CPU, threads at the most."""
    if torch.device(device).type == "cuda":
        return f"{engine} {precision} on {torch.cuda.get_device_name()}"
    return f"{engine} {precision} on {_processor()} with {threads} threads"


def _processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
