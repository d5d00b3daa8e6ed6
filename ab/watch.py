"""ssv-ab watch: reads the router's log as it grows, shows the running comparison, and takes an arm out of service that
breaks a guard-rail.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ssv.ab.journal import JournalReader
from ssv.ab.limits import Limit
from ssv.ab.live import ALPHA, METRICS, LiveComparison, quantile
from ssv.ab.routing import Fallback, fall_back, fallback_path
from ssv.ab.statistics import Interval
from ssv.ab.terminal import ms, percent, plain
from ssv.support.errors import UserError
from ssv.support.interruptible import sleep

EXIT_FELL_BACK = 4


def watch(
    path: Path,
    guards: Sequence[Limit],
    *,
    metric: str,
    equivalence: float,
    metrics_url: str | None,
    every: float | None,
    may_fall_back: bool,
) -> int:
    """Shows the comparison once, or as long as it is let; exit status.

    Args:
        metric: that the advice to stop goes by.
        metrics_url: of the server, for audited divergence.
        every: seconds between two looks; None for one look.
        may_fall_back: whether arms that break a guard are taken out of service.

    Raises:
        OSError: there is no such log.
        UserError: it is not a log of the router.
    """
    if any(limit.name == "divergence" for limit in guards) and metrics_url is None:
        raise UserError("the guard on divergence needs the server's audits", "give --metrics-url")
    reader, live = JournalReader(path), LiveComparison(guards)
    fallback = Fallback(fallback_path(path))
    console = Console(width=None if sys.stdout.isatty() else 150)
    fell_back = False
    while True:
        for record in (*reader.read(), *(reader.rest() if every is None else ())):
            live.take(record)
        if not live.arms and every is None:
            raise UserError(f"{path} does not begin as a log of ab_router does", "choose the `log` of its file of arms")
        audits = _audits(metrics_url) if metrics_url is not None else _Audits({}, ())
        if isinstance(audits, _Audits):
            live.audits(audits.counts)
        live.out_of_service(fallback.arms())
        broken = {arm: found for arm in live.rivals if (found := live.broken(arm))}
        new = {arm: "; ".join(found) for arm, found in broken.items() if arm not in fallback.arms()}
        if new and may_fall_back:
            fall_back(fallback_path(path), new)
            fell_back = True
        if live.arms:
            if console.is_terminal and every is not None:
                console.clear()
            _show(console, live, metric, equivalence, broken, fallback.arms(), reader.torn)
            for tier in audits.withdrawn if isinstance(audits, _Audits) else ():
                console.print(
                    f"[bold red]tier {escape(tier)} is withdrawn[/]: the server's audits found more divergence than it "
                    "promises, and premium decodes its requests. Calibrate it anew, or reset it",
                    soft_wrap=True,
                )
            if isinstance(audits, str):
                console.print(
                    f"[bold red]no metrics come from {escape(str(metrics_url))}[/] ({escape(audits)}): audited "
                    "divergence is not watched",
                    soft_wrap=True,
                )
        if every is None:
            return EXIT_FELL_BACK if fell_back else 0
        sleep(every)


@dataclass(frozen=True, slots=True)
class _Audits:
    """What a server's audits have found.

    Attributes:
        counts: audited tokens and mismatches, by tier.
        withdrawn: tiers that the server does not use any more.
    """

    counts: dict[str, tuple[int, int]]
    withdrawn: tuple[str, ...]


def _audits(url: str) -> _Audits | str:
    """Reads a server's metrics; why there are none, from one that does not answer now, or not as one does."""
    from prometheus_client.parser import text_string_to_metric_families  # other commands do without

    audited: dict[str, int] = {}
    mismatches: dict[str, int] = {}
    withdrawn: dict[str, int] = {}
    families = {
        "ssv_audited_tokens": audited,
        "ssv_audit_mismatches": mismatches,
        "ssv_tier_withdrawn": withdrawn,
    }
    try:
        with urlopen(url, timeout=5.0) as response:  # noqa: S310
            for family in text_string_to_metric_families(response.read().decode()):
                if (counts := families.get(family.name)) is not None:
                    counts.update((sample.labels["tier"], int(sample.value)) for sample in family.samples)
    except (OSError, HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    except (ValueError, KeyError):
        return "what is there is not a server's metrics"
    return _Audits(
        {tier: (audited.get(tier, 0), mismatches.get(tier, 0)) for tier in audited | mismatches},
        tuple(tier for tier, is_so in withdrawn.items() if is_so),
    )


def _show(
    console: Console,
    live: LiveComparison,
    metric: str,
    equivalence: float,
    broken: Mapping[str, Sequence[str]],
    fallen: Mapping[str, str],
    torn: int,
) -> None:
    table = Table(
        "arm", "requests", "errors", "left", "TTFT p50/p95 ms", "per token ms", "end to end p50/p95 s", "passes/token",
        "unverified", "audited divergence", title="ssv-ab watch",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for name, state in live.arms.items():
        ttft, e2e, tpot = (state.values[m] for m in ("ttft", "e2e", "tpot"))
        table.add_row(
            escape(name) + (" (out of service)" if name in fallen else ""),
            str(state.requests),
            f"{state.errors} ({state.error_rate:.1%})",
            str(state.cancelled),
            f"{ms(quantile(ttft, 0.5))} / {ms(quantile(ttft, 0.95))}",
            plain(sum(tpot) / len(tpot) * 1e3 if tpot else None, 1),
            f"{plain(quantile(e2e, 0.5), 2)} / {plain(quantile(e2e, 0.95), 2)}",
            plain(state.target_passes / state.output_tokens if state.output_tokens else None, 3),
            percent(state.unverified / state.output_tokens if state.output_tokens else None, 1),
            f"{state.mismatches / state.audited:.2%} of {state.audited}" if state.audited else "-",
        )
    console.print(table)
    for arm in live.rivals:
        shown = Table("difference", "mean", title=escape(f"{arm} less {live.first}, {1 - ALPHA:.0%} at any time"))
        shown.columns[1].justify = "right"
        for name in METRICS:
            shown.add_row(name, _text(live.difference(arm, name), name))
        shown.add_row("error_rate", _text(live.error_difference(arm), "error_rate"))
        if arm == live.shadow:
            pairs, different = live.pairs(arm)
            shown.caption = f"{different} of {pairs} answers differ from those of {live.first}"
        console.print(shown)
        for words in broken.get(arm, ()):
            console.print(f"[bold red]{escape(arm)} broke a guard-rail[/]: {escape(words)}", soft_wrap=True)
        if arm not in fallen:  # one that is gets no requests, however long one goes on
            console.print(escape(live.advice(arm, metric, equivalence)), soft_wrap=True, highlight=False)
    for arm, why in fallen.items():
        console.print(f"[bold red]{escape(arm)} is out of service[/]: {escape(why)}", soft_wrap=True)
    left_out = {
        "requests refused for what they asked": sum(state.refused for state in live.arms.values()),
        "torn lines": torn,
        "senseless records": live.malformed,
        "further requests of the same user, or while an arm was out of service": live.skipped,
    }
    if any(left_out.values()):
        console.print(
            "left out: " + ", ".join(f"{count} {what}" for what, count in left_out.items() if count), soft_wrap=True
        )


def _text(interval: Interval | None, metric: str) -> str:
    if interval is None:
        return "too few"
    scale, unit, digits = {"passes": (1.0, "", 3), "error_rate": (100.0, " points", 2)}.get(metric, (1e3, " ms", 1))
    estimate, low, high = (f"{scale * value:+.{digits}f}" for value in (interval.estimate, interval.low, interval.high))
    return f"{estimate}{unit} [{low}, {high}]"
