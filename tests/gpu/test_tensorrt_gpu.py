"""TensorRT engines on a GPU: compiled for it here, they take the steps that the torch engine takes.

Needs an NVIDIA GPU of compute capability 7.5, 8.x or 12.x with `tensorrt_rtx`, or any from 8.0 on with full TensorRT 11
and `SSV_FLAVOR=tensorrt`:

    make test-tensorrt
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from drive import drive, flat, names
from tiny import relative_error
from tiny_bundle import build, write_recipe

from ssv.builder.config import EngineConfig, checked
from ssv.builder.tensorrt.engine import compile_engine
from ssv.bundle.manifest import read_manifest
from ssv.runtime.engines.tensorrt_engine import PlanRunner, load_engine
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, SamplingParams
from ssv.support.progress import silent

FLAVOR = os.environ.get("SSV_FLAVOR", "tensorrt_rtx")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("engines")
    build(write_recipe(base), base / "bundle")
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    for role in ("target", "draft"):
        settings = {"compute_capability": [capability], "flavor": FLAVOR, "max_length": 192, "prefill_chunk": 64}
        compile_engine(base / "bundle", checked(EngineConfig, role=role, precision="fp16", **settings), silent)
    return base / "bundle"


def test_target_and_the_torch_engine_take_the_same_steps(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    entry = next(e for e in manifest.engines.values() if e.role == "target")
    engine = load_engine(bundle, manifest, entry)
    found = drive(engine, features_out=True)
    expected = drive(LLM.load(bundle, precision="fp32").target, features_out=True)
    for name in names(features_out=True):
        assert relative_error(flat(found, name).cpu(), flat(expected, name)) < 2e-2


def test_shapes_that_come_back_are_captured_and_say_the_same(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    entry = next(e for e in manifest.engines.values() if e.role == "target")
    engine = load_engine(bundle, manifest, entry)
    first, again = drive(engine), drive(engine)
    assert torch.equal(flat(first, "logits_RV"), flat(again, "logits_RV"))
    runner = engine._runner
    assert isinstance(runner, PlanRunner)
    assert any(bound.graph is not None for bound in runner._bound.values())


def test_whole_decoding_is_lossless(bundle: Path) -> None:
    llm = LLM.load(bundle, engine="tensorrt")
    prompt = tuple(range(7, 30))
    methods = ("autoregressive", "speculative", "premium")
    outputs = [llm.generate([Request(prompt, m, SamplingParams(max_tokens=40))])[0].token_ids for m in methods]
    assert outputs[0] == outputs[1] == outputs[2]
