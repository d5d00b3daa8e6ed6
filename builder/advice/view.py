"""Advice on a pair, as a person reads it and as a program does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from ssv.builder.advice.speed import BreakEven, Speed

_RANKS = 4
"""Guesses for a place that are shown."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What is said of a pair.

    Attributes:
        verdict: "good", "doubtful", "too weak", "too strong" or "wrong vocabulary".
        why: in words.
        basis: what costs and acceptance stand on, in words.
        facts: of the machine or the shapes, by name.
        acceptance: by depth and rank (`ssv.builder.advice.positions.acceptance`).
        speeds: expected of methods; none where the pair cannot decode.
    """

    verdict: str
    why: str
    basis: str
    facts: dict[str, Any] = field(default_factory=dict)
    acceptance: Sequence[Sequence[float]] = ()
    speeds: Sequence[Speed] = ()
    break_even: BreakEven | None = None

    def to_dict(self) -> dict[str, Any]:
        """For programs: the same, as JSON can hold it."""
        return {**asdict(self), "speeds": [{**asdict(s), "tokens_per_s": s.tokens_per_s} for s in self.speeds]}


def print_advice(advice: Advice) -> None:
    """Prints it to stdout."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(advice.basis, markup=False, highlight=False)
    for name, value in advice.facts.items():
        console.print(f"{name}: {value}", markup=False, highlight=False)
    if advice.acceptance:
        console.print(_acceptance_table(advice.acceptance))
    if advice.speeds:
        console.print(_speed_table(advice.speeds))
    if advice.break_even is not None:
        console.print(_break_even_line(advice.break_even), markup=False, highlight=False)
    console.print(f"verdict: {advice.verdict}: {advice.why}", markup=False, highlight=False)


def _acceptance_table(acceptance: Sequence[Sequence[float]]) -> Table:
    ranks = min(_RANKS, max(map(len, acceptance)))
    names = ("1st guess", "2nd", "3rd", "4th")[:ranks]
    table = Table("depth", *names, title="guesses that are the target's choice, where all before is right")
    for column in table.columns:
        column.justify = "right"
    for depth, shares in enumerate(acceptance, start=1):
        cells = [f"{share:.1%}" for share in shares[:ranks]]
        table.add_row(str(depth), *cells, *[""] * (ranks - len(cells)))
    return table


def _speed_table(speeds: Sequence[Speed]) -> Table:
    table = Table("method", "drafts", "tokens/pass", "nodes/pass", "ms/pass", "tokens/s", "speed-up", title="expected")
    for column in table.columns[2:]:
        column.justify = "right"
    for s in speeds:
        table.add_row(
            s.method, s.shape, f"{s.tokens_per_pass:.2f}", f"{s.nodes_per_pass:.1f}", f"{1e3 * s.seconds_per_pass:.2f}",
            f"{s.tokens_per_s:.1f}", f"{s.speedup:.2f}x",
        )  # fmt: skip
    return table


def _break_even_line(found: BreakEven) -> str:
    least = "no acceptance is enough" if found.acceptance is None else f"{found.acceptance:.1%} of the tokens accepted"
    cheap = (
        f"a draft step of {found.draft_share:.0%} of a pass" if found.draft_share else "no draft step is cheap enough"
    )
    now = f"it costs {found.draft_share_now:.1%}"
    return f"break-even of chains: at these costs {least}; at this acceptance {cheap} ({now})"
