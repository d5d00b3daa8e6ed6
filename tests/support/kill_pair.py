"""Interrupts `ssv-build pair` again and again and looks at what is there.

It has to be the old bundle or the new one, whole, and the next run has to finish. This takes some minutes, so it is no
part of the suite, whose `test_staging.py` kills at each step of the file system:

    .venv/bin/python tests/support/kill_pair.py --work FOLDER [--kills 20] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tiny_bundle import RECIPE, write_recipe

from ssv.bundle.manifest import digest, read_manifest

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
# Everything is made anew from one recipe to the other; the tiers are those of a model of nonsense, so its limits are
# wide, and few prompts show that they are kept.
RECIPES = [
    RECIPE.replace("depth: 2}\nscorer", f"depth: 2, seed: {seed}}}\nscorer").replace(
        "accept_below: [0.1]", "accept_below: [0.1], max_tokens: 4, num_prompts: 8, limits: {turbo: 0.99}"
    )
    + "engines: [{role: target, precision: fp16, compute_capability: ['8.9'], max_length: 192, prefill_chunk: 64}]\n"
    for seed in (1, 2)
]


# Costs are measured once instead of 40 times: nothing here goes by them, and it would be most of a run.
HASTY = """
import sys
from ssv.builder import cli
cli.PROFILE_REPEATS = 1
sys.exit(cli.main(sys.argv[1:]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell has what it runs in the background ignore it, and children would too
    args.work.mkdir(parents=True)
    recipe, out, rng = write_recipe(args.work), args.work / "bundle", random.Random(args.seed)
    recipe.write_text(RECIPES[0])
    finish(recipe, out)
    hashes = [whole(out)]
    recipe.write_text(RECIPES[1])
    started = time.monotonic()  # of a run whose libraries are in memory, like those that are interrupted
    finish(recipe, args.work / "other")
    duration = time.monotonic() - started
    hashes.append(whole(args.work / "other"))
    shutil.rmtree(args.work / "other")
    found = {"old": 0, "new": 0}
    for kill in range(args.kills):
        recipe.write_text(RECIPES[(kill + 1) % 2])
        before, after = hashes[kill % 2], hashes[(kill + 1) % 2]
        process = start(recipe, out)
        # Every second one towards the end, where the bundles are exchanged: the old one would be there nearly always.
        earliest = 0.0 if kill % 2 == 0 else 0.85 * duration
        delay, what = rng.uniform(earliest, max(1.15 * earliest, duration)), SIGNALS[kill % len(SIGNALS)]
        time.sleep(delay)
        process.send_signal(what)
        process.wait()
        there = whole(out)
        assert there in (before, after), f"kill {kill}: neither the old nor the new bundle"
        found["old" if there == before else "new"] += 1
        finish(recipe, out)
        assert whole(out) == after, f"kill {kill}: the run after it did not finish"
        rest = [path.name for path in args.work.iterdir() if path.name.startswith(".") or path.name.endswith(".work")]
        assert not rest, f"kill {kill}: {rest} were left behind"
        print(
            f"{what.name} after {delay:.1f} s of {duration:.1f}: the {'old' if there == before else 'new'} one",
            flush=True,
        )
    print(found)
    return 0


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", HASTY, "pair", str(recipe), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(recipe: Path, out: Path) -> None:
    process = start(recipe, out)
    _, error = process.communicate()
    assert process.returncode == 0, error.decode()


def whole(bundle: Path) -> str:
    """What a whole bundle was made from."""
    manifest = read_manifest(bundle)
    assert manifest.engines
    return digest(f"{name} {source}" for name, source in sorted(manifest.sources.items()))


if __name__ == "__main__":
    sys.exit(main())
