"""Limits as they are written on a command line: "ttft_p95<500ms,error_rate<2%"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ssv.support.errors import UserError

STATISTICS = ("mean", "p50", "p90", "p95", "p99")
METRICS = ("ttft", "ttfo", "tpot", "itl", "e2e")
LATENCIES = tuple(f"{metric}_{statistic}" for metric in METRICS for statistic in STATISTICS)
"""Time to the first token, to the first that is no reasoning, time per output token after it, time between tokens, time
to the end.
"""

_LIMIT = re.compile(r"\s*(\w+)\s*<\s*(\d+(?:\.\d+)?)\s*(ms|s|%|)\s*")
_SCALES = {"ms": 1e-3, "s": 1.0, "%": 1e-2, "": 1.0}


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound of an SLO or a guard-rail: a figure has to stay below it.

    Attributes:
        name: what must stay below, such as "ttft_p95".
        value: seconds, or a share.
    """

    name: str
    value: float

    @property
    def metric(self) -> str:
        """The name without its statistic."""
        return self.name.rpartition("_")[0]

    @property
    def statistic(self) -> str:
        """Which statistic of the figure is limited, such as `p95`; the last word of the name."""
        return self.name.rpartition("_")[2]

    @property
    def quantile(self) -> float | None:
        """The statistic's; None for a mean."""
        return int(self.statistic[1:]) / 100 if self.statistic.startswith("p") else None

    def __str__(self) -> str:
        shown = f"{self.value * 1e3:g} ms" if self.name in LATENCIES else f"{self.value * 100:g} %"
        return f"{self.name} < {shown}"


def parse_limits(text: str, shares: Sequence[str] = (), latencies: Sequence[str] = LATENCIES) -> tuple[Limit, ...]:
    """Reads limits as they are written, such as "ttft_p95<500ms,error_rate<2%".

    Args:
        shares: names of shares, which have no unit, or %.
        latencies: names of times that are known.

    Raises:
        UserError: what is no limit, an unknown name, or the wrong unit.
    """
    limits = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _LIMIT.fullmatch(part)
        if match is None:
            raise UserError(f"{part!r} is no limit", "give NAME<NUMBER and its unit, such as ttft_p95<500ms")
        name, number, unit = match.groups()
        if name not in (*latencies, *shares):
            raise UserError(f"unknown name {name!r} in {part!r}; known: {', '.join((*latencies, *shares))}")
        if (unit in ("ms", "s")) != (name in latencies):
            raise UserError(f"{part!r} has the wrong unit", "give ms or s for a time, % or nothing for a share")
        value = float(number) * _SCALES[unit]
        if value <= 0 or (name in shares and value >= 1):
            raise UserError(f"{part!r} can never hold, or always does", "give a limit above 0, and a share below 100 %")
        limits.append(Limit(name, value))
    if not limits:
        raise UserError(f"{text!r} holds no limit", "give such as ttft_p95<500ms")
    return tuple(limits)
