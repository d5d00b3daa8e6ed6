"""Shows on stderr how far something long has come."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int, str], None]
"""Called with (stage, done, total, detail); done reaches total at the end of each stage."""

_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def terminal_report() -> Iterator[Report]:
    """Progress bars on a terminal, a line every few seconds in a log."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_report()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[detail]}", markup=False), console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int, detail: str) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, detail=detail)
            progress.update(tasks[stage], completed=done, total=total, detail=detail)

        yield report


def notice(text: str) -> None:
    """Says on stderr what a user should know of a step that went well."""
    print(f"note: {text}", file=sys.stderr)


def silent(stage: str, done: int, total: int, detail: str) -> None:
    """A `Report` that shows nothing."""


def _line_report() -> Report:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    last = 0.0

    def report(stage: str, done: int, total: int, detail: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            console.print(f"{stage}: {done}/{total} {detail}".rstrip(), markup=False)

    return report
