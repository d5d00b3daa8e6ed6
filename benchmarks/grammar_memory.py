"""What hostile forms of outputs leave in the memory of a process that decodes: its resident memory, and what malloc has
in use, after more and more grammars, eight outputs of eight tokens side by side.

Each grammar is another: long repetitions, wide alternatives, schemas of many properties and enumerations. They are made
ready in one thread and decoded in another, as on a server, in a process that keeps the large blocks that it frees, as a
server's does. Once as it is, and once without giving back to the system what a large grammar and the making of the
vocabulary leave, each in a process of its own.

    python benchmarks/grammar_memory.py --bundle bundles/smollm2-135m --out benchmarks/records/grammar_memory.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from ssv.support.environment import versions, write_record

ROWS = 8
NUM_STAGES = 12
PROMPT = "Say something, please."
METHODS = ("premium", "turbo", "autoregressive")


_BEFORE = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc: of all arenas."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (*_BEFORE, "uordblks", "fordblks", "keepcost"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--grammars", type=int, default=480)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--arm", choices=("as it is", "nothing given back"), help="in this process, without a record")
    args = parser.parse_args()
    if args.arm is not None:
        print(json.dumps(_measured(args, args.arm)))
        return 0
    own = [sys.executable, __file__, "--bundle", str(args.bundle), "--grammars", str(args.grammars)]
    own += ["--precision", args.precision, "--arm"]
    found = {}
    for arm in ("as it is", "nothing given back"):
        done = subprocess.run([*own, arm], stdout=subprocess.PIPE, check=True)  # noqa: S603
        found[arm] = json.loads(done.stdout)
    figures = {
        "what": "MB of a process after so many grammars: resident, and in use as malloc counts",
        "results": found,
        "precision": args.precision,
        "rows": ROWS,
    }
    write_record(figures, args.out, versions("torch", "llguidance"))
    return 0


def _measured(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    import torch

    from ssv.runtime import grammar as grammar_module
    from ssv.runtime.llm import LLM
    from ssv.runtime.memory import keep_large_blocks
    from ssv.runtime.request import Request, RequestError, SamplingParams

    torch.set_num_threads(1)
    keep_large_blocks()
    if arm != "as it is":
        grammar_module.give_back = lambda: None
    with ThreadPoolExecutor(1) as loading:
        llm = loading.submit(LLM.load, args.bundle, precision=args.precision, max_batch=ROWS).result()
    grammars, prompt = llm.grammars, tuple(llm.chat_ids(PROMPT))
    assert grammars is not None
    stages = {"loaded": _memory()}
    num_refused = 0
    with ThreadPoolExecutor(1) as intake, ThreadPoolExecutor(1) as decoding:

        def decode(requests: list[Request]) -> None:
            decoding.submit(llm.generate, requests).result()

        decode([Request((5,) * 600, "premium", SamplingParams(max_tokens=8)) for _ in range(ROWS)])
        stages["all rows have had a prompt of 600 tokens"] = _memory()
        for start in range(0, args.grammars, ROWS):
            requests = []
            for number in range(start, start + ROWS):
                kind, guide = _hostile(number)
                try:
                    grammar = grammar_module.grammar_of(kind, guide)
                    intake.submit(grammars.prepare, grammar).result()
                except RequestError:
                    num_refused += 1
                    continue
                params = SamplingParams(max_tokens=8, temperature=1.0, seed=number, grammar=grammar)
                requests.append(Request(prompt, METHODS[number % len(METHODS)], params))
            decode(requests)
            num_done = start + ROWS
            if start // ROWS % max(1, args.grammars // ROWS // NUM_STAGES) == 0 or num_done >= args.grammars:
                stages[f"{num_done} grammars"] = _memory()
                print(arm, num_done, stages[f"{num_done} grammars"], file=sys.stderr, flush=True)
    return {"refused": num_refused, "stages": stages}


def _memory() -> dict[str, float]:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallocInfo
    in_use = libc.mallinfo2().uordblks
    return {name: round(num / 2**20, 1) for name, num in (("resident", _resident()), ("in use", in_use))}


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _hostile(number: int) -> tuple[str, str]:
    """Kind and guide of a form; the same for the same number."""
    rng = random.Random(number)
    n = rng.randrange(1, 1000)
    guides: tuple[tuple[str, Any], ...] = (
        ("json_schema", {"type": "string", "pattern": f"(a{{1,{40 + n % 20}}}){{1,50}}b"}),
        ("json_schema", {"type": "string", "minLength": 10**9 - n}),
        ("json_schema", {"type": "array", "items": {"type": "integer"}, "minItems": 10**6 - n}),
        ("json_schema", {"enum": ["\u0000", "\U0001f600", "a" * (3000 - n)]}),
        ("json_schema", {"properties": {f"p{j}_{n}": {"maxLength": 10 * j + 1} for j in range(200)}}),
        (
            "json_schema",
            {
                "properties": {f"q{j}": {"enum": [f"{j}_{x}_{n}" for x in range(20)]} for j in range(60)},
                "required": [f"q{j}" for j in range(60)],
            },
        ),
        ("regex", f"a{{{10**6 - n}}}"),
        ("regex", f"(.*){{0,{1000 - n % 50}}}"),
        ("regex", f"[ab]*a[ab]{{{9 + n % 6}}}c"),
        ("ebnf_grammar", f'start: ("a"{{1,{1000 - n % 100}}}){{1,1000}}'),
    )
    kind, guide = rng.choice(guides)
    return kind, guide if isinstance(guide, str) else json.dumps(guide)


if __name__ == "__main__":
    sys.exit(main())
