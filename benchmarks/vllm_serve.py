"""`vllm serve` with a draft that `ssv-build export vllm` has written, and without, at several tensor parallel sizes:
the arms of the export's own compare.sh, asked by `ssv-ab run`, greedy.

vLLM is not a dependency; install it beside this project. The record is written anew after each size, and a size that
fails or takes too long costs the others nothing.

    python benchmarks/vllm_serve.py --bundle BUNDLE --tp 1,2 --out benchmarks/records/vllm_serve.json

Sizes that the model's heads cannot be shared by get heads of zeros (`--pad-heads`). Arms for which there are not enough
GPUs share them. The arm `ssv`, of one GPU, is run where Triton Inference Server is installed (nvidia-pytriton).
Figures of a size, by arm and requests at a time:

    tokens_per_s            output tokens over the time in which the arm had something to do; and an interval of it,
                            over blocks of prompts
    ttft_ms, itl_ms         to the first token, and between two tokens; `tpot_ms_mean`: the mean after the first
    identical_share         of the texts, those that are plain's
    speed_against_plain     plain's time per token over the arm's, with the interval that `ssv-ab` gives

and of an arm with a draft, of vLLM's counters, over all that it was asked:

    tokens_per_pass         tokens after a request's first, over passes that judged a draft, as `vllm_peer.py` counts
    mean_acceptance_length  1 + accepted / drafts
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from ssv.ab.measures import MIN_BLOCKS, busy_s, by_arm, identical_share, turns_of
from ssv.ab.samples import Sample, read_samples
from ssv.ab.statistics import bootstrap
from ssv.builder.export import export_for
from ssv.support.console import positive, run_command
from ssv.support.environment import versions, write_record
from ssv.support.errors import UserError

ROOT = Path(__file__).parents[1]
LEVEL = 0.95
ENDING = 60.0
"""Seconds that a comparison which took too long has to end its arms and to report, before it is killed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--tp", default="1,2", help="GPUs of an arm, one size after the other (default: 1,2)")
    parser.add_argument("--gpus", type=positive, help="of this machine (default: those that torch sees)")
    parser.add_argument("--arms", help="of `plain,speculation,ssv` (default: those that can be run)")
    parser.add_argument("--concurrency", default="1,8", help="requests at a time (default: 1,8)")
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl")
    parser.add_argument("--num-prompts", type=int, default=96, help="(default: 96)")
    parser.add_argument("--max-tokens", type=int, default=128, help="(default: 128)")
    parser.add_argument("--num-draft-tokens", type=int, default=5, help="(default: 5)")
    parser.add_argument("--max-length", type=int, default=2048, help="of prompt and output (default: 2048)")
    parser.add_argument("--memory-share", type=float, default=0.4, help="of each GPU, for an arm (default: 0.4)")
    parser.add_argument("--engine-options", default="", help="more of `vllm serve`, in one word (default: none)")
    parser.add_argument("--seconds", type=float, default=1800.0, help="for each size, its start included")
    parser.add_argument("--work", type=Path, help="folder for exports, logs and reports (default: none is kept)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes = sizes_of(args.tp)
    work_folders = [args.work / f"tp{size}" for size in sizes] if args.work is not None else []
    if taken := next((folder for folder in work_folders if folder.exists()), None):
        raise UserError(f"{taken} exists", "choose another folder for --work")
    if args.out is not None and not args.out.parent.is_dir():
        raise UserError(f"{args.out.parent} is no folder", "make it, or choose another file for --out")
    record: dict[str, Any] = {
        "what": "vllm serve, greedy, asked by ssv-ab",
        # Those with a path say where things lie on one machine.
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith("VLLM_") and "/" not in v},
        "sizes": {},
    }
    gpus, device = number_of_gpus(args.gpus)
    record["gpus"] = gpus
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for size in sizes:
            began = time.monotonic()
            try:
                found = compare(args, size, gpus, work / f"tp{size}")
            except UserError as error:
                found = {"error": f"{error.what}: {error.cure}"}
            except OSError as error:  # as of a disk that is full
                found = {"error": str(error)}
            record["sizes"][str(size)] = {**found, "seconds": round(time.monotonic() - began, 1)}
            packages = versions("vllm", "torch", "triton", "transformers", "openai")
            write_record(record, args.out, packages, device)
    return 0 if all("error" not in found for found in record["sizes"].values()) else 1


def sizes_of(text: str) -> list[int]:
    """Tensor parallel sizes.

    Raises:
        UserError: they are no whole numbers from 1 on, or one is there twice.
    """
    try:
        sizes = [positive(word) for word in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--tp {text}: {error}", "give such as 1,2") from error
    if len(set(sizes)) < len(sizes):
        raise UserError(f"--tp {text} names a size twice", "name each once")
    return sizes


def number_of_gpus(given: int | None) -> tuple[int, str]:
    """How many GPUs arms are spread over, and the device whose name the record has."""
    import torch

    found = torch.cuda.device_count()
    return given or max(1, found), "cuda" if found else "cpu"


def compare(args: argparse.Namespace, size: int, gpus: int, work: Path) -> dict[str, Any]:
    """Exports for a size, runs the export's comparison, and gives its figures, with what went wrong under "error".

    Raises:
        UserError: it cannot be exported, or an arm needs more GPUs than there are.
        OSError: it cannot be written.
    """
    if size > gpus:
        raise UserError(f"an arm needs {size} GPUs, and there are {gpus}", "choose smaller ones with --tp")
    work.mkdir(parents=True)
    left_out = export_for(
        "vllm",
        args.bundle,
        work / "export",
        tensor_parallel=size,
        num_draft_tokens=args.num_draft_tokens,
        max_rows=max(map(int, args.concurrency.split(","))),
        max_length=args.max_length,
        memory_share=args.memory_share,
        pad_heads=True,
    )
    exported = json.loads((work / "export" / "export.json").read_text())["arms"]
    has_triton = importlib.util.find_spec("pytriton") is not None
    without_triton = "Triton Inference Server is not installed here (nvidia-pytriton)"
    can_run = [arm for arm in exported if arm != "ssv" or has_triton]
    arms = can_run if args.arms is None else args.arms.split(",")
    not_run = {arm: "not asked for" if arm != "ssv" or has_triton else without_triton for arm in exported}
    shapes = {role: heads_of(work / "export" / role / "config.json") for role in ("target", "draft")}
    env = {
        **os.environ,
        "ARMS": " ".join(arms),
        "ENGINE_OPTIONS": args.engine_options,
        "LOGS": str(work / "logs"),
        "READY_SECONDS": str(round(args.seconds)),
        # Commands that are installed beside this Python are found without its folder on the path, too.
        "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]),
    }
    for number, arm in enumerate(arms):
        taken = ",".join(str((number * size + gpu) % gpus) for gpu in range(size))
        env[f"{arm.upper()}_GPUS"] = taken
    command = [str(work / "export" / "compare.sh"), str(args.prompts), str(work / "report")]
    command += ["--num-prompts", str(args.num_prompts), "--concurrency", args.concurrency]
    command += ["--max-tokens", str(args.max_tokens)]
    error = run(command, env, args.seconds)
    found: dict[str, Any] = {
        "heads": shapes,
        "gpus_of_arms": {arm: env[f"{arm.upper()}_GPUS"] for arm in arms},
        "not_exported": left_out,
        "not_run": {arm: why for arm, why in not_run.items() if arm not in arms},
        **figures(work / "report"),
    }
    found["counters"] = {
        arm: counters for arm in arms if (counters := counted(work / "logs" / f"{arm}.metrics")) is not None
    }
    return found | ({"error": error} if error is not None else {})


def heads_of(path: Path) -> dict[str, int]:
    """Heads of an exported model, and of their keys and values."""
    config = json.loads(path.read_text())
    layers = config.get("transformer_layer_config", config)
    return {name: layers[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}


# --- processes ------------------------------------------------------------------------------------------------------


def run(command: Sequence[str], env: dict[str, str], seconds: float) -> str | None:
    """Runs a command in a session of its own, of which nothing is left behind; what went wrong, or None."""
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, env=env, stdout=sys.stderr, stderr=said, start_new_session=True)  # noqa: S603
        error = None
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            error = f"not done after {seconds:g} s"
            child.terminate()  # it ends its arms, and what was measured is reported
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(ENDING)
        else:
            error = f"it ended with {code}" if code else None
        finally:
            end_session(child)
        said.seek(0)
        lines = said.read().splitlines()
        print("\n".join(lines), file=sys.stderr)
        last = next((line for line in reversed(lines) if line.startswith("error:")), None)
        return error if error is None or last is None else f"{error}: {last}"


def end_session(child: subprocess.Popen[bytes]) -> None:
    """Kills all processes of a child's session: each arm has a process group of its own, and workers in it."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[3]) == child.pid:
                os.kill(int(stat.parent.name), signal.SIGKILL)
    child.wait()


# --- figures --------------------------------------------------------------------------------------------------------


def figures(report: Path) -> dict[str, Any]:
    """What `ssv-ab` has found, if it came to a report."""
    if not (report / "report.json").exists():
        return {}
    document = json.loads((report / "report.json").read_text())
    samples = by_arm(read_samples(report / "samples.jsonl")[0])
    arms: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in document["figures"]:
        arm, concurrency = row["arm"], row["concurrency"]
        latency = row["latency"]
        arms[arm][str(concurrency)] = {
            "requests": row["requests"],
            "failed": row["failed"],
            "output_tokens": row["output_tokens"],
            "tokens_per_s": round(row["tokens_per_s"], 1),
            "tokens_per_s_interval": speed_interval(samples[arm][concurrency]),
            "ttft_ms": in_ms(latency.get("ttft", {})),
            "itl_ms": in_ms(latency.get("itl", {})),
            "tpot_ms_mean": in_ms(latency.get("tpot", {})).get("mean"),
        }
    first = document["settings"]["arms"][0]["name"]
    for comparison in document["comparisons"]:
        for concurrency, differences in comparison["differences"].items():
            row = arms[comparison["arm"]][concurrency]
            sides = [samples[name][int(concurrency)] for name in (first, comparison["arm"])]
            row["identical_share"] = identical_share(*sides)
            row["speed_against_plain"] = speed_against(differences)
    return {
        "status": document["status"],
        "arms": dict(arms),
        "verdicts": [comparison["verdict"] for comparison in document["comparisons"]],
        "notes": document["notes"],
    }


def in_ms(seconds: dict[str, float]) -> dict[str, float]:
    """Statistics of a latency, in milliseconds."""
    return {name: round(1e3 * seconds[name], 3) for name in ("mean", "p50", "p95") if name in seconds}


def speed_interval(samples: Sequence[Sample]) -> list[float] | None:
    """Where tokens per second lie with 95 %: blocks are drawn, as `ssv-ab` does; None of too few."""
    turns = turns_of(samples)
    place = {block: number for number, block in enumerate(sorted({block for block, _ in turns}))}
    tokens, seconds = np.zeros(len(place)), np.zeros(len(place))
    for (block, _), turn in turns.items():
        tokens[place[block]] += sum(sample.output_tokens for sample in turn)
        seconds[place[block]] += busy_s(turn)
    if len(place) < MIN_BLOCKS or not tokens.any():
        return None
    interval = bootstrap(lambda counts: (counts @ tokens) / (counts @ seconds), len(place), level=LEVEL)
    return [round(interval.low, 1), round(interval.high, 1)]


def speed_against(differences: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """How many times as fast an arm makes a token as the first: of the difference in the time of a token."""
    cost = next((each for each in differences if each["metric"] == "cost"), None)
    if cost is None:
        return None
    interval = cost["interval"]
    found = {"times": round(1 / (1 + cost["estimate"]), 3)}
    if interval is not None:
        found |= {"low": round(1 / (1 + interval["high"]), 3), "high": round(1 / (1 + interval["low"]), 3)}
        found["level"] = interval["level"]
    return found


COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts_total",
    "drafted": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
    "generated": "vllm:generation_tokens_total",
    "requests": "vllm:request_success_total",
}


def counted(path: Path) -> dict[str, Any] | None:
    """vLLM's counters at an arm's end; None where there is no file of them.

    Args:
        path: of the text that a Prometheus server would read.
    """
    if not path.exists():
        return None
    values: dict[str, float] = defaultdict(float)
    by_position: dict[int, float] = defaultdict(float)
    for family in text_string_to_metric_families(path.read_text()):
        for sample in family.samples:
            values[sample.name] += sample.value
            if sample.name == "vllm:spec_decode_num_accepted_tokens_per_pos_total":
                by_position[int(sample.labels["position"])] += sample.value
    found: dict[str, Any] = {ours: int(values[theirs]) for ours, theirs in COUNTERS.items() if theirs in values}
    if drafts := found.get("drafts"):
        found["accepted_by_position"] = [round(by_position[at] / drafts, 4) for at in sorted(by_position)]
        found["tokens_per_pass"] = round((found["generated"] - found["requests"]) / drafts, 3)
        found["mean_acceptance_length"] = round(1 + found["accepted"] / drafts, 3)
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all arms are ended with it
    sys.exit(run_command(main))
