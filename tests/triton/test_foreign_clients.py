"""Clients that others wrote, as they are, against the real server: `make test-clients` installs them in an environment
of their own and says where it is in SSV_CLIENTS.

Prometheus is no Python package: SSV_PROMETHEUS or the path has it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit
from urllib.request import urlopen

import pytest

from ssv.bundle.manifest import read_manifest
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, SamplingParams

SECONDS = 240.0
NUM_REQUESTS = 8


class Server(Protocol):
    """What is used of the fixture."""

    @property
    def openai_url(self) -> str: ...
    @property
    def metrics_url(self) -> str: ...


@pytest.fixture(scope="module")
def clients() -> Path:
    """Folder of the clients' programs."""
    folder = os.environ.get("SSV_CLIENTS")
    if folder is None:
        pytest.skip("SSV_CLIENTS names no environment with the clients: run `make test-clients`")
    return Path(folder) / "bin"


def run(folder: Path, *command: str | Path) -> str:
    # With the hub they would look for models and prices there.
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def model_of(bundle: Path) -> str:
    """With its tier: the server's A/B router takes what names none, and decodes some of it by turbo."""
    return f"{read_manifest(bundle, verify=False).name}:premium"


@pytest.mark.parametrize("client", ["openai", "langchain", "pydantic_ai", "litellm", "prometheus_client"])
def test_a_python_client(server: Server, bundle: Path, clients: Path, client: str, tmp_path: Path) -> None:
    model = model_of(bundle)
    program = Path(__file__).with_name("clients.py")
    run(tmp_path, clients / "python", program, client, server.openai_url, server.metrics_url, model)


@pytest.mark.parametrize("kind", ["chat", "completions"])
@pytest.mark.parametrize("streaming", [True, False])
def test_aiperf(server: Server, bundle: Path, clients: Path, tmp_path: Path, kind: str, streaming: bool) -> None:
    address = f"http://{urlsplit(server.openai_url).netloc}"
    model = model_of(bundle)
    command = [clients / "aiperf", "profile", "--model", model, "--url", address, "--endpoint-type", kind]
    command += [
        "--tokenizer",
        bundle.resolve() / "tokenizer",
        "--concurrency",
        "2",
        "--request-count",
        str(NUM_REQUESTS),
    ]
    command += ["--synthetic-input-tokens-mean", "40", "--output-tokens-mean", "12", "--ui", "none"]
    run(tmp_path, *command, "--artifact-dir", tmp_path, *(["--streaming"] if streaming else []))
    lines = (tmp_path / "profile_export.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == NUM_REQUESTS
    assert not any(record.get("error") for record in records)


def test_guidellm_in_its_default_mode(server: Server, bundle: Path, clients: Path, tmp_path: Path) -> None:
    """Which asks for the usage in every chunk."""
    address = f"http://{urlsplit(server.openai_url).netloc}"
    command = [clients / "guidellm", "run", "--backend", f"kind=openai_http,target={address}"]
    command += ["--profile", "kind=synchronous", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}"]
    command += ["--tokenizer", f"kind=hf_auto,model={bundle.resolve() / 'tokenizer'}", "--disable-console"]
    run(tmp_path, *command, "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=12")
    (benchmark,) = json.loads((tmp_path / "benchmarks.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (NUM_REQUESTS, 0), totals


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}} It is"
doc_to_target: "{{{{choices[answer]}}}}"
"""
CHOICE = 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]\n'
TEXT = """
output_type: generate_until
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


def test_lm_eval_by_its_local_completions(
    server: Server, bundle: Path, clients: Path, tmp_path: Path, llm: LLM
) -> None:
    """Which asks for log-probabilities of token ids with `echo`, and for texts."""
    data = Path(__file__).parents[2] / "benchmarks/tasks/choices.jsonl"
    for name, kind in (("choice", CHOICE), ("text", TEXT)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    model = (
        f"model={model_of(bundle)},base_url={server.openai_url}/completions,tokenizer={bundle.resolve() / 'tokenizer'}"
    )
    command = [clients / "lm_eval", "run", "--model", "local-completions", "--model_args", f"{model},num_concurrent=2"]
    command += ["--tasks", f"{tmp_path / 'choice.yaml'},{tmp_path / 'text.yaml'}", "--limit", "3"]
    run(tmp_path, *command, "--log_samples", "--output_path", tmp_path / "out")
    samples = {
        name: [json.loads(line) for path in (tmp_path / "out").rglob(f"samples_{name}_*") for line in path.open()]
        for name in ("choice", "text")
    }
    assert [len(found) for found in samples.values()] == [3, 3]
    assert all(sample["resps"][0][0].strip() for sample in samples["text"])
    for sample in samples["choice"]:
        for choice, (found, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            prompt, whole = (
                llm.tokenizer.encode(f"{sample['doc']['question']} It is{end}") for end in ("", f" {choice}")
            )
            params = SamplingParams(max_tokens=1, prompt_logprobs=0)
            logprobs = llm.generate([Request(whole, "autoregressive", params)])[0].prompt_logprobs
            assert float(found) == pytest.approx(sum(each.logprob for each in logprobs[len(prompt) - 1 :]), abs=0.05)


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[str]:
    """Address of a Prometheus that scrapes the server."""
    found = os.environ.get("SSV_PROMETHEUS") or shutil.which("prometheus")
    if found is None:
        pytest.skip("there is no prometheus: install it, or name it in SSV_PROMETHEUS")
    target = urlsplit(server.metrics_url).netloc
    scrape = {"job_name": "ssv", "scrape_interval": "1s", "static_configs": [{"targets": [target]}]}
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))
    port = 19290
    command = [found, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20.0)


def test_prometheus(prometheus: str) -> None:
    def query(text: str) -> list[dict[str, Any]]:
        try:
            with urlopen(f"{prometheus}/api/v1/query?query={quote(text)}", timeout=5.0) as response:
                return list(json.load(response)["data"]["result"])
        except OSError:
            return []

    deadline = time.monotonic() + 60.0
    while not (up := query('up{job="ssv"} == 1')):
        assert time.monotonic() < deadline, "not scraped"
        time.sleep(0.5)
    assert len(up) == 1
    assert query("ssv_requests_decoding")
    with urlopen(f"{prometheus}/api/v1/metadata?metric=ssv_requests_decoding", timeout=5.0) as response:
        assert json.load(response)["data"]["ssv_requests_decoding"][0]["help"]
