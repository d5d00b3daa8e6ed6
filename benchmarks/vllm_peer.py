"""What vLLM makes of the same model, prompts and end tokens: plain decoding, a draft that `ssv-build export vllm` has
written, and its own prompt lookup, greedy, at several numbers of requests side by side. The counterpart of `gpu.py`.

vLLM is not a dependency; install it beside this project. Each arm is an engine of its own in a process of its own, so
that one that cannot start costs no other. The record is written anew after each.

    ssv-build export vllm BUNDLE --out EXPORT
    python benchmarks/vllm_peer.py --model EXPORT/target --draft EXPORT/draft --out benchmarks/records/vllm_peer.json

Figures of an arm, by rows; of three runs, behind one that compiles and captures, the middle one:

    tokens_per_s            emitted tokens, over the time from the first request to the last answer
    ms_per_token            1000 * rows / tokens_per_s: between two tokens of a request
    first_token_ms          median over requests, as vLLM measures it
    tokens_per_pass         tokens after a request's first, over passes that judged a draft, as `gpu.py` counts
    mean_acceptance_length  1 + accepted / drafts, of vLLM's counters
    same_text               requests whose tokens are those of the arm `plain` at the same rows
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssv.model.checkpoint import read_hf_config
from ssv.runtime.tokenizer import BundleTokenizer
from ssv.runtime.tokenizer_files import FileTokenizer
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]
ARMS = "plain,draft:5,draft:3,ngram:5"
RUNS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the target, with its tokenizer, as vLLM loads it")
    parser.add_argument("--draft", type=Path, help="a draft in the layout speculators, for arms `draft:N`")
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--waves", type=int, default=4, help="prompts for each row, 16 in all at least (default: 4)")
    parser.add_argument("--max-tokens", type=int, default=128, help="(default: 128)")
    parser.add_argument(
        "--arms", default=ARMS, help=f"`plain`, `draft:N` and `ngram:N` with N tokens drafted (default: {ARMS})"
    )
    parser.add_argument("--rows", default="1,8,32,64", help="side by side, of plain decoding (default: 1,8,32,64)")
    parser.add_argument("--draft-rows", default="1,8", help="the same, of the other arms (default: 1,8)")
    parser.add_argument("--dtype", default="bfloat16", help="(default: bfloat16)")
    parser.add_argument("--attention-backend", help="such as TRITON_ATTN (default: the one that vLLM chooses)")
    parser.add_argument("--memory-share", type=float, default=0.4, help="of the GPU's memory (default: 0.4)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds until an arm is ended (default: 600)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    arms = args.arms.split(",")
    plans = {arm: plan(arm, args) for arm in arms}
    requests = {"prompts": prompt_ids(args.model, args.prompts), "stop": end_tokens(args.model)}
    figures: dict[str, Any] = {
        "what": "vLLM, greedy",
        "settings": {name: value for name, value in os.environ.items() if name.startswith("VLLM_")},
        "arms": {},
    }
    plain: dict[str, list[list[int]]] = {}
    for arm in arms:
        found = in_its_own_process({**plans[arm], **requests}, args.timeout)
        texts = found.pop("texts", {})
        plain = texts if arm == "plain" else plain
        for rows, each in found.get("rows", {}).items():
            if rows in plain:
                each["same_text"] = sum(a == b for a, b in zip(texts[rows], plain[rows], strict=True))
        figures["arms"][arm] = found
        print(arm, found, file=sys.stderr)
        write_record(figures, args.out, versions("vllm", "torch", "triton", "transformers", "flashinfer-python"))
    return 0 if all("error" not in found for found in figures["arms"].values()) else 1


def plan(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """What an arm's process is told.

    Raises:
        SystemExit: an arm of another name, or one with a draft and no `--draft`.
    """
    kind, _, count = arm.partition(":")
    speculation: dict[str, Any] | None = None
    if kind == "draft" and count.isdecimal():
        if args.draft is None:
            raise SystemExit("error: an arm with a draft\nhint: give --draft, or name other --arms")
        speculation = {"method": "eagle3", "model": str(args.draft), "num_speculative_tokens": int(count)}
    elif kind == "ngram" and count.isdecimal():
        # The same shortest and longest beginning as this project's prompt lookup.
        speculation = {"method": "ngram", "num_speculative_tokens": int(count)}
        speculation |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    elif arm != "plain":
        raise SystemExit(f"error: an arm {arm!r}\nhint: name `plain`, `draft:N` and `ngram:N`")
    rows = [int(word) for word in (args.rows if speculation is None else args.draft_rows).split(",")]
    options: dict[str, Any] = {
        "model": str(args.model),
        "dtype": args.dtype,
        "max_model_len": 2048,
        "max_num_seqs": max(rows),
        # Prompts come again in each run, and are to be read each time.
        "enable_prefix_caching": False,
        "gpu_memory_utilization": args.memory_share,
        "disable_log_stats": False,
    }
    if speculation is not None:
        options["speculative_config"] = speculation
    if args.attention_backend is not None:
        options["attention_backend"] = args.attention_backend
    return {"options": options, "rows": rows, "waves": args.waves, "max_tokens": args.max_tokens}


def prompt_ids(model: Path, prompts: Path) -> list[tuple[int, ...]]:
    """Prompts in the model's chat template, as this project gives them to its own engines."""
    tokenizer = BundleTokenizer(FileTokenizer.load(model), end_tokens(model))
    return [tokenizer.chat_ids([{"role": "user", "content": prompt}]) for prompt in read_prompts(prompts)]


def end_tokens(model: Path) -> list[int]:
    """Ids of the tokens that end an answer, of config.json."""
    found = read_hf_config(model).get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def in_its_own_process(plan: dict[str, Any], timeout: float) -> dict[str, Any]:
    """An arm's figures, or what went wrong under "error"; of rows that were measured before, the figures too."""
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder, "plan.json"), Path(folder, "found.json")
        given.write_text(json.dumps(plan))
        # -P: this folder's scripts are named like packages that others look for.
        command = [sys.executable, "-P", __file__, "--arm-of", str(given), str(answer)]
        child = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)  # noqa: S603
        error = None
        try:
            if code := child.wait(timeout):
                error = f"it ended with {code}"
        except subprocess.TimeoutExpired:
            error = f"not done after {timeout:g} s"
        finally:
            _end_group(child)
        found: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
        return found if error is None else found | {"error": error}


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """vLLM's engine is a process of its own, which may outlive who started it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


# --- in an arm's process --------------------------------------------------------------------------------------------


def run_arm(plan: dict[str, Any], answer: Path) -> None:
    """Starts an engine, decodes, and writes what it found after each number of rows."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    began = time.perf_counter()
    llm = LLM(**plan["options"])
    found: dict[str, Any] = {"started_in_s": round(time.perf_counter() - began, 1), "rows": {}, "texts": {}}
    params = SamplingParams(
        temperature=0.0,
        max_tokens=plan["max_tokens"],
        stop_token_ids=plan["stop"],
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    found["gpu"] = torch.cuda.get_device_name()
    for rows in plan["rows"]:
        prompts = plan["prompts"][: max(16, plan["waves"] * rows)]
        figures, texts = measured(llm, prompts, params, rows)
        found["rows"][str(rows)], found["texts"][str(rows)] = figures, texts
        print(rows, figures, file=sys.stderr)
        answer.write_text(json.dumps(found))


def measured(
    llm: Any, prompts: Sequence[Sequence[int]], params: Any, rows: int
) -> tuple[dict[str, Any], list[list[int]]]:
    runs = []
    for _ in range(1 + RUNS):
        before, began = drafted(llm), time.perf_counter()
        outputs = side_by_side(llm.llm_engine, prompts, params, rows)
        seconds = time.perf_counter() - began
        runs.append((seconds, outputs, tuple(b - a for a, b in zip(before, drafted(llm), strict=True))))
    seconds, outputs, (drafts, accepted) = sorted(runs[1:], key=lambda run: run[0])[RUNS // 2]
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    emitted = sum(map(len, texts))
    figures: dict[str, Any] = {
        "tokens_per_s": round(emitted / seconds, 1),
        "ms_per_token": round(1e3 * rows * seconds / emitted, 4),
        "first_token_ms": round(1e3 * statistics.median(o.metrics.first_token_latency for o in outputs), 2),
        "of": len(texts),
        "emitted": emitted,
        "seconds_of_runs": [round(run[0], 4) for run in runs],
        "same_text_each_run": all(texts == [list(o.outputs[0].token_ids) for o in run[1]] for run in runs),
    }
    if drafts:
        figures["tokens_per_pass"] = round((emitted - len(texts)) / drafts, 3)
        figures["mean_acceptance_length"] = round(1 + accepted / drafts, 3)
    return figures, texts


def side_by_side(engine: Any, prompts: Sequence[Sequence[int]], params: Any, rows: int) -> list[Any]:
    """The outputs of all prompts, so many decoding at a time: the next is handed in when one has ended."""
    outputs: dict[int, Any] = {}
    num_given = 0
    while len(outputs) < len(prompts):
        while num_given < len(prompts) and num_given - len(outputs) < rows:
            engine.add_request(str(num_given), {"prompt_token_ids": list(prompts[num_given])}, params)
            num_given += 1
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id)] = output
    return [outputs[number] for number in range(len(prompts))]


def drafted(llm: Any) -> tuple[int, int]:
    """Drafts that were judged so far, and tokens of them that were accepted."""
    counted = {metric.name: metric for metric in llm.get_metrics()}
    names = ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")
    drafts, accepted = (counted[name].value if name in counted else 0 for name in names)
    return drafts, accepted


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm-of"]:
        run_arm(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
        sys.exit(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that an arm is ended with it
    sys.exit(main())
