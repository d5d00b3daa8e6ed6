"""What does a user of a small machine see: speed, and the time between the pieces of an answer, with few threads and
narrow weights, and what does a bound on waiting change?

Runs ssv-bench for each number of threads and precision, without a bound and with one.

    python benchmarks/edge.py --bundle bundles/smollm2-135m --out benchmarks/records/edge.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

from ssv.support.environment import versions, write_record

ROOT = Path(__file__).parents[1]
KEPT = (
    "method", "tokens_per_s", "speedup", "tokens_per_pass", "ms_per_token", "between_ms_p50", "between_ms_p95",
    "between_ms_p99", "between_ms_sd", "ttft_ms", "divergence",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--num-prompts", type=int, default=8, help="(default: 8)")
    parser.add_argument("--max-tokens", type=int, default=64, help="(default: 64)")
    parser.add_argument("--threads", default="1,2", help="(default: 1,2)")
    parser.add_argument("--precisions", default="int4,int8", help="(default: int4,int8)")
    parser.add_argument("--bound-ms", type=float, default=2.0, help="(default: 2.0)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs = []
    for threads, precision, bound in product(
        args.threads.split(","), args.precisions.split(","), (None, args.bound_ms)
    ):
        command = [
            *(sys.executable, "-m", "ssv.ab.bench", "--bundle", str(args.bundle), "--prompts", str(args.prompts)),
            *("--num-prompts", str(args.num_prompts), "--max-tokens", str(args.max_tokens), "--rounds", "1"),
            *("--methods", "autoregressive,premium,balanced", "--precision", precision, "--threads", threads),
            *(() if bound is None else ("--latency-bound-ms", str(bound))),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
        rows = json.loads(done.stdout.splitlines()[-1])["rows"]
        runs.append(
            {
                "threads": int(threads),
                "precision": precision,
                "latency_bound_ms": bound,
                "rows": [{name: row[name] for name in KEPT} for row in rows],
            }
        )
        print(json.dumps(runs[-1]), file=sys.stderr)
    figures = {
        "what": "speed and time between pieces, by threads, precision and bound on waiting",
        "prompts": f"the first {args.num_prompts} of {args.prompts.name}",
        "max_tokens": args.max_tokens,
        "runs": runs,
    }
    write_record(figures, args.out, versions("torch", "transformers"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
