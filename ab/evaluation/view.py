"""A comparison's document as a table: for a terminal, as Markdown, and as one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ssv.ab.page import SIZE, headless_pyplot, literal, svg
from ssv.ab.terminal import percent, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 200
"""Of the table: a narrow terminal must not cut the figures."""

GLOSSARY = {
    "speed-up": "tokens per second over those of plain decoding, on the same requests, in turns: geometric mean over "
    "groups of requests and its 95 % interval; `ssv-bench` measures it over several rounds",
    "tokens/s": "output tokens per second, the time of the prompts included",
    "a task": "share of its documents that are right, or their mean score; in brackets the difference from plain "
    "decoding in points with its interval, all of which hold together with 95 %; and the verdict",
    "the same": "the texts are plain decoding's, all of them, by construction",
    "non-inferior": "the whole interval is above the margin: not worse by more than was put up with",
    "inferior": "the whole interval is below the margin",
    "undecided": "the interval holds the margin: more documents would tell",
    "passes saved": "runs of the target per output token, fewer than with plain decoding",
    "unverified": "output tokens that the target never judged",
    "cost/1M": "of a million output tokens, in the unit of the given price",
}


def table(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows."""
    tasks, rows = document["tasks"], document["rows"]
    priced = any(row["cost_per_1m_tokens"] is not None for row in rows)
    headers = ["method", "speed-up", "tokens/s", *(f"{task['name']} ({task['metric']})" for task in tasks)]
    headers += ["passes saved", "unverified", *(["cost/1M"] if priced else [])]
    return headers, [
        [
            row["method"],
            speedup_text(row),
            plain(row["tokens_per_s"], 1),
            *(cell_text(row["tasks"][task["name"]], task) for task in tasks),
            percent(row["passes_saved"], 1),
            percent(row["unverified"], 1),
            *([plain(row["cost_per_1m_tokens"], 3)] if priced else []),
        ]
        for row in rows
    ]


def speedup_text(row: Mapping[str, Any]) -> str:
    """A row's speed-up, and its interval unless it is the baseline; a dash where there is none."""
    if row["speedup"] is None:
        return "-"
    low, high = row["speedup_low"], row["speedup_high"]
    if low == high:  # the baseline itself
        low = None
    return f"{row['speedup']:.2f}x" + ("" if low is None else f" ({low:.2f} to {high:.2f})")


def verdicts(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """For each method: "yes", "no" or "open" as its worst verdict has it, its name, and the tasks of each verdict."""
    found = []
    for row in document["rows"]:
        by_verdict: dict[str, list[str]] = {}
        for name, cell in row["tasks"].items():
            if cell["verdict"] is not None:
                by_verdict.setdefault(cell["verdict"], []).append(name)
        if by_verdict:
            outcome = "no" if "inferior" in by_verdict else "open" if "undecided" in by_verdict else "yes"
            words = "; ".join(f"{verdict} in {', '.join(names)}" for verdict, names in by_verdict.items())
            found.append((outcome, row["method"], words))
    return found


def cell_text(cell: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """A method in a task: its value, the difference with its interval, and the verdict."""
    value = cell["value"]
    if value is None:
        return "-"
    text = percent(value, 1) if task["is_judged"] else f"{value:.4g}"
    if cell["verdict"] is None:
        return text
    if cell["verdict"] == "the same":
        return f"{text}, the same"
    found = cell["quality"]["interval"]
    difference = f"{100 * found['estimate']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return f"{text} ({difference}), {cell['verdict']}"


def markdown(document: Mapping[str, Any]) -> str:
    """The table with its notes."""
    headers, rows = table(document)
    lines = [
        "| " + " | ".join(map(_markdown_cell, headers)) + " |",
        "|" + "---|" * len(headers),
        *("| " + " | ".join(map(_markdown_cell, row)) + " |" for row in rows),
        "",
        summary(document),
        "",
        *(f"* {note}" for note in document["notes"]),
    ]
    return "\n".join(lines) + "\n"


def summary(document: Mapping[str, Any]) -> str:
    """What the table rests on, in a sentence or two."""
    documents = ", ".join(f"{task['name']} {task['documents']}" for task in document["tasks"])
    return (
        f"Documents: {documents}. Differences are from {document['baseline']}, in points, with {document['level']:.2%} "
        f"intervals; the margin is {100 * document['margin']:g} points. {document['machine']['cpu']}, "
        f"{document['machine']['cores']} cores, commit {document['commit']}, {document['date']}."
    )


def _markdown_cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def show(document: Mapping[str, Any]) -> None:
    """Prints the table and its notes."""
    console = Console(width=WIDTH)
    headers, rows = table(document)
    shown = Table(*map(escape, headers), title="ssv-eval")
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        shown.add_row(*map(escape, row))
    console.print(shown)
    for note in document["notes"]:
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)


def page(document: Mapping[str, Any]) -> str:
    """The HTML page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([here, here.parent]), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    headers, rows = table(document)
    return environment.get_template("evaluation.html.jinja").render(
        document=document,
        headers=headers,
        rows=rows,
        summary=summary(document),
        verdicts=verdicts(document),
        glossary=GLOSSARY,
        plots=[svg(figure) for figure in frontiers(document)],
        settings=json.dumps(document["settings"], indent=1, ensure_ascii=False),
    )


def frontiers(document: Mapping[str, Any]) -> list[Figure]:
    """A figure of each judged task: quality over speed-up by method, and the methods that nobody beats in both."""
    figures = []
    for task in document["tasks"]:
        points = [
            (row["method"], row["speedup"], row["tasks"][task["name"]]["value"], row["tasks"][task["name"]], row)
            for row in document["rows"]
            if row["speedup"] is not None
        ]
        if not (task["is_judged"] and task["generates"] and points):
            continue
        base = next(value for method, _, value, *_ in points if method == document["baseline"])
        figure, axes = headless_pyplot().subplots(figsize=(SIZE[0], 3.6), layout="constrained")
        axes.axhline(-100 * document["margin"], color="firebrick", linewidth=0.9, linestyle="--")
        axes.axhline(0, color="grey", linewidth=0.8)
        best = frontier([(speed, value) for _, speed, value, *_ in points])
        axes.plot([x for x, _ in best], [100 * (y - base) for _, y in best], color="0.55", linewidth=1.2, zorder=1)
        for number, (method, speed, value, cell, row) in enumerate(points):
            x, y = speed, 100 * (value - base)
            axes.errorbar(
                [x], [y], xerr=_reach(x, row["speedup_low"], row["speedup_high"]), yerr=_quality_reach(cell, y),
                fmt="o", color=f"C{number}", capsize=3, elinewidth=0.9, label=literal(method),
            )  # fmt: skip
        figure.suptitle(literal(f"{task['name']} ({task['metric']})"), fontsize=10)
        axes.set_xlabel(literal(f"speed-up over {document['baseline']}"))
        axes.set_ylabel("difference, points (dashed: the margin)", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="best")
        figures.append(figure)
    return figures


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in one coordinate without losing in the other, by the first."""
    return sorted(
        {
            (x, y)
            for x, y in points
            if not any(other_x >= x and other_y >= y and (other_x, other_y) != (x, y) for other_x, other_y in points)
        }
    )


def _reach(value: float, low: float | None, high: float | None) -> list[list[float]] | None:
    return None if low is None or high is None else [[max(0.0, value - low)], [max(0.0, high - value)]]


def _quality_reach(cell: Mapping[str, Any], value: float) -> list[list[float]] | None:
    if cell["quality"] is None or cell["verdict"] == "the same":
        return None
    found = cell["quality"]["interval"]
    return _reach(value, 100 * found["low"], 100 * found["high"])
