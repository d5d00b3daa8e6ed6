"""Is a change one of form alone? Two checkouts decode the same prompts, and what they say is compared.

Greedy: outputs, drafted and accepted tokens of every method have to be the same, token for token. Sampled: tokens per
target pass of each, which may differ where the rule of acceptance does. Both decode each request right after one
another, in turn first, and their seconds are compared by method. `--starts` compares what a user waits for before the
first token as well: whole commands, in turn.

    python benchmarks/two_checkouts.py --before ../before/.venv/bin/python --after .venv/bin/python \\
        --bundle bundles/smollm2-135m

Each interpreter is that of a checkout's environment; it runs this file with --tell, which prints a request's output
whenever it reads a line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
METHODS = "autoregressive,speculative,premium,balanced,turbo"
SETTINGS: dict[str, dict[str, float | int]] = {
    "greedy": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 0.7, top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature 0.7, top_k 40": {"temperature": 0.7, "top_k": 40},
    "temperature 1": {"temperature": 1.0},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="interpreter of the older checkout")
    parser.add_argument("--after", type=Path, help="interpreter of the newer one")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--bundle-before", type=Path, help="built by the older checkout (default: the same)")
    parser.add_argument("--prompts", default="demo,heldout", help="of benchmarks/prompts, by name")
    parser.add_argument("--num-prompts", type=int, help="of each (default: all)")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--settings", default="greedy", help=f"separated by a semicolon, of: {'; '.join(SETTINGS)}")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--starts", type=int, default=0, help="starts of ssv-generate of each that are timed (default: 0)"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tell", action="store_true", help="decode in this checkout alone, a line a request")
    args = parser.parse_args()
    if args.tell:
        tell(args)
        return 0
    if args.before is None or args.after is None:
        parser.error("--before and --after: the interpreters of two checkouts' environments")
    before, after = told_in_turn(args, sys.argv[1:])
    figures = compare(before, after)
    if args.starts:
        figures["starts"] = starts(args)
    from ssv.support.environment import versions, write_record

    what = {"precision": args.precision, "commits": {"before": before[0], "after": after[0]}}
    write_record({**what, **figures}, args.out, versions("torch", "transformers"))
    return 1 if figures["greedy_differences"] else 0


def tell(args: argparse.Namespace) -> None:
    # Nothing but these: an older checkout has the rest elsewhere.
    from ssv.runtime import llm as module
    from ssv.runtime.request import Request, SamplingParams

    llm = module.LLM.load(args.bundle, precision=args.precision)
    print(json.dumps(_commit(Path(module.__file__).parent)), flush=True)
    paths = [ROOT / "benchmarks/prompts" / f"{name}.jsonl" for name in args.prompts.split(",")]
    lines = [line for path in paths for line in path.read_text().splitlines()[: args.num_prompts]]
    prompts = [llm.chat_ids(json.loads(line)["prompt"]) for line in lines]
    for number, prompt in enumerate(prompts):
        for setting in args.settings.split("; "):
            chosen: dict[str, Any] = {"max_tokens": args.max_tokens, "seed": number, **SETTINGS[setting]}
            params = SamplingParams(**chosen)
            for method in args.methods.split(","):
                if not sys.stdin.readline():  # whoever asked has gone
                    return
                began = time.perf_counter()
                (output,) = llm.generate([Request(prompt, method, params)])
                seconds, counted = time.perf_counter() - began, output.counters
                numbers = [counted.drafted, counted.accepted, counted.target_passes, counted.emitted]
                print(json.dumps([number, setting, method, output.token_ids, *numbers, seconds]), flush=True)
    sys.stdin.readline()  # a last question, which is answered like the others
    print("null", flush=True)


def _commit(folder: Path) -> str:
    """The commit of a checkout."""
    done = subprocess.run(  # noqa: S603
        ["git", "-C", folder, "rev-parse", "HEAD"],  # noqa: S607
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def told_in_turn(args: argparse.Namespace, words: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """What both print: first their commit, then a line a request."""
    bundles = (args.bundle_before or args.bundle, args.bundle)
    tellers = [
        subprocess.Popen(  # noqa: S603
            [interpreter, __file__, *words, "--bundle", bundle, "--tell"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for interpreter, bundle in zip((args.before, args.after), bundles, strict=True)
    ]
    pipes = [(_there(teller.stdin), _there(teller.stdout)) for teller in tellers]
    told: tuple[list[Any], list[Any]] = ([], [])
    for (_, answers), lines in zip(pipes, told, strict=True):
        lines.append(json.loads(answers.readline()))
    for request in range(sys.maxsize):
        for which in (0, 1) if request % 2 else (1, 0):
            questions, answers = pipes[which]
            questions.write("\n")
            questions.flush()
            told[which].append(json.loads(answers.readline()))
        if told[0][-1] is None:
            break
        print(f"request {request + 1}: prompt {told[0][-1][0] + 1}", file=sys.stderr)
    for teller in tellers:
        teller.communicate()
    assert told[1].pop() is told[0].pop() is None
    return told


def _there(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def starts(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds until ssv-generate shows its first character, and of `import ssv` beyond an interpreter's own
    start; both checkouts in turn."""
    generate = ("--max-tokens", "1", "Explain how rainbows form.")
    bundles = {"before": args.bundle_before or args.bundle, "after": args.bundle}
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(args.starts):
        for name, interpreter in (("before", args.before), ("after", args.after)):
            command = [interpreter.parent / "ssv-generate", "--bundle", bundles[name], *generate]
            bare = _seconds_to_first_byte([interpreter, "-c", "print()"])
            whole = _seconds_to_first_byte([interpreter, "-c", "import ssv; print()"])
            for what, seconds in (("first_token", _seconds_to_first_byte(command)), ("import_ssv", whole - bare)):
                found.setdefault(what, {}).setdefault(name, []).append(seconds)
    return {
        what: {f"{name}_s": round(statistics.median(values), 3) for name, values in held.items()}
        for what, held in found.items()
    }


def _seconds_to_first_byte(command: Sequence[Any]) -> float:
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:  # noqa: S603
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
    assert process.returncode == 0, command
    return seconds


def compare(before: Sequence[Any], after: Sequence[Any]) -> dict[str, Any]:
    """What differs among greedy requests, tokens per pass of all, and how fast the newer is, as a ratio of seconds."""
    pairs = list(zip(before[1:], after[1:], strict=True))
    greedy = [pair for pair in pairs if pair[0][1] == "greedy"]
    cells: dict[str, dict[str, dict[str, float]]] = {}
    for name, lines in (("before", before[1:]), ("after", after[1:])):
        for (setting, method), counts in _sums(lines).items():
            passes, emitted, drafted, accepted = counts
            figures = {"tokens_per_pass": emitted / passes, "accepted_per_drafted": accepted / max(drafted, 1)}
            cells.setdefault(setting, {}).setdefault(method, {}).update({f"{k}_{name}": v for k, v in figures.items()})
    for setting, methods in cells.items():
        for method, figures in methods.items():
            ratios = [one[-1] / other[-1] for one, other in pairs if one[1:3] == other[1:3] == [setting, method]]
            figures["median_speed_of_before"] = statistics.median(ratios)
    return {
        "greedy_requests": len(greedy),
        "greedy_differences": [one[:3] for one, other in greedy if one[:-1] != other[:-1]],
        "cells": cells,
    }


def _sums(lines: Sequence[Any]) -> Mapping[tuple[str, str], list[int]]:
    """Passes, emitted, drafted and accepted tokens. The first token of an output comes of its prompt."""
    found: dict[tuple[str, str], list[int]] = {}
    for _, setting, method, _, drafted, accepted, passes, emitted, _ in lines:
        sums = found.setdefault((setting, method), [0, 0, 0, 0])
        for i, number in enumerate((passes, emitted - 1, drafted, accepted)):
            sums[i] += number
    return found


if __name__ == "__main__":
    sys.exit(main())
