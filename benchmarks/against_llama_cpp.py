"""How fast is plain decoding here, against llama.cpp on the same GGUF file, machine and cores?

llama.cpp is not a dependency: pip install llama-cpp-python (it compiles for some minutes), here or into an environment
of its own, whose interpreter is then given with --llama-python. Each round decodes the same prompts with both, one
after the other; the ratio of their speeds within the run is what counts.

    python benchmarks/against_llama_cpp.py --bundle bundles/smollm2-135m --precision int4 --out FILE.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from ssv.builder.config import load_recipe
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]

LLAMA = """
import json, sys, time, importlib.metadata
from llama_cpp import Llama
settings = json.loads(sys.stdin.readline())
threads = settings["threads"]
model = Llama(settings["gguf"], n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
print(json.dumps(importlib.metadata.version("llama-cpp-python")), flush=True)
for line in sys.stdin:
    ids = json.loads(line)
    model.reset()
    model.eval(ids)
    start = time.perf_counter()
    for _ in range(settings["max_tokens"]):
        model.eval([model.sample(temp=0)])
    print(json.dumps(settings["max_tokens"] / (time.perf_counter() - start)), flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=ROOT / "builder/presets/smollm2-135m.yaml")
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/demo.jsonl")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    import torch

    from ssv.runtime.engines.linear import processors
    from ssv.runtime.llm import LLM
    from ssv.runtime.request import Request, SamplingParams

    llm = LLM.load(args.bundle, precision=args.precision)
    params = SamplingParams(max_tokens=args.max_tokens, ignore_eos=True)
    prompts = [llm.chat_ids(prompt) for prompt in read_prompts(args.prompts)]
    settings = {
        "gguf": str(load_recipe(args.recipe).target.locate()),
        "threads": torch.get_num_threads(),
        "max_tokens": args.max_tokens,
    }
    command = [args.llama_python, "-c", LLAMA]
    llama = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
    assert llama.stdin is not None and llama.stdout is not None

    def ask(line: object) -> object:
        llama.stdin.write(json.dumps(line) + "\n")
        llama.stdin.flush()
        answer = llama.stdout.readline()
        if not answer:
            sys.exit("error: llama.cpp did not answer\nhint: pip install llama-cpp-python, or give --llama-python")
        return json.loads(answer)

    llama_version = ask(settings)
    ours: list[float] = []
    theirs: list[float] = []
    for round_number in range(-1, args.rounds):
        for ids in prompts[:1] if round_number < 0 else prompts:  # the first is a warm-up
            (output,) = llm.generate([Request(ids, "autoregressive", params)])
            decoding = output.counters.total_s - output.counters.first_token_s
            mine, his = (output.counters.emitted - 1) / decoding, ask(ids)
            if round_number >= 0:
                ours.append(mine)
                theirs.append(float(str(his)))
                print(f"ssv {mine:6.1f}  llama.cpp {theirs[-1]:6.1f}  ratio {mine / theirs[-1]:.2f}", file=sys.stderr)
    llama.stdin.close()
    llama.wait()
    figures = {
        "what": "autoregressive decoding, tokens/s after the first token, medians over prompts and rounds",
        "ssv_tokens_per_s": statistics.median(ours),
        "llama_cpp_tokens_per_s": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "precision": args.precision,
        "kernels": os.environ.get("SSV_CPU_KERNELS") or processors()[0],
        "threads": settings["threads"],
        "pairs": len(ours),
    }
    write_record(figures, args.out, {**versions("torch", "transformers"), "llama-cpp-python": str(llama_version)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
