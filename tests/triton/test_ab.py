"""Comparisons on a real server: live traffic that `ab_router` splits, and ssv-ab run over gRPC and the OpenAI API."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from triton_asks import SECONDS, Stream, tensor, texts, value
from tritonclient.utils import InferenceServerException

from ssv.ab.cli import main
from ssv.ab.journal import JournalReader
from ssv.ab.routing import fall_back, fallback_path
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, SamplingParams


class Server(Protocol):
    """What of the fixture is used here."""

    grpc_url: str
    metrics_url: str
    openai_url: str
    log: Path
    outcomes: Path

    @property
    def grpc_address(self) -> str: ...


PROMPT = "Describe a lighthouse."
TIERS = {"a": "premium", "b": "turbo"}


def ask(server: Server, user: str, *more: Any, max_tokens: int = 12, request_id: str = "") -> list[Any]:
    with Stream(server.grpc_address) as stream:
        inputs = [tensor("text_input", "BYTES", PROMPT), tensor("max_tokens", "INT32", max_tokens)]
        inputs += [tensor("stream", "BOOL", True), tensor("ssv_chat", "BOOL", True), tensor("ssv_user", "BYTES", user)]
        stream.send(*inputs, *more, model="ab_router", request_id=request_id)
        return stream.rest()


def outcomes(server: Server) -> list[dict[str, Any]]:
    return [record for record in JournalReader(server.outcomes).read() if record["event"] == "outcome"]


def wait_for(found: Callable[[], Any], seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return result


def test_every_user_has_an_arm_and_every_response_its_name(server: Server, llm: LLM) -> None:
    params = SamplingParams(max_tokens=12)
    expected = {a: llm.generate([Request(llm.chat_ids(PROMPT), t, params)])[0].text for a, t in TIERS.items()}
    seen: dict[str, set[str]] = {}
    for number in range(24):
        user = f"user {number % 12}"
        results = ask(server, user)
        arms = {value(result, "ssv_arm") for result in results}
        seen.setdefault(user, set()).update(arms)
        assert len(arms) == 1 and value(results[-1], "ssv_tier_used") == TIERS[arms.copy().pop()]
        assert texts(results) == expected[arms.pop()]
    assert all(len(arms) == 1 for arms in seen.values())
    assert {arm for arms in seen.values() for arm in arms} == {"a", "b"}


def test_outcomes_are_written_down(server: Server) -> None:
    ask(server, "somebody", request_id="written-1")
    record = wait_for(lambda: [r for r in outcomes(server) if r["id"] == "written-1"])[0]
    assert record["output_tokens"] == 12 and record["finish_reason"] == "length" and not record["error"]
    assert 0 < record["ttft_s"] <= record["e2e_s"]
    assert "somebody" not in server.outcomes.read_text() and PROMPT not in server.outcomes.read_text()


def test_a_request_cannot_choose_its_arm(server: Server) -> None:
    with pytest.raises(InferenceServerException, match="INVALID_ARGUMENT: ssv_tier is the arm's to set"):
        ask(server, "chooser", tensor("ssv_tier", "BYTES", "turbo"))


def test_what_the_arm_refuses_reaches_the_client(server: Server) -> None:
    with pytest.raises(InferenceServerException, match="INVALID_ARGUMENT: max_tokens"):
        ask(server, "refused", max_tokens=-1)


def test_a_client_that_leaves_frees_its_row(server: Server) -> None:
    with Stream(server.grpc_address) as stream:
        inputs = [
            tensor("text_input", "BYTES", PROMPT),
            tensor("max_tokens", "INT32", 900),
            tensor("ssv_chat", "BOOL", True),
        ]
        inputs += [
            tensor("stream", "BOOL", True),
            tensor("ignore_eos", "BOOL", True),
            tensor("ssv_user", "BYTES", "leaver"),
        ]
        stream.send(*inputs, model="ab_router", request_id="left-1")
        stream.next()
    record = wait_for(lambda: [r for r in outcomes(server) if r["id"] == "left-1"])[0]
    assert record["finish_reason"] == "cancelled" and record["output_tokens"] < 900
    # Ended by the server's engine, too, and not only forgotten by the router.
    ended = wait_for(
        lambda: [line for line in server.log.read_text().splitlines() if '"left-1"' in line and "cancelled" in line]
    )
    assert json.loads(ended[0])["emitted"] < 900


def test_an_arm_out_of_service_gets_nothing(server: Server) -> None:
    users = [f"faller {number}" for number in range(12)]
    before = {user: value(ask(server, user)[-1], "ssv_arm") for user in users}
    assert set(before.values()) == {"a", "b"}
    path = fallback_path(server.outcomes)
    try:
        fall_back(path, {"b": "a test"})
        assert {value(ask(server, user)[-1], "ssv_arm") for user in users} == {"a"}
    finally:
        path.unlink()
    assert {user: value(ask(server, user)[-1], "ssv_arm") for user in users} == before


def test_requests_at_the_same_time_keep_their_arms(server: Server) -> None:
    streams = [Stream(server.grpc_address) for _ in range(6)]
    try:
        for number, stream in enumerate(streams):
            inputs = [
                tensor("text_input", "BYTES", PROMPT),
                tensor("max_tokens", "INT32", 12),
                tensor("stream", "BOOL", True),
            ]
            stream.send(*inputs, tensor("ssv_user", "BYTES", f"crowd {number}"), model="ab_router")
        arms = [{value(result, "ssv_arm") for result in stream.rest()} for stream in streams]
    finally:
        for stream in streams:
            stream.__exit__()
    assert all(len(found) == 1 for found in arms)


def test_watch_reads_the_routers_log(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    ask(server, "watched")
    metrics = ["--metrics-url", server.metrics_url]
    assert main(["watch", str(server.outcomes), "--once", "--guard", "error_rate<50%,divergence<60%", *metrics]) == 0
    shown = capsys.readouterr().out
    assert "b less a" in shown and "go on" in shown and "torn" not in shown


def test_a_run_compares_tiers_and_apis(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    questions = [
        ("What is the capital of France?", "Paris"),
        ("What is frozen water called?", "ice"),
        ("Name a colour.", "blue"),
    ]
    questions += [
        ("How many days are in a week?", 7),
        ("What do bees make?", "honey"),
        ("What is the opposite of hot?", "cold"),
    ]
    prompts.write_text("".join(json.dumps({"prompt": q, "answer": a}) + "\n" for q, a in questions))
    arms = ["--a", f"premium={server.grpc_url}?method=premium", "--b", f"turbo={server.grpc_url}?method=turbo"]
    arms += ["--arm", f"api={server.openai_url}?model=smollm2-135m:premium"]
    options = ["--prompts", str(prompts), "--max-tokens", "8", "--margin", "0.1", "--concurrency", "1,2"]
    options += ["--price-per-hour", "1", "--slo", "ttft_p95<600s", "--out", str(tmp_path / "run")]
    assert main(["run", *arms, *options]) == 0
    document = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {(row["arm"], row["concurrency"], row["requests"], row["failed"]) for row in document["figures"]} == {
        (arm, concurrency, 12, 0) for arm in ("premium", "turbo", "api") for concurrency in (1, 2)
    }
    by_name = {comparison["arm"]: comparison for comparison in document["comparisons"]}
    assert by_name["api"]["identical_share"] == 1.0  # the same engine and tier, over another protocol
    premium, turbo, api = document["arms"]
    assert premium["lossless"] is True and turbo["lossless"] is False and api["lossless"] is True
    assert turbo["tiers"]["turbo"]["policy"]["accept_below"] > 0 and 0 < turbo["tiers"]["turbo"]["divergence_bound"] < 1
    assert turbo["bundle"] and turbo["confidence"]
    rows = {(row["arm"], row["concurrency"]): row for row in document["figures"]}
    assert rows["turbo", 1]["unverified_share"] > 0 and rows["api", 1]["unverified_share"] == 0
    assert rows["api", 1]["output_tokens"] == rows["premium", 1]["output_tokens"]
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    assert "turbo against premium" in capsys.readouterr().out
