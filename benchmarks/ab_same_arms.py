"""How often ssv-ab reports a difference where there is none: a server against itself, time and again.

python benchmarks/ab_same_arms.py --bundle bundles/smollm2-135m --out benchmarks/records/ab_same_arms.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from scipy.stats import binom  # type: ignore[import-untyped]
from server_under_test import ServerUnderTest

from ssv.ab.cli import main as ssv_ab
from ssv.support.environment import versions, write_record

ROOT = Path(__file__).parents[1]
ALPHA = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--num-prompts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--method", default="premium")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    estimates, alarms = [], Counter[str]()
    with (
        ServerUnderTest(args.bundle, "--max-rows", "4", "--prompt-cache-mb", "0") as server,
        tempfile.TemporaryDirectory() as work,
    ):
        url = f"{server.grpc_url}?method={args.method}"
        for number in range(args.repeats):
            folder = Path(work) / str(number)
            options = ["--prompts", str(args.prompts), "--num-prompts", str(args.num_prompts), "--seed", str(number)]
            options += ["--max-tokens", str(args.max_tokens), "--out", str(folder)]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                status = ssv_ab(["run", "--a", f"one={url}", "--b", f"other={url}", *options])
            if status != 0:
                raise SystemExit(f"run {number} ended with status {status}")
            comparison = json.loads((folder / "report.json").read_text())["comparisons"][0]
            for difference in comparison["differences"]["1"]:
                interval = difference["interval"]
                alarms[difference["metric"]] += not interval["low"] <= 0 <= interval["high"]
            cost = comparison["differences"]["1"][0]
            estimates.append(round(cost["estimate"], 4))
            print(number + 1, comparison["verdict"], file=sys.stderr, flush=True)
    figures = {
        "repeats": args.repeats,
        "alpha": ALPHA,
        "alarms": dict(alarms),
        # Beyond so many, chance is no explanation any more (1 in 100).
        "alarms_that_chance_explains": int(binom.ppf(0.99, args.repeats, ALPHA)),
        "cost_differences": estimates,
    }
    write_record(figures, args.out, versions("torch", "nvidia-pytriton", "tritonclient", "numpy", "scipy"))
    return int(alarms["cost"] > figures["alarms_that_chance_explains"])


if __name__ == "__main__":
    sys.exit(main())
