"""How often the live audit withdraws a tier that keeps its promise, and how soon one that breaks it, simulated on
prompts that differ much in how often they diverge.

Each run is a server's life: the evidence is looked at after every audited prompt, and an alarm at any of them counts.
The promise is 2 %. It is kept where divergence is at the limit, which is the worst, or at half of it; it is broken
where divergence is half of the limit for a while, and then more than was promised. Beside the mixture that the server
uses stands one wager from the first prompt on, with the same bets: what a test does that does not expect a change.

    python benchmarks/audit_alarms.py --out benchmarks/records/audit_alarms.json
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ssv.runtime.serving.live_audit import ALPHA
from ssv.support.environment import versions, write_record
from ssv.support.evidence import BETS, Evidence

LIMIT = 0.02
CHUNK = 500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="servers' lives (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=10000, help="audited in each, at most (default: %(default)s)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # which the tests share
    from overdispersed import MOST, POPULATIONS, Population, at_most

    def alarms(population: Population, phases: Sequence[tuple[float, int]]) -> dict[str, npt.NDArray[np.float64]]:
        """After how many prompts of the last phase each run has an alarm, at most 0 before it, infinity for never.

        Args:
            phases: divergence, and prompts of it.
        """
        rng, mixture = np.random.default_rng(0), Evidence(LIMIT, MOST, (args.runs,))
        single_RF = np.zeros((args.runs, len(BETS)))
        found = {way: np.full(args.runs, math.inf) for way in ("mixture", "single")}
        done = -sum(num for _, num in phases[:-1])
        for divergence, num in phases:
            for start in range(0, num, CHUNK):
                events_RN, parts_RN = population.draw(divergence, (args.runs, min(CHUNK, num - start)), rng)
                for events_R, parts_R in zip(events_RN.T, parts_RN.T, strict=True):
                    done += 1
                    mixture.add(events_R, parts_R)
                    x_R = (events_R / LIMIT - parts_R) / MOST
                    single_RF += np.log1p(np.array(BETS) * x_R[:, None])
                    single_R = np.logaddexp.reduce(single_RF, axis=1) - math.log(len(BETS))
                    for way, is_alarm in (
                        ("mixture", mixture.value_R >= 1 / ALPHA),
                        ("single", single_R >= -math.log(ALPHA)),
                    ):
                        found[way] = np.minimum(found[way], np.where(is_alarm, done, math.inf))
        return found

    rows: list[dict[str, object]] = []

    def add(row: dict[str, object]) -> None:
        rows.append(row)
        print(row, file=sys.stderr, flush=True)

    for name, population in POPULATIONS.items():
        for share in (1.0, 0.5):
            found = alarms(population, ((share * LIMIT, args.prompts),))
            add(
                {"population": name, "divergence": share * LIMIT, "prompts": args.prompts}
                | {f"{way}_alarms": float(np.isfinite(each).mean()) for way, each in found.items()}
            )
    for name in ("overdispersed", "half never"):  # the third sort cannot diverge so much
        for before in (0, 1000):
            for divergence in (0.03, 0.04, 0.06, 0.1):
                found = alarms(POPULATIONS[name], ((LIMIT / 2, before), (divergence, 2000)))
                row: dict[str, object] = {"population": name, "before": before, "divergence": divergence}
                for way, each in found.items():
                    late = np.quantile(each, [0.5, 0.9], method="higher")
                    row[f"{way}_median_prompts"], row[f"{way}_p90_prompts"] = (
                        int(at) if math.isfinite(at) else None for at in late
                    )
                add(row)
    figures = {
        "limit": LIMIT,
        "alpha": ALPHA,
        "runs": args.runs,
        "most_alarms": at_most(ALPHA, args.runs),
        "tokens": MOST,
        "bets": BETS,
        "rows": rows,
        "weakness": "simulated: prompts of a server may differ in another way, for which the bound on false alarms "
        "holds too; how soon a broken promise is noticed depends on how they differ. None: not within 2,000 prompts",
    }
    write_record(figures, args.out, versions("ssv", "numpy"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
