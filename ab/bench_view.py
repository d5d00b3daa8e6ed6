"""What ssv-bench shows: a row for each way to decode, as tables for a terminal and as a picture."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ssv.runtime.request import RequestError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LABELS, MOST_NUMBERS = 12, 24
"""Of an axis, and of a map's cells, beside one another without touching."""


@dataclass(frozen=True, slots=True)
class MethodRow:
    """What a way to decode came to. Counts are those of one round: the others do the same again.

    Attributes:
        method: with what is different of it, behind a comma.
        precision: of target and draft.
        cached_tokens: of the prompts' tokens, those that a cache of prompts had.
        tokens_per_s: emitted tokens per second of decoding, the prompts' included, over all rounds.
        speedup: geometric mean, over groups of prompts, of the ratio to the baseline's tokens per second in the same
            run.
        speedup_low, speedup_high: its 95 % interval over groups of prompts; null where there is one group alone.
        speedup_by_round: the same within each round.
        tokens_per_pass: emitted tokens per target pass (acceptance length).
        target_passes_per_token, target_tokens_per_token: fewer passes is not fewer tokens through the target.
        divergence: share of emitted tokens that are not the choice of the baseline's target given the same prefix and,
            of sampled output, the same noise; `divergence_margin`: by more than 1 nat.
        divergence_low, divergence_high: its 95 % interval over prompts; null of a single prompt.
        divergence_promised: what the tier's calibration bounds it to; null for a lossless method.
        kept_by_depth: share of the passes that kept their first drafted token, their second, and so on.
        identical: share of outputs, of all rounds, that are the baseline's, token for token.
        ms_per_token: milliseconds of decoding per emitted token, the prompts' included: the inverse of `tokens_per_s`.
        between_ms_p50, between_ms_p95, between_ms_p99, between_ms_sd: milliseconds between the pieces of an output, as
            a user sees them who reads along: percentiles and standard deviation. A piece is what comes at once, the
            tokens of a pass or those trusted before one. Null where no output has two.
        ttft_ms: median time to the first token.
        cost_per_1m_tokens: at the given price per hour; null without one.
    """

    method: str
    precision: str
    tokens_per_s: float
    speedup: float
    speedup_low: float | None
    speedup_high: float | None
    speedup_by_round: Sequence[float]
    tokens_per_pass: float
    target_passes_per_token: float
    target_tokens_per_token: float
    prompt_tokens: int
    cached_tokens: int
    emitted: int
    drafted: int
    judged: int
    accepted: int
    trusted: int
    typical: int
    rolled_back: int
    acceptance_rate: float
    divergence: float
    divergence_low: float | None
    divergence_high: float | None
    divergence_promised: float | None
    divergence_margin: float
    kept_by_depth: Sequence[float]
    identical: float
    ms_per_token: float
    between_ms_p50: float | None
    between_ms_p95: float | None
    between_ms_p99: float | None
    between_ms_sd: float | None
    ttft_ms: float
    cost_per_1m_tokens: float | None


def print_tables(rows: Sequence[MethodRow], *, priced: bool) -> None:
    """Prints the comparison, and below it which share of the passes kept how many drafted tokens."""
    # A narrow terminal must not cut the figures; in a log the width is unknown.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(_comparison(rows, priced=priced))
    if any(row.kept_by_depth for row in rows):
        console.print(_kept(rows))
    console.print(_between(rows))


def _comparison(rows: Sequence[MethodRow], *, priced: bool) -> Table:
    headers = [
        "method", "tokens/s", "speed-up", "95 %", "tokens/pass", "passes/token", "target tokens/token",
        "drafted/accepted/emitted", "divergence", "identical",
    ]  # fmt: skip
    has_hits = any(row.cached_tokens for row in rows)
    num_rounds = len(rows[0].speedup_by_round)
    title = f"ssv-bench, {rows[0].precision}, {num_rounds} {'round' if num_rounds == 1 else 'rounds'}"
    table = Table(*headers, *(["TTFT ms"] if has_hits else []), *(["cost/1M"] if priced else []), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        interval = "-" if row.speedup_low is None else f"{row.speedup_low:.2f}-{row.speedup_high:.2f}"
        cells = [
            row.method, f"{row.tokens_per_s:.1f}", f"{row.speedup:.2f}x", interval,
            f"{row.tokens_per_pass:.2f}", f"{row.target_passes_per_token:.3f}", f"{row.target_tokens_per_token:.2f}",
            f"{row.drafted}/{row.accepted}/{row.emitted}", f"{row.divergence:.2%}", f"{row.identical:.0%}",
        ]  # fmt: skip
        if has_hits:
            cells.append(f"{row.ttft_ms:.0f}")
        table.add_row(*cells, *([f"{row.cost_per_1m_tokens:.2f}"] if row.cost_per_1m_tokens is not None else []))
    return table


def _kept(rows: Sequence[MethodRow]) -> Table:
    depths = max(len(row.kept_by_depth) for row in rows)
    headers = [str(depth) for depth in range(1, depths + 1)]
    table = Table("method", *headers, title="passes that kept their 1st, 2nd, ... drafted token")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        if row.kept_by_depth:
            table.add_row(row.method, *(f"{share:.0%}" for share in row.kept_by_depth))
    return table


def _between(rows: Sequence[MethodRow]) -> Table:
    headers = ("method", "ms/token", "p50", "p95", "p99", "deviation", "TTFT ms")
    table = Table(*headers, title="milliseconds between pieces, as they are streamed")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        found = (row.between_ms_p50, row.between_ms_p95, row.between_ms_p99, row.between_ms_sd)
        cells = ["-" if ms is None else f"{ms:.1f}" for ms in found]
        table.add_row(row.method, f"{row.ms_per_token:.2f}", *cells, f"{row.ttft_ms:.0f}")
    return table


def check_plot(path: Path) -> None:
    """Raises RequestError if no plot can be drawn, or not there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib", "pip install 'ssv[plot]'")
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise RequestError(f"--plot {path}", "choose a .png file in a folder that exists")


def plot(rows: Sequence[MethodRow], path: Path) -> None:
    """Writes the picture as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = figure(rows)
    drawn.savefig(path, dpi=150)
    pyplot.close(drawn)


def figure(rows: Sequence[MethodRow]) -> Figure:
    """Draws a line for each method: its speed-up and its divergence, with their intervals, and the tokens that passes
    kept.
    """
    from matplotlib import pyplot

    drawn, (speed, divergence, kept) = pyplot.subplots(
        1, 3, sharey=True, figsize=(11, 1.4 + 0.42 * len(rows)), layout="constrained", width_ratios=(3, 2, 4)
    )
    for y, row in enumerate(rows):
        _point(speed, y, row.speedup, row.speedup_low, row.speedup_high, "C0")
        low, high = (100 * each if each is not None else None for each in (row.divergence_low, row.divergence_high))
        _point(divergence, y, 100 * row.divergence, low, high, "C3")
        if row.divergence_promised is not None:
            divergence.plot([100 * row.divergence_promised], [y], "k|", markersize=12)
    speed.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
    speed.set_yticks(range(len(rows)), [row.method for row in rows])
    speed.set_ylim(len(rows) - 0.5, -0.5)
    speed.set_xlabel("speed-up over autoregressive")
    divergence.set_xlim(left=0)
    divergence.set_xlabel("divergence, % (| promised)")
    _draw_kept(kept, rows)
    return drawn


def _point(axes: Any, y: int, x: float, low: float | None, high: float | None, color: str) -> None:
    # The estimate may be at an end of a bootstrap's interval, but for rounding.
    error = [[max(0.0, x - low)], [max(0.0, high - x)]] if low is not None and high is not None else None
    axes.errorbar([x], [y], xerr=error, fmt="o", capsize=3, color=color, clip_on=False)


def _draw_kept(axes: Any, rows: Sequence[MethodRow]) -> None:
    depths = max(1, max(len(row.kept_by_depth) for row in rows))
    shares = [[*row.kept_by_depth, *[0.0] * (depths - len(row.kept_by_depth))] for row in rows]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    step = 1 + depths // MOST_LABELS
    for y, row in enumerate(rows):
        for depth, share in enumerate(row.kept_by_depth):
            if depths > MOST_NUMBERS and depth % step:
                continue
            color = "white" if share > 0.5 else "black"
            axes.text(depth, y, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(0, depths, step), [str(depth) for depth in range(1, depths + 1, step)])
    axes.set_xlabel("passes that kept the n-th drafted token, %")
