"""A bundle over TensorRT-LLM, as a fake of its published interface has it."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_trtllm
import pytest
from checkout import ROOT
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from tiny_bundle import build, built_with, write_recipe

from ssv.bundle.manifest import read_manifest
from ssv.runtime.decode.scheduler import QueueFull
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.llm import LLM
from ssv.runtime.request import Chunk, Output, Request, RequestError, SamplingParams
from ssv.runtime.serving.service import Service, ServiceError
from ssv.runtime.trtllm.install import INSTALL, NEWEST_READ, OLDEST_READ, VERSIONS, TrtllmError, load_trtllm

SECONDS = 60.0
MAX_TOKENS = 14


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_with(tmp_path_factory.mktemp("trtllm"), "kind: standalone")


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conditioned")
    build(write_recipe(folder), folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def installed() -> Iterator[None]:
    with fake_trtllm.installed():
        yield


def load(bundle: Path, max_batch: int = 3, **options: Any) -> LLM:
    options = {"max_length": 96, "verify": False, **options}
    return LLM.load(bundle, engine="tensorrt_llm", max_batch=max_batch, **options)


def requests(count: int, **params: Any) -> list[Request]:
    settings = {"max_tokens": MAX_TOKENS, **params}
    prompts = [tuple(7 + (11 * i + 3 * j) % 100 for j in range(4 + i)) for i in range(count)]
    return [Request(prompt, "premium", SamplingParams(**settings)) for prompt in prompts]


def plain(bundle: Path, asked: list[Request]) -> list[Output]:
    llm = LLM.load(bundle, max_length=96, verify=False, precision="fp32")
    return llm.generate([Request(each.prompt_ids, "autoregressive", each.params) for each in asked])


def told(output: Output) -> tuple[object, ...]:
    return output.text, output.token_ids, output.finish_reason


@pytest.mark.usefixtures("installed")
def test_its_text_is_that_of_plain_decoding(bundle: Path) -> None:
    asked = requests(5)
    outputs = load(bundle).generate(asked)
    assert [told(each) for each in outputs] == [told(each) for each in plain(bundle, asked)]
    for output in outputs:
        counters = output.counters
        assert counters.emitted == len(output.token_ids) and counters.prompt_tokens >= 4
        # Each pass gives one token of the target's, the prompt's own step one more.
        assert counters.emitted == 1 + counters.target_passes + counters.accepted
        assert counters.judged == counters.accepted + counters.rolled_back
    total = sum((each.counters for each in outputs[1:]), outputs[0].counters)
    assert total.judged > 0 and total.accepted > 0


@pytest.mark.parametrize("pause_every", [2, 3])
def test_requests_that_are_preempted_have_the_same_text(bundle: Path, pause_every: int) -> None:
    asked = requests(6)
    with fake_trtllm.installed(pause_every=pause_every):
        outputs = load(bundle, max_batch=2).generate(asked)
        assert fake_trtllm.LLM.made[0].executor.paused > 3
    assert [told(each) for each in outputs] == [told(each) for each in plain(bundle, asked)]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("ends", [{"stop": ("w",)}, {"stop_token_ids": tuple(range(60, 112))}, {"ignore_eos": True}])
def test_ends_are_those_of_plain_decoding(bundle: Path, ends: dict[str, Any]) -> None:
    asked = requests(4, **ends)
    outputs = load(bundle).generate(asked)
    assert [told(each) for each in outputs] == [told(each) for each in plain(bundle, asked)]


@pytest.mark.usefixtures("installed")
def test_a_pass_is_as_wide_as_the_longest_draft(bundle: Path) -> None:
    load(bundle).generate(requests(1))
    most = min(read_manifest(bundle).policies["premium"].max_pending, 8)
    assert set(fake_trtllm.LLM.made[0].executor.passes) == {1, 1 + most}
    assert fake_trtllm.LLM.made[0].max_seq_len == 96 + most + 1


class Sink:
    def __init__(self, cancelled: bool = False) -> None:
        self.chunks: list[Chunk] = []
        self.error: Exception | None = None
        self.cancelled, self.ended = cancelled, threading.Event()

    def send(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        if chunk.finish_reason is not None:
            self.ended.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.ended.set()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def wait(self) -> Sink:
        assert self.ended.wait(SECONDS)
        return self


@pytest.mark.usefixtures("installed")
def test_a_service_above_it_works_as_above_any_engine(bundle: Path) -> None:
    service = Service(load(bundle), max_waiting=8, prompt_cache_bytes=1 << 20, audit_share=1.0)
    asked = requests(5)
    sinks = [Sink() for _ in asked]
    for request, sink in zip(asked, sinks, strict=True):
        service.submit(request, sink)
    found = [tuple(token for chunk in sink.wait().chunks for token in chunk.token_ids) for sink in sinks]
    assert found == [each.token_ids for each in plain(bundle, asked)]
    refused = Sink()
    service.submit(Request((7, 8), "balanced"), refused)
    assert isinstance(refused.wait().error, RequestError)
    assert service.drain(SECONDS)
    assert service.load.decoding == service.load.waiting == 0


@pytest.mark.usefixtures("installed")
def test_who_leaves_is_ended_in_the_engine_too(bundle: Path) -> None:
    service = Service(load(bundle), max_waiting=8)
    executor = fake_trtllm.LLM.made[0].executor
    gone, late, stays = Sink(), Sink(), Sink()
    long = SamplingParams(max_tokens=60, ignore_eos=True)
    service.submit(Request((7, 8, 9), "premium", long), gone)
    service.submit(Request((7, 9), "premium", long, deadline=time.monotonic() + 0.05), late)
    service.submit(Request((9, 9, 8), "premium", SamplingParams(max_tokens=6, ignore_eos=True)), stays)
    gone.cancelled = True
    assert [sink.wait().chunks[-1].finish_reason for sink in (gone, late, stays)] == ["cancelled", "deadline", "length"]
    assert sum(len(chunk.token_ids) for chunk in stays.chunks) == 6
    deadline = time.monotonic() + SECONDS
    while len(executor._active) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert not executor._active
    service.drain(SECONDS)


@pytest.mark.usefixtures("installed")
def test_an_engine_that_fails_ends_the_service(bundle: Path) -> None:
    died = threading.Event()
    service = Service(load(bundle), max_waiting=8, on_death=lambda error: died.set())
    fake_trtllm.LLM.made[0].executor.error = RuntimeError("out of memory")
    sink = Sink()
    service.submit(requests(1)[0], sink)
    assert isinstance(sink.wait().error, ServiceError) and "out of memory" in str(sink.error)
    assert died.wait(SECONDS)


@pytest.mark.usefixtures("installed")
def test_too_many_are_refused(bundle: Path) -> None:
    generator = load(bundle, max_batch=1).generator(max_waiting=1)
    asked, policy = requests(3), read_manifest(bundle).policies["premium"]
    for index in range(2):
        generator.submit(index, asked[index], policy, None)
    with pytest.raises(QueueFull):
        generator.submit(2, asked[2], policy, None)
    while generator.has_work:
        list(generator.step())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request((7,), "autoregressive"), "premium alone"),
        (Request((7,), "balanced"), "judges every drafted token"),
        (Request((7,), "premium", SamplingParams(min_p=0.1)), "min_p cannot be had"),
        (Request((7,), "premium", SamplingParams(repetition_penalty=1.1)), "repetition_penalty cannot be had"),
        (Request((7,), "premium", SamplingParams(logprobs=1)), "logprobs cannot be had"),
        (Request((7,), "premium", SamplingParams(prompt_logprobs=0)), "prompt_logprobs cannot be had"),
        (Request((7,), "premium", SamplingParams(logit_bias=((3, 1.0),))), "logit_bias cannot be had"),
        (Request((7,), "premium", SamplingParams(bad_token_ids=((3,),))), "bad_token_ids cannot be had"),
        (Request((7,), "premium", SamplingParams(fates=True)), "fates cannot be had"),
        (Request((7,), "premium", SamplingParams(grammar="start: /a/")), "grammar cannot be had"),
        (Request((), "premium"), "the prompt is empty"),
        (Request((999,), "premium"), "outside the target's vocabulary"),
        (Request((7,), "premium", SamplingParams(stop_token_ids=(-1,))), "outside the target's vocabulary"),
        (Request((7,), "premium", SamplingParams(max_tokens=96)), "exceed the cache of 96"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(bundle: Path, request_: Request, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        load(bundle).generate([request_])


@pytest.mark.usefixtures("installed")
def test_sampled_requests_have_their_settings(bundle: Path) -> None:
    llm = load(bundle)
    llm.generate(requests(1, temperature=0.7, top_p=0.9, top_k=40, seed=5, min_tokens=3))
    llm.generate(requests(1))
    sampled, greedy = fake_trtllm.LLM.made[0].executor.params.values()
    assert (sampled.temperature, sampled.top_p, sampled.top_k, sampled.seed, sampled.min_tokens) == (0.7, 0.9, 40, 5, 3)
    assert (greedy.temperature, greedy.top_p, greedy.top_k) == (None, None, None)


@pytest.mark.usefixtures("installed")
def test_a_draft_that_takes_features_is_refused(conditioned: Path) -> None:
    with pytest.raises(EngineError, match="hidden states") as caught:
        load(conditioned)
    assert "standalone" in caught.value.cure


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("options", "says"),
    [({"precision": "int8"}, "bf16"), ({"prefill_chunk": 64}, "cuts prompts"), ({"tensor_parallel": 3}, "3 GPUs")],
)
def test_settings_that_it_has_not_are_refused(bundle: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        load(bundle, **options)


def test_only_it_shares_a_target(bundle: Path) -> None:
    with pytest.raises(EngineError, match="several GPUs"):
        LLM.load(bundle, tensor_parallel=2)


@pytest.mark.usefixtures("installed")
def test_what_is_loaded_says_what_it_can(bundle: Path) -> None:
    llm = load(bundle, tensor_parallel=2)
    assert llm.methods == ("premium",) and llm.know_costs() is None and llm.max_length == 96
    assert fake_trtllm.LLM.made[0].tensor_parallel_size == 2
    with pytest.raises(EngineError, match="runs its target by itself"):
        llm.target.step(None, None, None)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="keeps beginnings of prompts by itself"):
        list(llm.stream(requests(1), prompt_cache=llm.prompt_cache(1 << 20)))


@pytest.mark.usefixtures("installed")
def test_a_drafter_goes_to_other_processes_as_its_settings(bundle: Path) -> None:
    from ssv.runtime.trtllm.drafter import Settings, SsvDrafter, SsvResources

    drafter = SsvDrafter(Settings(bundle, "premium", 4, 2, 96, device="cpu"))
    there, manager = pickle.loads(pickle.dumps((drafter, SsvResources(drafter, 2))))
    request = fake_trtllm.LlmRequest(1, [7, 8, 9], 20)
    dummy = fake_trtllm.LlmRequest(2, [1, 1], 20, is_dummy=True)
    batch = fake_trtllm.ScheduledRequests(generation_requests=[dummy, request])
    there.prepare_draft_tokens(batch)
    assert request.py_draft_tokens and dummy.py_draft_tokens == []
    assert there._drafting.held.keys() == {1}
    manager.free_resources(request)
    there.prepare_draft_tokens(fake_trtllm.ScheduledRequests())
    assert not there._drafting.held
    assert (manager.get_max_resource_count(), manager.get_needed_resource_to_completion(request)) == (2, 0)


# --- installation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "stub", "says"),
    [
        (None, False, "is not installed"),
        ("1.2.1", False, "TensorRT-LLM 1.2.1 is installed"),
        ("1.3.0rc25", False, "1.3.0rc25 is installed"),
        ("1.5.0rc1", False, "1.5.0rc1 is installed"),
        ("1.4.0rc1", True, "stand-in"),
    ],
)
def test_what_is_not_there_is_said_with_versions_and_command(found: str | None, stub: bool, says: str) -> None:
    with fake_trtllm.installed(found, stub=stub), pytest.raises(TrtllmError, match=says) as caught:
        load_trtllm()
    assert VERSIONS in str(caught.value) + str(caught.value.cure) and caught.value.cure == INSTALL


@pytest.mark.parametrize("found", ["1.3.0rc26", "1.3.0", "1.4.0rc4", "1.4.2"])
def test_versions_that_are_taken(found: str) -> None:
    with fake_trtllm.installed(found):
        assert load_trtllm().LLM is fake_trtllm.LLM


def test_the_extra_names_the_same_versions() -> None:
    assert f'"tensorrt-llm{VERSIONS}"' in (ROOT / "setup.py").read_text()


def test_everything_names_the_versions_that_were_read() -> None:
    """In the docs, and where something is written to TensorRT-LLM's interface."""
    files = ("docs/beyond-one-gpu.md", "runtime/trtllm/engine.py", "runtime/trtllm/drafter.py")
    for name in (*files, "tests/support/fake_trtllm.py"):
        named = re.findall(r"1\.\d\.\d+rc\d+", (ROOT / name).read_text())
        assert {OLDEST_READ, NEWEST_READ} <= set(named), name
        assert all(Version(OLDEST_READ) <= Version(each) <= Version(NEWEST_READ) for each in named), name
    page = " ".join((ROOT / "docs/beyond-one-gpu.md").read_text().split())
    assert f"The interface was read from {OLDEST_READ} to {NEWEST_READ}" in page and INSTALL in page
    assert SpecifierSet(VERSIONS).contains(NEWEST_READ, prereleases=True)


def test_without_it_a_bundle_is_refused_at_load(bundle: Path) -> None:
    with pytest.raises(TrtllmError, match="TensorRT-LLM is not installed"):
        load(bundle)


def test_nothing_imports_it_before_it_is_asked_for() -> None:
    code = (
        "import sys, ssv.runtime, ssv.runtime.llm, ssv.runtime.serving.service, ssv.runtime.trtllm.engine\n"
        "assert 'tensorrt_llm' not in sys.modules and 'ssv.runtime.trtllm.drafter' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
