"""A run's document as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

May import: ssv.ab.samples, .terminal.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssv.ab.samples import Sample
from ssv.ab.terminal import figure_table, interval_text, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDED = ("jinja2", "matplotlib")


def check_can_write() -> None:
    """Raises ValueError: a package is missing; naming it."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"report.html needs {' and '.join(missing)}: pip install 'ssv[ab]'")


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
        latencies=_svg(_latencies(document, samples)),
        trade=_svg(_trade(document)) if document["comparisons"] else None,
        settings=json.dumps(document["settings"], indent=1, ensure_ascii=False),
    )


def _svg(figure: Figure) -> str:
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


def _latencies(document: Mapping[str, Any], samples: Sequence[Sample]) -> Figure:
    """Shares of requests that had their first token, and their last, within so many seconds."""
    pyplot = _pyplot()
    concurrencies = document["settings"]["concurrency"]
    figure, grid = pyplot.subplots(
        len(concurrencies), 2, figsize=(9.5, 2.9 * len(concurrencies)), layout="constrained", squeeze=False
    )
    for axes_of_row, concurrency in zip(grid, concurrencies, strict=True):
        for axes, name in zip(axes_of_row, ("ttft_s", "e2e_s"), strict=True):
            for arm in document["arms"]:
                of_arm = [s for s in samples if (s.arm, s.concurrency, s.error) == (arm["name"], concurrency, "")]
                values = sorted(value for sample in of_arm if (value := getattr(sample, name)) is not None)
                if values:
                    axes.ecdf(values, label=_plain(arm["name"]))
            what = "time to first token" if name == "ttft_s" else "end to end"
            axes.set_title(f"{what}, {concurrency} at a time", fontsize=10)
            axes.set_xlabel("seconds")
            axes.set_ylabel("share of requests")
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8, loc="lower right")
    return figure


def _trade(document: Mapping[str, Any]) -> Figure:
    """Cost against quality, both relative to the first arm, with their intervals."""
    figure, axes = _pyplot().subplots(figsize=(7.5, 4.4), layout="constrained")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axvline(0, color="grey", linewidth=0.8)
    margin = document["settings"]["margin"]
    if margin is not None:
        axes.axhline(-100 * margin, color="firebrick", linewidth=0.9, linestyle="--")
    markers = "osD^vPX*"
    for number, comparison in enumerate(document["comparisons"]):
        judged = comparison["quality"]
        y = 100 * judged["interval"]["estimate"] if judged else 0.0
        for place, (concurrency, differences) in enumerate(comparison["differences"].items()):
            cost = next((d for d in differences if d["metric"] == "cost"), None)
            if cost is None:
                continue
            x = 100 * cost["estimate"]
            axes.errorbar(
                [x], [y],
                xerr=_around(cost["interval"], x), yerr=_around(judged["interval"], y) if judged else None,
                fmt=markers[place % len(markers)], color=f"C{number}", capsize=3,
                label=_plain(f"{comparison['arm']}, {concurrency} at a time"),
            )  # fmt: skip
    axes.set_xlabel(f"cost per token against {_plain(document['arms'][0]['name'])}, % (left is cheaper)")
    axes.set_ylabel("score, points (dashed: the margin)" if margin is not None else "quality was not judged")
    if margin is None:
        axes.set_yticks([])
    axes.margins(0.15)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return figure


def _around(interval: Mapping[str, float] | None, value: float) -> list[list[float]] | None:
    if interval is None:
        return None
    return [[max(0.0, value - 100 * interval["low"])], [max(0.0, 100 * interval["high"] - value)]]


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
