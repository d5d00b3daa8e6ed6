"""The table of docs/results.md that has the article's reported speed-ups beside ours, as Markdown, of what `ssv-bench`
printed last.

    python benchmarks/beside_the_article.py benchmarks/records/ssv_bench_all.json

Ours are from the record alone. The article's are its own claims: nobody measured them here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

REPORTED = {"speculative": "2.1x", "balanced": '2.8x ("SSV, threshold=0.3")', "turbo": '3.2x ("SSV, threshold=0.1")'}
"""The article's speed-ups, beside what is nearest to its methods here."""

HEADERS = (
    "method", "the article reports", "ours", "95 %", "tokens per pass", "passes per token", "target tokens per token",
    "drafted nodes per pass", "divergence", "identical",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="the last line of what ssv-bench printed")
    rows = json.loads(parser.parse_args().record.read_text())["rows"]
    is_priced = any(row["cost_per_1m_tokens"] is not None for row in rows)
    has_hits = any(row.get("cached_tokens") for row in rows)
    headers = (*HEADERS, *(["TTFT, ms"] if has_hits else []), *(["cost of 1M tokens"] if is_priced else []))
    print(_line(headers), _line(["---"] * len(headers)), sep="\n")
    for row in rows:
        cells = _cells(row)
        if has_hits:
            cells.append(f"{row['ttft_ms']:.0f}")
        if is_priced:
            cells.append(f"{row['cost_per_1m_tokens']:.2f}")
        print(_line(cells))


def _cells(row: dict[str, Any]) -> list[str]:
    interval = "-" if row["speedup_low"] is None else f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}"
    passes = row["target_passes_per_token"] * row["emitted"]
    return [
        f"`{row['method']}`",
        REPORTED.get(row["method"], "-"),
        f"{row['speedup']:.2f}x",
        interval,
        f"{row['tokens_per_pass']:.2f}",
        f"{row['target_passes_per_token']:.3f}",
        f"{row['target_tokens_per_token']:.2f}",
        f"{row['drafted'] / passes:.1f}",
        f"{row['divergence']:.2%}",
        f"{row['identical']:.0%}",
    ]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
