"""`benchmarks/vllm_peer.py`, with a module that stands for vLLM: its own logic, and how an arm is started and ended."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from scripts import loaded
from tiny_bundle import built_with

from ssv.builder.export import export_for
from ssv.runtime.llm import LLM

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "vllm_peer.py"

VLLM = '''
"""Stands for vLLM: answers each request with three tokens that its prompt says, and hangs or dies where told."""
import sys
import time
from types import SimpleNamespace


class SamplingParams(SimpleNamespace):
    pass


class Engine:
    def __init__(self, speculates):
        self.waiting, self.speculates, self.drafts = [], speculates, 0

    def add_request(self, name, prompt, params):
        assert params.temperature == 0.0 and len(params.stop_token_ids) == 1
        self.waiting.append((name, prompt["prompt_token_ids"]))
        assert len(self.waiting) <= ROWS

    def step(self):
        name, ids = self.waiting.pop()  # the last first: outputs are to be put in order
        self.drafts += 2 * self.speculates
        outputs = [SimpleNamespace(token_ids=[len(ids), ids[-1], 7])]
        done = SimpleNamespace(request_id=name, finished=True, outputs=outputs)
        done.metrics = SimpleNamespace(first_token_latency=0.25)
        return [SimpleNamespace(finished=False), done]


class LLM:
    def __init__(self, **options):
        assert options["max_num_seqs"] == ROWS
        speculation = options.get("speculative_config")
        if speculation == {"method": "eagle3", "model": "dies", "num_speculative_tokens": 5}:
            sys.exit(3)
        if speculation is not None and speculation["method"] == "ngram":
            time.sleep(600)
        self.llm_engine = Engine(speculation is not None)

    def get_metrics(self):
        if not self.llm_engine.speculates:
            return [SimpleNamespace(name="vllm:num_requests_running", value=1)]
        return [
            SimpleNamespace(name="vllm:spec_decode_num_drafts", value=self.llm_engine.drafts),
            SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens", value=3 * self.llm_engine.drafts),
            SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=[1]),
        ]
'''


@pytest.fixture
def script() -> ModuleType:
    return loaded(SCRIPT)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    export_for("vllm", built_with(folder, "join: eagle3"), folder / "export", tensor_parallel=1)
    return folder


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a vllm in it, for the script's processes."""
    package = tmp_path / "packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(VLLM.replace("ROWS", "4"))
    (package / "sampling_params.py").write_text("class RequestOutputKind:\n    FINAL_ONLY = 2\n")
    (tmp_path / "packages" / "sitecustomize.py").write_text(
        "import torch\ntorch.cuda.get_device_name = lambda *_: 'a GPU'\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    return tmp_path


def test_prompts_are_those_of_this_project(script: ModuleType, bundle: Path) -> None:
    prompts = bundle / "prompts.jsonl"
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    llm = LLM.load(bundle / "bundle")
    assert script.prompt_ids(bundle / "export" / "target", prompts) == [llm.chat_ids(text) for text in texts]
    assert script.end_tokens(bundle / "export" / "target") == sorted(llm.eos_token_ids)


def arguments(**changes: Any) -> Namespace:
    given: dict[str, Any] = {
        "model": Path("m"), "draft": Path("d"), "rows": "1,8", "draft_rows": "1,4", "dtype": "bfloat16", "waves": 4,
        "memory_share": 0.4, "attention_backend": None, "max_tokens": 128,
    }  # fmt: skip
    return Namespace(**given | changes)


def test_what_each_arm_asks_vllm_for(script: ModuleType) -> None:
    plain, draft, ngram = (script.plan(arm, arguments()) for arm in ("plain", "draft:3", "ngram:5"))
    assert plain["rows"] == [1, 8] and "speculative_config" not in plain["options"]
    assert draft["rows"] == [1, 4] and draft["options"]["max_num_seqs"] == 4
    assert draft["options"]["speculative_config"] == {"method": "eagle3", "model": "d", "num_speculative_tokens": 3}
    assert ngram["options"]["speculative_config"]["method"] == "ngram"
    assert "attention_backend" not in plain["options"]
    chosen = script.plan("plain", arguments(attention_backend="TRITON_ATTN"))
    assert chosen["options"]["attention_backend"] == "TRITON_ATTN"


@pytest.mark.parametrize(
    ("arm", "changes", "named"),
    [("draft:5", {"draft": None}, "--draft"), ("eagle", {}, "'eagle'"), ("draft:", {}, "'draft:'")],
)
def test_arms_that_are_none(script: ModuleType, arm: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SystemExit, match=named):
        script.plan(arm, arguments(**changes))


def test_a_run_of_all_arms(script: ModuleType, bundle: Path, vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that dies costs the others nothing."""
    out = vllm / "record.json"
    command = ["vllm_peer.py", "--model", str(bundle / "export" / "target"), "--draft", "dies"]
    command += ["--prompts", str(bundle / "prompts.jsonl"), "--arms", "plain,draft:5,draft:3"]
    command += ["--rows", "1,4", "--draft-rows", "4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    assert script.main() == 1
    record = json.loads(out.read_text())
    arms = record["arms"]
    num_prompts = len((bundle / "prompts.jsonl").read_text().splitlines())
    assert set(arms["plain"]["rows"]) == {"1", "4"} and arms["plain"]["gpu"] == "a GPU"
    plain = arms["plain"]["rows"]["4"]
    assert plain["of"] == min(16, num_prompts) == plain["same_text"] and plain["emitted"] == 3 * plain["of"]
    assert plain["first_token_ms"] == 250 and "tokens_per_pass" not in plain
    assert arms["draft:5"] == {"error": "it ended with 3"}
    draft = arms["draft:3"]["rows"]["4"]
    # Two drafts a request of three tokens in the stand-in: two tokens behind the first.
    assert draft["tokens_per_pass"] == 1.0 and draft["mean_acceptance_length"] == 4.0
    assert draft["same_text"] == draft["of"] and draft["same_text_each_run"]
    assert {"versions", "commit", "command"} <= record.keys()


def test_an_arm_that_hangs_is_ended(script: ModuleType, vllm: Path) -> None:
    plan = script.plan("ngram:5", arguments(draft_rows="4"))
    assert script.in_its_own_process({**plan, "prompts": [], "stop": []}, 2.0) == {"error": "not done after 2 s"}


def test_a_row_takes_the_next_prompt_when_its_own_has_ended(script: ModuleType) -> None:
    engine = Countdown([3, 1, 2, 1, 5])
    outputs = script.side_by_side(engine, [[1]] * 5, None, 2)
    assert [output.request_id for output in outputs] == list("01234")
    assert engine.running == [2, 2, 2, 2, 1, 1, 1, 1]


class Countdown:
    """An engine whose requests take so many steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.left: dict[str, int] = {}
        self.lengths = steps
        self.running: list[int] = []

    def add_request(self, name: str, prompt: Any, params: Any) -> None:
        self.left[name] = self.lengths[int(name)]

    def step(self) -> list[Any]:
        self.running.append(len(self.left))
        self.left = {name: left - 1 for name, left in self.left.items()}
        done = [name for name, left in self.left.items() if not left]
        for name in done:
            del self.left[name]
        return [SimpleNamespace(request_id=name, finished=True) for name in done]
