"""What a bundle's LLM does when it is first needed: costs are measured, heads are made. Neither at load."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_heads, tiny_decoder
from tiny_bundle import COSTS, build, write_recipe

from ssv.bundle.manifest import BundleError, read_manifest, write_manifest
from ssv.bundle.profile import Conditions
from ssv.model.checkpoint import CheckpointError
from ssv.model.heads import load_heads, read_heads, save_heads
from ssv.runtime import llm as llm_module
from ssv.runtime.decode import round as round_module
from ssv.runtime.engines import heads_on_demand
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.engines.cpu_layers import FusedLayers
from ssv.runtime.engines.heads_on_demand import HeadsOnDemand
from ssv.runtime.llm import LLM
from ssv.runtime.methods import PREMIUM
from ssv.runtime.request import Request, RequestError, SamplingParams
from ssv.runtime.serving.service import Service
from ssv.runtime.threads import ThreadCount

PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    build(write_recipe(folder, heads=True), folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Measurements so far."""
    found: list[object] = []

    def measure(*engines: object, **options: object) -> object:
        found.append(options)
        return COSTS

    monkeypatch.setattr(llm_module, "measure", measure)
    return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Heads made so far."""
    found: list[object] = []
    make = heads_on_demand.heads_engine
    monkeypatch.setattr(heads_on_demand, "heads_engine", lambda *a, **k: found.append(a) or make(*a, **k))
    return found


def ask(llm: LLM, method: str, policy: object = None) -> None:
    llm.generate([Request((3, 4, 5), method, PARAMS, policy=policy)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("engine", "vllm", "engine 'vllm' is unknown; known: torch, tensorrt, tensorrt_llm"),
        ("device", "tpu", "device 'tpu' is unknown; known: cpu, cuda"),
        ("device", "meta", "device 'meta' is unknown"),
        ("max_batch", 0, "max_batch 0 must be a whole number from 1 on"),
        ("max_batch", 2.5, "max_batch 2.5 must be"),
        ("max_length", -1, "max_length -1 must be"),
        ("prefill_chunk", 0, "prefill_chunk 0 must be"),
        ("threads", "2", "threads must be 1 to 1024, got '2'"),
        ("gpu_memory_share", 0.5, "a share of GPU memory is of the torch engine on CUDA: leave it out"),
    ],
)
def test_what_cannot_be_loaded_is_named(bundle: Path, option: str, value: Any, named: str) -> None:
    with pytest.raises(EngineError, match=named):
        LLM.load(bundle, **{option: value})


@pytest.mark.parametrize("asked", ["hello", ["hello"], [{"prompt": "hello"}], None, Request((1,), "premium")])
def test_what_is_no_list_of_requests(bundle: Path, asked: Any) -> None:
    with pytest.raises(RequestError, match=r"must be a list of `Request`: .*chat_ids"):
        LLM.load(bundle, max_length=64, verify=False).generate(asked)


def test_what_is_no_bundle_and_no_message(bundle: Path) -> None:
    for wrong in (None, 5):
        with pytest.raises(EngineError, match=rf"bundle {wrong} must be a path: give the folder"):
            LLM.load(wrong)  # type: ignore[arg-type]
    llm = LLM.load(bundle, max_length=64, verify=False)
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(RequestError, match=r"must be the text of a message: `LLM\.tokenizer\.chat_ids` takes"):
        llm.chat_ids(messages)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="must be text: `chat_ids` takes the messages"):
        llm.tokenizer.encode(messages)  # type: ignore[arg-type]
    for strange in (
        "a",
        ["a"],
        [{}],
        [{"role": "user"}],
        [{"role": 5, "content": "a"}],
        [{"role": "user", "content": None}],
    ):
        with pytest.raises(RequestError, match="must be a list of messages: give each a role and a text, as"):
            llm.tokenizer.chat_ids(strange)  # type: ignore[arg-type]
    assert llm.tokenizer.chat_ids(messages) == llm.chat_ids("a")


def test_costs_are_measured_for_the_first_request_that_goes_by_them(bundle: Path, measured: list[object]) -> None:
    llm = LLM.load(bundle, max_length=64, verify=False)
    for method in ("autoregressive", "speculative", "balanced"):
        ask(llm, method)
    assert not measured and llm.costs is None and not llm.measured
    for _ in range(2):
        ask(llm, "premium", PREMIUM)
    ask(llm, "suffix")
    assert len(measured) == 1 and llm.costs == COSTS and llm.measured


def test_a_service_knows_costs_before_its_first_request(bundle: Path, measured: list[object]) -> None:
    service = Service(LLM.load(bundle, max_length=64, verify=False), max_waiting=1)
    assert len(measured) == 1
    assert service.drain(10.0)


def test_a_profile_of_this_place_is_taken(bundle: Path, measured: list[object]) -> None:
    old = read_manifest(bundle, verify=False)
    place = LLM.load(bundle, max_length=64, verify=False).place
    write_manifest(bundle, old.model_copy(update={"profiles": {place: COSTS}}))
    llm = LLM.load(bundle, max_length=64, verify=False)
    write_manifest(bundle, old)
    assert llm.know_costs() == COSTS and not measured and not llm.measured


def test_costs_measured_on_a_busy_machine_are_doubted(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quiet, busy = Conditions(missing_cores=0.05, spread=1.1), Conditions(missing_cores=0.9, spread=1.1)
    llm = LLM.load(bundle, max_length=64, verify=False)
    for conditions in (quiet, busy):
        costs = COSTS.model_copy(update={"conditions": conditions})
        monkeypatch.setattr(llm_module, "measure", lambda *_, costs=costs, **__: costs)
        llm.costs = None
        llm.know_costs()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and "other processes took 0.9 of the cores" in said[0] and "`ssv-build profile`" in said[0]


def test_heads_are_made_when_they_are_first_asked(bundle: Path, made: list[object]) -> None:
    llm = LLM.load(bundle, max_length=64, verify=False)
    assert "medusa" in llm.methods
    ask(llm, "speculative")
    assert not made
    for _ in range(2):
        ask(llm, "medusa")
    assert len(made) == 1


def test_damaged_heads_are_refused_at_load(bundle: Path) -> None:
    path = bundle / "heads.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(BundleError, match=r"heads.safetensors does not match the manifest"):
            LLM.load(bundle, max_length=64)
        path.write_bytes(whole[:-64])
        with pytest.raises(CheckpointError, match=r"heads.safetensors cannot be read"):
            LLM.load(bundle, max_length=64, verify=False)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_on_demand_are_those_of_the_file(tmp_path: Path, tied: bool, made: list[object]) -> None:
    """Whatever becomes of the file after it was read, and from whichever thread they are asked first."""
    target = tiny_decoder(tie_embeddings=tied)
    path = tmp_path / "heads.safetensors"
    save_heads(random_heads(target, 2), path, torch.float32)
    expected = load_heads(path, target)
    parts = read_heads(path, target.spec).of(target, holds_embedding=True)
    assert (parts.lm_head_UH is not None and len(parts.lm_head_UH) == target.spec.vocab_size) == tied
    path.unlink()
    engine = HeadsOnDemand(parts, precision="fp32")
    hidden_RH = torch.randn(4, target.spec.hidden_size, generator=torch.Generator().manual_seed(1))
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(engine.logits(hidden_RH))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(found) == 4
    assert all(torch.allclose(logits, expected.logits(hidden_RH), atol=1e-5) for logits in found)
    assert engine.num_heads == 3 and engine.token_ids_V is not None


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_torch_has_one_thread_beside_compiled_steps(
    bundle: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other threads would go on spinning on the cores that the next step needs. In fp32 the steps are torch's."""
    if not FusedLayers.available():
        pytest.skip("ssv was installed without a C compiler")
    found: set[int] = set()
    choose = round_module.choices

    def choices(*args: Any, **options: Any) -> list[int]:
        found.add(torch.get_num_threads())
        return choose(*args, **options)

    monkeypatch.setattr(round_module, "choices", choices)
    monkeypatch.setattr(ThreadCount, "follow", lambda self: self._apply(2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ask(LLM.load(bundle, max_length=64, precision=precision, verify=False), "autoregressive")
        assert found == {1 if precision == "int8" else 2} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
