"""What compiling costs: time, plan size and peak memory of engines for a target and its draft, each in a process of its
own.

Memory is held against 1.5 times the target's fp16 weights plus the plan plus 600 MB, the INT4 plan against 0.55 times
the FP16 plan.

    python benchmarks/compile_engines.py --bundle bundles/smollm2-135m \\
        --prompts builder/presets/prompts/calibration.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ssv.bundle.manifest import read_manifest
from ssv.model.checkpoint import DecoderSpec
from ssv.support.environment import versions, write_record

_SSV_BUILD = [sys.executable, "-m", "ssv.builder.cli"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="to calibrate FP8 and INT4 on")
    parser.add_argument("--compute-capability", default="8.9")
    parser.add_argument("--precisions", default="fp16,fp8,int4")
    parser.add_argument("--repeats", type=int, default=1, help="builds of each; their times are all told")
    parser.add_argument("--keep", type=Path, help="folder for the quantized checkpoints (default: none is kept)")
    parser.add_argument("--out", type=Path, help="record to write")
    args = parser.parse_args()
    spec = DecoderSpec.from_dict(read_manifest(args.bundle).target)
    weight_bytes = 2 * sum(math.prod(shape) for shape in spec.weight_shapes().values())
    engines = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        shutil.copytree(args.bundle, bundle)
        checkpoints = args.keep or Path(folder)
        checkpoints.mkdir(parents=True, exist_ok=True)
        for role in ("target", "draft"):
            for precision in args.precisions.split(","):
                engines.append(_engine(bundle, role, precision, checkpoints, weight_bytes, args))
                print(engines[-1], file=sys.stderr)
    plans = {(e["role"], e["precision"]): e["plan_mb"] for e in engines}
    figures: dict[str, Any] = {"fp16_weights_mb": round(weight_bytes / 1e6, 1), "engines": engines}
    if {("target", "int4"), ("target", "fp16")} <= plans.keys():
        figures["int4_plan_of_fp16_plan"] = round(plans["target", "int4"] / plans["target", "fp16"], 3)
    write_record(figures, args.out, versions("torch", "nvidia-modelopt", "tensorrt-rtx-cu13"))
    return 0


def _engine(
    bundle: Path, role: str, precision: str, checkpoints: Path, weight_bytes: int, args: argparse.Namespace
) -> dict[str, Any]:
    options = ["--role", role, "--precision", precision]
    compiling = [
        *_SSV_BUILD,
        "compile",
        *options,
        "--compute-capability",
        args.compute_capability,
        "--bundle",
        str(bundle),
    ]
    quantize_seconds = None
    if precision in ("fp8", "int4"):
        checkpoint = checkpoints / f"{role}-{precision}"
        if not checkpoint.exists():
            started = time.monotonic()
            _run(
                [
                    *_SSV_BUILD,
                    "quantize",
                    str(bundle),
                    *options,
                    "--prompts",
                    str(args.prompts),
                    "--out",
                    str(checkpoint),
                ]
            )
            quantize_seconds = round(time.monotonic() - started, 1)
        compiling += ["--checkpoint", str(checkpoint)]
    builds = [json.loads(_run(compiling)) for _ in range(args.repeats)]
    peak, plan = max(b["peak_memory_bytes"] for b in builds), builds[0]["plan_bytes"]
    return {
        "role": role,
        "precision": precision,
        "plan_mb": round(plan / 1e6, 1),
        "build_seconds": [b["build_seconds"] for b in builds],
        "peak_memory_mb": round(peak / 1e6),
        "memory_allowed_mb": round((1.5 * weight_bytes + plan) / 1e6 + 600),
        "quantize_seconds": quantize_seconds,
    }


def _run(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout  # noqa: S603


if __name__ == "__main__":
    sys.exit(main())
