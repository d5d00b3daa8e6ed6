"""A run's document as tables in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

COLOURS = {"yes": "bold green", "no": "bold red", "open": "bold yellow"}
"""Of verdicts, by outcome."""


def show(document: Mapping[str, Any]) -> None:
    """Prints a run: its recommendation, figures, differences, verdicts and notes."""
    console = _console()
    if document["status"] != "complete":
        console.print(f"[bold red]Partial report[/]: {escape(document['status'])}")
    console.print(f"[bold]{escape(document['recommendation'])}[/]", highlight=False, soft_wrap=True)
    console.print(_figures(document))
    for comparison in document["comparisons"]:
        title = f"{comparison['arm']} against {comparison['against']}"
        show_differences(
            title, comparison["differences"], document["levels"]["differences"], comparison["identical_share"]
        )
    for comparison in document["comparisons"]:
        colour = COLOURS[comparison["outcome"]]
        console.print(f"[{colour}]{escape(comparison['verdict'])}[/]", highlight=False, soft_wrap=True)
    for note in document["notes"]:
        console.print(f"Note: {escape(note)}", highlight=False, soft_wrap=True, style="dim")


def ms(seconds: float | None) -> str:
    """Seconds as whole milliseconds; a dash for None."""
    return "-" if seconds is None else f"{seconds * 1e3:,.0f}"


def percent(share: float | None, digits: int = 0) -> str:
    """A share in per cent; a dash for None."""
    return "-" if share is None else f"{share:.{digits}%}"


def plain(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point; a dash for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def interval_text(difference: Mapping[str, Any]) -> str:
    """A relative difference and its interval."""
    text, found = f"{difference['estimate']:+.1%}", difference["interval"]
    return text if found is None else f"{text} [{found['low']:+.1%}, {found['high']:+.1%}]"


FIGURE_COLUMNS = (
    "arm", "streams", "tokens/s", "TTFT p50/p95 ms", "TTFO p50/p95 ms", "per token ms", "e2e p50/p95/p99 s",
    "goodput/s", "passes/token", "unverified", "reasoning", "score", "cost/1M", "cost/1000 correct", "failed",
)  # fmt: skip


def figure_cells(row: Mapping[str, Any]) -> list[str]:
    """Cells of `FIGURE_COLUMNS`."""
    latency: Mapping[str, Mapping[str, float]] = row["latency"]
    ttft, ttfo, tpot, e2e = (latency.get(metric, {}) for metric in ("ttft", "ttfo", "tpot", "e2e"))
    return [
        row["arm"],
        str(row["concurrency"]),
        plain(row["tokens_per_s"], 1),
        f"{ms(ttft.get('p50'))} / {ms(ttft.get('p95'))}" if ttft else "-",
        f"{ms(ttfo.get('p50'))} / {ms(ttfo.get('p95'))}" if row["reasoning_share"] else "-",
        plain(tpot["mean"] * 1e3, 1) if tpot else "-",
        " / ".join(plain(e2e.get(name), 2) for name in ("p50", "p95", "p99")),
        "-" if row["goodput"] is None else f"{row['goodput']:.2f} ({row['good_share']:.0%})",
        plain(row["target_passes_per_token"], 3),
        percent(row["unverified_share"], 1),
        percent(row["reasoning_share"] or None, 1),
        percent(row["score"], 1),
        plain(row["cost_per_1m_tokens"], 2),
        "-" if row["cost_per_correct"] is None else f"{1000 * row['cost_per_correct']:.3g}",
        f"{row['failed']}/{row['requests']}",
    ]


def figure_table(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of all arms, without columns in which there is nothing."""
    rows = [figure_cells(row) for row in document["figures"]]
    places = [place for place in range(len(FIGURE_COLUMNS)) if any(row[place] != "-" for row in rows)]
    return [FIGURE_COLUMNS[place] for place in places], [[row[place] for place in places] for row in rows]


def _figures(document: Mapping[str, Any]) -> Table:
    headers, rows = figure_table(document)
    table = Table(*headers, title="ssv-ab")
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    last = None
    for row in rows:
        if last is not None and row[1] != last:
            table.add_section()
        last = row[1]
        table.add_row(*map(escape, row))
    return table


def show_differences(
    title: str, each: Mapping[str, Sequence[Mapping[str, Any]]], level: float, identical_share: float | None = None
) -> None:
    """A table of relative differences. Args: each: by concurrency."""
    if not any(each.values()):
        return
    table = Table(
        "difference",
        *(f"{concurrency} streams" for concurrency in each),
        title=escape(f"{title}, {level:.1%} intervals"),
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for metric in dict.fromkeys(d["metric"] for ds in each.values() for d in ds):
        found = [next((d for d in ds if d["metric"] == metric), None) for ds in each.values()]
        table.add_row(metric, *("-" if d is None else escape(interval_text(d)) for d in found))
    if identical_share is not None:
        table.caption = f"{identical_share:.1%} of the answers are the same text"
    _console().print(table)


def quality_text(judged: Mapping[str, Any], a: str, b: str, *, has_margin: bool = True) -> str:
    """Scores of two arms and what their difference is found to be."""
    interval = judged["interval"]
    text = (
        f"{a} {judged['score_a']:.1%}, {b} {judged['score_b']:.1%} ({judged['kind']}, {judged['prompts']} prompts); "
        f"difference {100 * interval['estimate']:+.1f} points"
    )
    if judged["verdict"] != "the same":
        text += f" [{100 * interval['low']:+.1f}, {100 * interval['high']:+.1f}]"
    return text + (f", margin {100 * judged['margin']:g}: {judged['verdict']}" if has_margin else "")


def show_quality(arm: str, judged: Mapping[str, Any] | None, *, has_margin: bool) -> None:
    """A line on an arm's quality in two runs."""
    found = "no prompt has an answer that can be checked" if judged is None else None
    text = found or quality_text(judged or {}, "before", "after", has_margin=has_margin)
    _console().print(f"quality of {escape(arm)}: {escape(text)}", highlight=False, soft_wrap=True)


def show_examples(arm: str, each: Sequence[Mapping[str, Any]]) -> None:
    """Answers of an arm in two runs, below each other. Args: each: as `ssv.ab.measures.examples` gives them."""
    if not each:
        return
    console = _console()
    console.print(f"answers of {escape(arm)} that differ, for example:", highlight=False, soft_wrap=True)
    for example in each:
        console.print(f"  {escape(_printable(example['prompt']))}", highlight=False, soft_wrap=True)
        for side, name in (("a", "before"), ("b", "after")):
            score = "" if (found := example[f"score_{side}"]) is None else f" ({percent(found)})"
            text = f"    {name}{score}: {_printable(example[side])}"
            console.print(escape(text), highlight=False, soft_wrap=True)


def _printable(text: str) -> str:
    """A text of others on one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _console() -> Console:
    # A narrow terminal must not cut the figures; in a log the width is unknown.
    return Console(width=None if sys.stdout.isatty() else 240)
