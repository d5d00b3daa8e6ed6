"""How long `LLM.load` and `ssv-serve` take until they can answer, and their memory then and after an answer.

Each figure is the median of fresh processes. Seconds are wall time and, since other work on the machine makes that
longer, CPU time of all processes. Memory is the proportional set size (PSS): a page that several processes share counts
once, in parts. Each process is shown with its own; `resident` is the sum that counts shared pages in each. Beside other
processes that use torch, the resident size of `LLM.load` (`rss_mb`) is what it has alone.

    python benchmarks/startup.py --bundle bundles/smollm2-135m --out benchmarks/records/startup.json

Run by the interpreter of another checkout it measures that one; `--before` puts such a record into the new one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from server_under_test import ServerUnderTest, ask

from ssv.client.triton import Settings
from ssv.support.environment import versions, write_record

PROMPT = "Explain how rainbows form."

LOAD = """
import json, resource, sys, time
start = time.monotonic()
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, SamplingParams
bundle, precision, prompt = sys.argv[1:]
llm = LLM.load(bundle, precision=precision or None)
seconds = time.monotonic() - start
usage = resource.getrusage(resource.RUSAGE_SELF)
figures = {"s": seconds, "cpu_s": usage.ru_utime + usage.ru_stime}
def memory(when):
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith(("Pss:", "Rss:")):
            figures[when + line[:3].lower() + "_mb"] = int(line.split()[1]) / 1024
memory("")
list(llm.generate([Request(llm.chat_ids(prompt), "premium", SamplingParams(max_tokens=64))]))
memory("answered: ")
figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(figures))
"""

Figures = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--precision", default="", help="default: the bundle's")
    parser.add_argument("--load-only", action="store_true", help="leave ssv-serve out (default: off)")
    parser.add_argument("--before", type=Path, help="a record of this script, of another checkout")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures: dict[str, object] = {
        "runs": args.runs,
        "load": _repeated("LLM.load", args.runs, lambda: _load(args.bundle, args.precision)),
        "memory": "MB of PSS",
        "precision": args.precision or "the bundle's",
    }
    if not args.load_only:
        figures["serve"] = _repeated("ssv-serve", args.runs, lambda: _serve(args.bundle, args.precision))
    if args.before is not None:
        before = json.loads(args.before.read_text())
        figures["before"] = {name: before[name] for name in ("load", "serve", "commit") if name in before}
    packages = versions("ssv", "torch", "tokenizers", "transformers", "safetensors", "nvidia-pytriton")
    write_record(figures, args.out, packages)
    return 0


def _repeated(name: str, runs: int, measure: Callable[[], Figures]) -> dict[str, dict[str, float]]:
    """Median and extremes of each figure, over runs after one that fills the page cache."""
    measure()
    found: list[Figures] = []
    for _ in range(runs):
        found.append(measure())
        print(name, found[-1], file=sys.stderr, flush=True)
    return {
        key: {
            "median": round(statistics.median(run[key] for run in found), 2),
            "least": round(min(run[key] for run in found), 2),
            "most": round(max(run[key] for run in found), 2),
        }
        for key in found[0]
    }


def _load(bundle: Path, precision: str) -> Figures:
    """Seconds from a started interpreter to an `LLM`, with what has to be imported."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", LOAD, str(bundle), precision, PROMPT], capture_output=True, text=True, check=True
    )
    return {name: round(value, 2) for name, value in json.loads(done.stdout).items()}


def _serve(bundle: Path, precision: str) -> Figures:
    """Seconds from the command to the endpoints that it announces, and what its processes hold then and after a
    request.
    """
    start = time.monotonic()
    with ServerUnderTest(bundle, *(("--precision", precision) if precision else ())) as server:
        figures = {"s": time.monotonic() - start, "cpu_s": _cpu_seconds(server)}
        figures |= _memory(server, "ready")
        with server.client() as client:
            ask(client, PROMPT, Settings(max_tokens=32))
        figures |= _memory(server, "answered")
    return {name: round(value, 2) for name, value in figures.items()}


def _processes(server: ServerUnderTest) -> dict[str, psutil.Process]:
    """All processes of the server by what they are."""
    root = psutil.Process(server.process.pid)
    names = {process.pid: name for name, process in server.stubs().items()}
    named = {"ssv-serve": root}
    for process in root.children(recursive=True):
        named[names.get(process.pid, process.name())] = process
    return named


def _cpu_seconds(server: ServerUnderTest) -> float:
    times = [process.cpu_times() for process in _processes(server).values()]
    return sum(t.user + t.system for t in times)


def _memory(server: ServerUnderTest, when: str) -> Figures:
    full = {name: process.memory_full_info() for name, process in _processes(server).items()}
    figures = {f"{when}: {name}": info.pss / 2**20 for name, info in full.items()}
    figures[f"{when}: all"] = sum(info.pss for info in full.values()) / 2**20
    figures[f"{when}: resident"] = sum(info.rss for info in full.values()) / 2**20
    return figures


if __name__ == "__main__":
    sys.exit(main())
