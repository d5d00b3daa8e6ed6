"""A run's document as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssv.ab.samples import Sample
from ssv.ab.terminal import figure_table, interval_text, percent, quality_text
from ssv.support.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDED = ("jinja2", "matplotlib")

SIZE = (5.2, 2.9)
"""Of a plot, inches."""

GLOSSARY = {
    "streams": "requests that run at the same time (concurrency)",
    "tokens/s": "output tokens of all requests together, per second in which the arm had something to do",
    "TTFT p50/p95 ms": "time to the first token, of reasoning or of the answer: that of the middle request, "
    "and the one that 95 % do not exceed",
    "TTFO p50/p95 ms": "time to the first token of the answer itself, after the reasoning",
    "per token ms": "mean time per output token after the first (TPOT)",
    "e2e p50/p95/p99 s": "time from the request to the end of its answer",
    "goodput/s": "requests per second that met every limit of the SLO, and their share",
    "passes/token": "runs of the target model per output token: 1 without speculation, fewer with it",
    "unverified": "output tokens that the target model never judged: 0 % where an arm is lossless",
    "reasoning": "output tokens in which the model thought before it answered",
    "score": "mean score of the answers that can be checked: of those that are right or wrong, the share that is right",
    "cost/1M": "cost of a million output tokens, in the unit of the given prices",
    "cost/1000 correct": "cost of a thousand right answers, that of the wrong ones included",
    "failed": "requests without an answer, of all",
    "lossless": "gives the text that the target model alone gives, token for token",
    "interval": "where the true difference lies: all intervals of a kind hold together with 95 %",
    "non-inferior": "the whole interval of the difference in quality is above the margin: "
    "not worse by more than was put up with",
    "undecided": "the interval holds the margin: more prompts with answers would tell",
    "block": "prompts that ran together; every arm runs each block twice, in turns",
}
ALWAYS = ("lossless", "interval", "non-inferior", "undecided", "block")


def check_can_write() -> None:
    """Raises UserError: a package is missing; naming it."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"report.html needs {' and '.join(missing)}", "pip install 'ssv[ab]'")


def render(document: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    """The page. Args: samples: for the plots of latencies."""
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, undefined=ChainableUndefined
    )
    columns, rows = figure_table(document)
    environment.filters |= {"percent": percent, "interval": interval_text}
    return environment.get_template("report.html.jinja").render(
        document=document,
        columns=columns,
        rows=rows,
        glossary=[(term, words) for term, words in GLOSSARY.items() if term in columns or term in ALWAYS],
        quality=quality_text,
        plots=[svg(figure) for figure in (*_trade(document), *_latencies(document, samples))],
        settings=json.dumps(document["settings"], indent=1, ensure_ascii=False),
    )


def svg(figure: Figure) -> str:
    """A figure as inline SVG. Its texts are drawn as shapes, so that names of arms cannot be markup."""
    import matplotlib
    from matplotlib import pyplot

    buffer = io.StringIO()
    # The same salt gives the same ids, and so the same page for the same samples.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "ssv"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _latencies(document: Mapping[str, Any], samples: Sequence[Sample]) -> list[Figure]:
    """Shares of requests that had their first token, and their last, within so many seconds."""
    figures = []
    for concurrency in document["settings"]["concurrency"]:
        for name in ("ttft_s", "e2e_s"):
            figure, axes = headless_pyplot().subplots(figsize=SIZE, layout="constrained")
            for arm in document["arms"]:
                of_arm = [s for s in samples if (s.arm, s.concurrency, s.error) == (arm["name"], concurrency, "")]
                values = sorted(value for sample in of_arm if (value := getattr(sample, name)) is not None)
                if values:
                    axes.ecdf(values, label=literal(arm["name"]))
            what = "Time to first token" if name == "ttft_s" else "End to end"
            axes.set_title(f"{what}, concurrency {concurrency}", fontsize=10)
            axes.set_xlabel("seconds")
            axes.set_ylabel("share of requests")
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8, loc="lower right")
            figures.append(figure)
    return figures


def _trade(document: Mapping[str, Any]) -> list[Figure]:
    """Cost by arm and concurrency, and quality by arm, both against the first arm and with their intervals."""
    first, margin = literal(document["settings"]["arms"][0]["name"]), document["settings"]["margin"]
    colours = {arm["name"]: f"C{place}" for place, arm in enumerate(document["arms"])}  # as in the other plots
    costs = [
        (
            colours[comparison["arm"]],
            f"{comparison['arm']} at {concurrency}",
            found["estimate"],
            found["interval"],
        )
        for comparison in document["comparisons"]
        for concurrency, differences in comparison["differences"].items()
        for found in differences
        if found["metric"] == "cost"
    ]
    judged = [
        (
            colours[comparison["arm"]],
            comparison["arm"],
            found["interval"]["estimate"],
            found["interval"] if found["verdict"] != "the same" else None,
        )
        for comparison in document["comparisons"]
        if (found := comparison["quality"]) is not None
    ]
    figures = []
    if costs:
        figures.append(_forest(costs, "Cost per token, by concurrency", f"% against {first} (left is cheaper)"))
    if judged:
        figures.append(_forest(judged, "Quality", f"points against {first} (dashed: the margin)", -100 * margin))
    return figures


def _forest(
    rows: Sequence[tuple[str, str, float, Mapping[str, float] | None]],
    title: str,
    label: str,
    limit: float | None = None,
) -> Figure:
    """Differences below each other. Args: rows: colour, name, estimate and interval, as shares."""
    figure, axes = headless_pyplot().subplots(
        figsize=(SIZE[0], max(SIZE[1], 0.9 + 0.3 * len(rows))), layout="constrained"
    )
    axes.axvline(0, color="grey", linewidth=0.8)
    if limit is not None:
        axes.axvline(limit, color="firebrick", linewidth=0.9, linestyle="--")
    for place, (colour, _, estimate, interval) in enumerate(rows):
        x = 100 * estimate
        axes.errorbar([x], [place], xerr=_around(interval, x), fmt="o", color=colour, capsize=3)
    axes.set_yticks(range(len(rows)), [literal(name) for _, name, *_ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    # Of the figure, not of the axes: beside long names these have not the width of their own label.
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(label, fontsize=9)
    return figure


def _around(interval: Mapping[str, float] | None, value: float) -> list[list[float]] | None:
    if interval is None:
        return None
    return [[max(0.0, value - 100 * interval["low"])], [max(0.0, 100 * interval["high"] - value)]]


def literal(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def headless_pyplot() -> Any:
    """matplotlib's pyplot, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
