"""How often a calibration breaks its promise, simulated on prompts that differ much in how often they diverge: by the
tests of `ssv-build calibrate` (betting), and by the bootstrap over prompts that it used before.

Each calibration tests thresholds in rising order, for a limit of 2 % with confidence 95 %. Its promise is broken if the
last one that passes truly diverges in 2 % of tokens or more. At worst the first threshold is just at the limit. The
second table is of what a bound is good for: thresholds that diverge less are to be found.

    python benchmarks/calibration_validity.py --out benchmarks/records/calibration_validity.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssv.support.environment import versions, write_record
from ssv.support.intervals import units_needed

LIMIT, ALPHA = 0.02, 0.05
AT_WORST = (LIMIT,)
GRID = (0.005, 0.012, 0.0195, 0.0205, 0.03)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrations", type=int, default=2000)
    parser.add_argument("--prompts", type=int, nargs="+", default=[20, 48, 224, 500, 1000, 1250, 3000])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # which the tests share
    from overdispersed import MOST, POPULATIONS, at_most, broken, by_betting, by_bootstrap

    rows = []
    for name, population in POPULATIONS.items():
        for num_prompts in args.prompts:
            row: dict[str, object] = {"population": name, "prompts": num_prompts}
            for way, show in (("betting", by_betting), ("bootstrap", by_bootstrap)):
                for case, divergences in (("at_worst", AT_WORST), ("grid", GRID)):
                    wrong, found = broken(show, population, num_prompts, args.calibrations, divergences=divergences)
                    row[f"{way}_{case}_broken"] = wrong
                    if case == "grid":
                        row[f"{way}_finds_a_threshold"] = found
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    figures = {
        "limit": LIMIT,
        "confidence": 1 - ALPHA,
        "calibrations": args.calibrations,
        "most_broken": at_most(ALPHA, args.calibrations),
        "tokens": MOST,
        "grid": GRID,
        "fewest_prompts": {str(limit): units_needed(limit, most=MOST, alpha=ALPHA) for limit in (0.01, 0.02, 0.05)},
        "rows": rows,
        "weakness": "simulated: real prompts may be of yet another kind, for which the proof still holds; what a bound "
        "finds depends on how prompts differ",
    }
    write_record(figures, args.out, versions("ssv", "numpy", "scipy"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
