"""A real server over the demo's bundle, started once for all tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from openai import OpenAI
from triton_asks import SECONDS, free_ports, wait_until

from ssv.bundle.manifest import read_manifest
from ssv.runtime.llm import LLM

ROOT = Path(__file__).parents[2]
MAX_ROWS = 4
MAX_WAITING = 8
READY_SECONDS = 300.0
STOP_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs, and how it was started.

    Attributes:
        grpc_url, http_url, metrics_url, openai_url: as announced.
        pid: of ssv-serve.
        log: what it and its server write.
        outcomes: log of the router, between premium and turbo.
        max_rows, max_waiting: see `ServerConfig`.
    """

    grpc_url: str
    http_url: str
    metrics_url: str
    openai_url: str
    pid: int
    log: Path
    outcomes: Path
    max_rows: int = MAX_ROWS
    max_waiting: int = MAX_WAITING

    @property
    def grpc_address(self) -> str:
        return self.grpc_url.removeprefix("grpc://")


@pytest.fixture(scope="session")
def bundle() -> Path:
    folder = Path(os.environ.get("SSV_TEST_BUNDLE", ROOT / "bundles" / "smollm2-135m"))
    if not (folder / "manifest.json").is_file():
        pytest.fail(f"{folder} is not a bundle: run `make demo`, or set SSV_TEST_BUNDLE to the folder of one")
    return folder


@pytest.fixture(scope="session")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    outcomes, arms = folder / "outcomes.jsonl", folder / "arms.yaml"
    half = "share: 0.5, tier:"
    arms.write_text(f"salt: test\nlog: {outcomes}\narms: {{a: {{{half} premium}}, b: {{{half} turbo}}}}\n")
    # What an audit finds would change how later tests' requests are decoded; it has a server of its own.
    with serving(bundle, folder, "--audit-share", "0", "--ab", str(arms)) as started:
        yield started


@pytest.fixture
def another_server(bundle: Path, tmp_path: Path) -> Callable[..., AbstractContextManager[Server]]:
    """Starts a server of a test's own, which may end it."""
    return partial(serving, bundle, tmp_path)


@contextmanager
def serving(
    bundle: Path, folder: Path, *options: str, max_rows: int = MAX_ROWS, max_waiting: int = MAX_WAITING
) -> Iterator[Server]:
    """A server that has to end with status 0, if it has not been killed."""
    log, names = folder / "log", ("grpc", "http", "metrics", "openai")
    command = [sys.executable, "-m", "ssv.triton_repo.serve", "--bundle", str(bundle), "--threads", "1", *options]
    command += ["--max-rows", str(max_rows), "--max-waiting", str(max_waiting)]
    for name, port in zip(names, free_ports(len(names)), strict=True):
        command += [f"--{name}-port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        urls = _announced(process, log, names)
        yield Server(
            urls["grpc"],
            urls["http"],
            urls["metrics"],
            urls["openai"],
            process.pid,
            log,
            folder / "outcomes.jsonl",
            max_rows,
            max_waiting,
        )
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"the server did not stop within {STOP_SECONDS} s:\n{_end(log)}")
        if status not in (0, -signal.SIGKILL):
            pytest.fail(f"the server ended with status {status}:\n{_end(log)}")


@pytest.fixture(scope="session")
def llm(bundle: Path) -> LLM:
    """The bundle in this process: what the server's answers are compared with."""
    return LLM.load(bundle, verify=False)


@pytest.fixture(scope="module")
def url(server: Server) -> str:
    """The API's address, once it answers: it is started after the server."""
    address = urlsplit(server.openai_url).netloc

    def answers() -> bool:
        try:
            with urlopen(f"http://{address}/health", timeout=SECONDS) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    wait_until(answers, "it answers")
    return server.openai_url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600.0) as client:
        yield client


@pytest.fixture(scope="module")
def name(bundle: Path) -> str:
    return read_manifest(bundle, verify=False).name


@pytest.fixture(scope="module")
def model(name: str) -> str:
    """What is asked for where the tier does not matter: the server's A/B router takes what names none, and decodes
    some of it by turbo."""
    return f"{name}:premium"


def _announced(process: subprocess.Popen[bytes], log: Path, names: tuple[str, ...]) -> dict[str, str]:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        urls = dict(re.findall(r"^(\w+) +(\w+://\S+)$", log.read_text(errors="replace"), re.MULTILINE))
        if urls.keys() >= set(names):
            return urls
        if process.poll() is not None:
            pytest.fail(f"the server ended with status {process.returncode} before it was ready:\n{_end(log)}")
        time.sleep(0.2)
    pytest.fail(f"the server has not announced {', '.join(names)} within {READY_SECONDS} s:\n{_end(log)}")


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-8000:]
