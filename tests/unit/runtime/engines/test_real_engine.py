"""The real compiler on the real model: SmolLM2-135M-Instruct, all its thirty layers, and its draft, as `ssv-build
compile` does it.

One precision here; all of them, with their times, in benchmarks/compile_engines.py.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from safetensors.torch import save_file

from ssv.builder.config import load_recipe
from ssv.builder.pair import UNCALIBRATED
from ssv.bundle.manifest import Manifest, TierEntry, file_entry, read_manifest, write_manifest
from ssv.model.checkpoint import hf_config, load_checkpoint
from ssv.model.decoder import Decoder
from ssv.model.draft import load_draft

PRESET = ROOT / "builder" / "presets" / "smollm2-135m.yaml"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What compiling needs of the demo's bundle."""
    folder = tmp_path_factory.mktemp("real")
    recipe = load_recipe(PRESET)
    spec, weights = load_checkpoint(recipe.target.locate())
    for name in ("target", "draft"):
        (folder / name).mkdir()
    (folder / "target" / "config.json").write_text(json.dumps(hf_config(spec, [2], torch.float16)))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "target" / "model.safetensors")
    assert recipe.draft.file is not None and recipe.scorer.file is not None
    shutil.copy(recipe.draft.file, folder / "draft" / "draft.safetensors")
    shutil.copy(recipe.scorer.file, folder / "scorer.safetensors")
    draft = load_draft(folder / "draft" / "draft.safetensors", Decoder.from_weights(spec, weights, torch.float16))
    files = ("target/config.json", "target/model.safetensors", "draft/draft.safetensors", "scorer.safetensors")
    manifest = Manifest(
        name="real",
        target=spec.to_dict(),
        draft=draft.spec.to_dict(),
        eos_token_ids=[2],
        default_precision="int8",
        tiers={"premium": TierEntry(policy=UNCALIBRATED, lossless=True)},
        files={name: file_entry(folder / name) for name in files},
        sources={},
        versions={},
    )
    write_manifest(folder, manifest)
    return folder


def compiled(bundle: Path, role: str) -> dict[str, Any]:
    options = ["--role", role, "--precision", "fp16", "--compute-capability", "8.9", "--bundle", str(bundle)]
    command = [sys.executable, "-m", "ssv.builder.cli", "compile", *options]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_target_and_draft_compile_without_a_gpu_and_within_their_memory(bundle: Path) -> None:
    target, draft = compiled(bundle, "target"), compiled(bundle, "draft")
    spec = load_checkpoint(bundle / "target")[0]
    weight_bytes = 2 * sum(math.prod(shape) for shape in spec.weight_shapes().values())
    assert weight_bytes < target["plan_bytes"] < 1.4 * weight_bytes
    assert draft["plan_bytes"] < 0.4 * weight_bytes
    assert target["peak_memory_bytes"] < 1.5 * weight_bytes + target["plan_bytes"] + 600e6
    assert {engine.role for engine in read_manifest(bundle).engines.values()} == {"target", "draft"}
