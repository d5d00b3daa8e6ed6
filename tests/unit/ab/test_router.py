"""What the router hands on, to whom, how requests end, and what is written down of them; before servers that are made
up.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from checkout import ROOT
from scripts import loaded
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ssv.ab import router as module
from ssv.ab.journal import Journal
from ssv.ab.live import LiveComparison
from ssv.ab.router import METRICS, Outcome, Router
from ssv.ab.routing import Routing, fall_back
from ssv.client.triton import ServerError

OWN = "grpc://127.0.0.1:1"


def response_of(text: str, reason: str = "", num_tokens: int = 2) -> Any:
    outputs: dict[str, str | int | bool] = {"text_output": text, "finish_reason": reason, "num_input_tokens": 7}
    outputs |= {"num_output_tokens": num_tokens, "total_draft_tokens": 4, "total_accepted_draft_tokens": 3}
    outputs |= {"ssv_unverified_tokens": 1, "ssv_typical_tokens": 2, "ssv_target_passes": 2}
    outputs |= {"ssv_cached_tokens": 5, "ssv_logprobs": "", "ssv_tier_withdrawn": "", "ssv_fates": ""}
    outputs |= {"ssv_arm": "", "ssv_draft_tokens": 9, "ssv_kept_per_pass": ""}
    outputs |= {"ssv_tier_used": "turbo", "ssv_lossless": False}
    response = service_pb2.ModelInferResponse(model_name="ensemble")
    for name, value in outputs.items():
        if isinstance(value, str):
            datatype, content = "BYTES", len(value.encode()).to_bytes(4, "little") + value.encode()
        elif isinstance(value, bool):
            datatype, content = "BOOL", bytes([value])
        else:
            datatype, content = "INT32", value.to_bytes(4, "little")
        response.outputs.add(name=name, datatype=datatype, shape=[1, 1])
        response.raw_output_contents.append(content)
    return response


def result_of(text: str, reason: str = "", num_tokens: int = 2) -> grpcclient.InferResult:
    return grpcclient.InferResult(response_of(text, reason, num_tokens))


HELLO = (result_of("Hel"), result_of("", num_tokens=0), result_of("lo", "stop", 3))
Step = grpcclient.InferResult | Exception | asyncio.Event


class FakeClient:
    """An arm that plays what it was given: results, errors to raise, and events to wait for."""

    def __init__(self, url: str, *, certificate: Path | None = None) -> None:
        self.url, self.certificate = url, certificate
        self.script: Sequence[Step] = HELLO
        self.asked: list[tuple[dict[str, grpcclient.InferInput], str]] = []
        self.num_closed = 0
        self.is_closed = False

    async def forward(
        self, inputs: Sequence[grpcclient.InferInput], *, request_id: str
    ) -> AsyncGenerator[grpcclient.InferResult, None]:
        self.asked.append(({tensor.name(): tensor for tensor in inputs}, request_id))
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, grpcclient.InferResult):
                    yield step
                else:
                    await step.wait()
        finally:
            self.num_closed += 1

    async def aclose(self) -> None:
        self.is_closed = True


def text_tensor(*values: str) -> np.ndarray:
    return np.array([[value.encode() for value in values]], dtype=np.object_)


class FakeRequest:
    """Nothing may follow its end."""

    def __init__(self, user: str | None = None, id: str = "", **tensors: np.ndarray) -> None:
        self.user, self.id = user, id
        self.tensors: Mapping[str, np.ndarray] = {"text_input": text_tensor("Hi"), **tensors}
        self.sent: list[tuple[Mapping[str, np.ndarray], str]] = []
        self.error: str | None = None
        self.num_ends = 0
        self.has_left = False

    def send(self, outputs: Mapping[str, np.ndarray], arm: str, is_last: bool) -> None:
        assert not self.num_ends
        self.sent.append((outputs, arm))
        self.num_ends += is_last

    def fail(self, message: str) -> None:
        assert not self.num_ends
        self.error = message
        self.num_ends += 1

    def is_cancelled(self) -> bool:
        return self.has_left

    @property
    def text(self) -> str:
        return b"".join(outputs["text_output"][0, 0] for outputs, _ in self.sent).decode()

    @property
    def arms(self) -> set[str]:
        return {arm for _, arm in self.sent}


class Stage:
    """A router before arms that are made up."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.log = folder / "log.jsonl"
        arms = {"a": {"share": 0.5, "tier": "premium"}, "b": {"share": 0.5, "tier": "turbo"}}
        self.routing = Routing.model_validate({"salt": "s", "log": self.log, "arms": arms, **options})
        self.outcomes: list[Outcome] = []
        self.fallbacks: list[Mapping[str, str]] = []
        self.router = Router(
            self.routing, OWN, on_outcome=self.outcomes.append, on_fallback=lambda arms: self.fallbacks.append(arms)
        )
        self.clients: dict[str, Any] = self.router._clients

    def user_of(self, arm: str) -> str:
        return next(user for user in map(str, range(100)) if self.routing.arm_of(user) == arm)

    def records(self, event: str = "outcome") -> list[dict[str, Any]]:
        records = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [record for record in records if record["event"] == event]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    monkeypatch.setattr(module, "AsyncClient", FakeClient)
    monkeypatch.setattr(module, "CANCEL_SECONDS", 0.001)
    return lambda **options: Stage(tmp_path, **options)


SHADOW = {"shadow": "b"}


def run(test: Coroutine[Any, Any, None]) -> None:
    async def body() -> None:
        before = asyncio.all_tasks()
        await test
        assert asyncio.all_tasks() == before, "something still runs"

    asyncio.run(asyncio.wait_for(body(), 20.0))


async def until(is_so: Callable[[], object]) -> None:
    while not is_so():
        await asyncio.sleep(0)


# What is handed on.


@pytest.mark.parametrize("arm", ["a", "b"])
def test_responses_are_handed_on_as_they_are_with_their_arm(make: Callable[..., Stage], arm: str) -> None:
    async def test() -> None:
        stage = make()
        request = FakeRequest(stage.user_of(arm), "id-1", max_tokens=np.array([[9]], dtype=np.int32))
        await stage.router.serve(request)
        assert request.arms == {arm}
        assert (request.num_ends, request.error) == (1, None)
        for (outputs, _), result in zip(request.sent, HELLO, strict=True):
            names = [output.name for output in result.get_response().outputs]
            assert list(outputs) == names
            for name in names:
                assert outputs[name].dtype == result.as_numpy(name).dtype
                assert np.array_equal(outputs[name], result.as_numpy(name))
        ((inputs, request_id),) = stage.clients[arm].asked
        assert request_id == "id-1"
        assert {name: t.datatype() for name, t in inputs.items()} == {
            "text_input": "BYTES",
            "max_tokens": "INT32",
            "ssv_tier": "BYTES",
        }
        assert inputs["ssv_tier"]._get_content()[4:] == {"a": b"premium", "b": b"turbo"}[arm]
        assert not stage.clients["ab".replace(arm, "")].asked
        await stage.router.close()

    run(test())


def test_tensors_reach_the_arm_with_their_types_and_shapes(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        arms = {"a": {"share": 0.5}, "b": {"share": 0.5, "max_divergence": 0.25}}
        stage = make(arms=arms)
        tensors = {
            "stream": np.array([[True]]),
            "seed": np.array([[2**64 - 1]], dtype=np.uint64),
            "temperature": np.array([[0.5]], dtype=np.float32),
            "stop_words": text_tensor("ü", ""),
        }
        for arm in arms:
            await stage.router.serve(FakeRequest(stage.user_of(arm), **tensors))
        inputs, _ = stage.clients["b"].asked[0]
        assert {name: (t.datatype(), t.shape()) for name, t in inputs.items()} == {
            "text_input": ("BYTES", [1, 1]),
            "stream": ("BOOL", [1, 1]),
            "seed": ("UINT64", [1, 1]),
            "temperature": ("FP32", [1, 1]),
            "stop_words": ("BYTES", [1, 2]),
            "ssv_max_divergence": ("FP32", [1, 1]),
        }
        assert inputs["seed"]._get_content() == b"\xff" * 8
        assert np.frombuffer(inputs["ssv_max_divergence"]._get_content(), np.float32) == [0.25]
        assert inputs["stop_words"]._get_content() == b"\x02\0\0\0" + "ü".encode() + b"\0\0\0\0"
        # An arm without settings leaves them to its server.
        assert set(stage.clients["a"].asked[0][0]) == set(inputs) - {"ssv_max_divergence"}
        await stage.router.close()

    run(test())


def test_a_user_stays_in_an_arm_and_requests_without_one_go_by_their_id(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        stage = make()
        user, id = stage.user_of("b"), stage.user_of("a")
        for request in (FakeRequest(user, "x"), FakeRequest(user, "y"), FakeRequest(user)):
            await stage.router.serve(request)
            assert request.arms == {"b"}
        for request in (FakeRequest(None, id), FakeRequest("", id)):
            await stage.router.serve(request)
            assert request.arms == {"a"}
        units = [record["unit"] for record in stage.records()]
        assert len(set(units[:3])) == len(set(units[3:])) == 1 and units[0] != units[3]
        assert not any(user in unit for unit in units[:1] if len(user) > 1)
        requests = [FakeRequest() for _ in range(60)]  # nobody said anything: each on its own
        for request in requests:
            await stage.router.serve(request)
        assert {arm for request in requests for arm in request.arms} == {"a", "b"}
        records = stage.records()[5:]
        assert len({record["unit"] for record in records}) == len({record["id"] for record in records}) == 60
        await stage.router.close()

    run(test())


def test_arms_of_other_servers_are_asked_there_without_our_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        monkeypatch.setattr(module, "AsyncClient", FakeClient)
        arms = {"a": {"share": 0.5}, "b": {"share": 0.5, "url": "grpcs://other:8001"}}
        routing = Routing.model_validate({"salt": "s", "log": tmp_path / "log", "arms": arms})
        router = Router(routing, "grpcs://own:1", certificate=Path("own.pem"))
        clients: Any = router._clients
        assert (clients["a"].url, clients["a"].certificate) == ("grpcs://own:1", Path("own.pem"))
        assert (clients["b"].url, clients["b"].certificate) == ("grpcs://other:8001", None)
        await router.close()
        assert clients["a"].is_closed and clients["b"].is_closed

    run(test())


@pytest.mark.parametrize("name", ["ssv_tier", "ssv_max_divergence", "ssv_policy"])
def test_a_request_with_settings_of_an_arm_is_refused(make: Callable[..., Stage], name: str) -> None:
    async def test() -> None:
        stage = make(**SHADOW)
        request = FakeRequest("u", **{name: text_tensor("premium")})
        await stage.router.serve(request)
        assert request.error is not None
        assert request.error.startswith(f"INVALID_ARGUMENT: {name} is the arm's to set")
        assert (request.sent, request.num_ends) == ([], 1)
        await until(lambda: len(stage.outcomes) == 2)
        assert not any(client.asked for client in stage.clients.values())
        await stage.router.close()

    run(test())


# How requests end.


def test_an_arms_error_reaches_the_client_with_its_status(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        stage = make()
        for first in ((), (result_of("Hel"),)):
            stage.clients["b"].script = (*first, ServerError("the queue burns: try later", "UNAVAILABLE"))
            request = FakeRequest(stage.user_of("b"))
            await stage.router.serve(request)
            assert (request.error, request.num_ends) == ("UNAVAILABLE: the queue burns: try later", 1)
            assert len(request.sent) == len(first)
            record = stage.records()[-1]
            assert (record["error"], record["finish_reason"]) == (request.error, "")
            assert record["e2e_s"] > 0
        await stage.router.close()

    run(test())


def test_what_was_not_foreseen_is_an_error_of_the_request_alone(
    make: Callable[..., Stage], caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        stage = make()
        lacking = grpcclient.InferResult(service_pb2.ModelInferResponse(model_name="ensemble"))
        for step in (KeyError("odd"), lacking):
            stage.clients["a"].script = (step,)
            request = FakeRequest(stage.user_of("a"))
            await stage.router.serve(request)
            assert request.error is not None and request.error.startswith("INTERNAL: ")
            assert request.num_ends == 1
        assert "could not be routed" in caplog.text
        await stage.router.close()

    run(test())


def test_an_error_after_the_last_response_reaches_nobody(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        stage = make(**SHADOW)
        for client in stage.clients.values():
            client.script = (*HELLO, OSError("the line is dead"))
        request = FakeRequest("u")
        await stage.router.serve(request)
        await until(lambda: len(stage.outcomes) == 2)
        assert (request.text, request.num_ends, request.error) == ("Hello", 1, None)
        assert [(record["error"], record["finish_reason"]) for record in stage.records()] == [("", "stop")] * 2
        await stage.router.close()

    run(test())


def test_a_request_that_cannot_even_be_assigned_ends_with_an_error(
    make: Callable[..., Stage], caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        stage = make()
        request = FakeRequest("\ud800")
        await stage.router.serve(request)
        assert request.error is not None and request.error.startswith("INTERNAL: UnicodeEncodeError")
        assert request.num_ends == 1
        assert "could not be assigned" in caplog.text
        await stage.router.serve(request := FakeRequest("u"))
        assert request.text == "Hello"
        await stage.router.close()

    run(test())


@pytest.mark.parametrize("first", [(), (result_of("Hel"),)], ids=["before the first token", "in mid-answer"])
def test_a_client_that_leaves_ends_its_request_at_the_arm(make: Callable[..., Stage], first: Sequence[Step]) -> None:
    async def test() -> None:
        stage = make()
        arm = stage.clients["a"]
        arm.script = (*first, asyncio.Event(), *HELLO)
        request = FakeRequest(stage.user_of("a"))
        task = asyncio.create_task(stage.router.serve(request))
        await until(lambda: arm.asked and len(request.sent) == len(first))
        assert not arm.num_closed and not task.done()
        request.has_left = True
        await task
        assert arm.num_closed == 1
        assert (len(request.sent), request.num_ends) == (len(first), 1)
        assert request.error is not None and request.error.startswith("CANCELLED")
        (record,) = stage.records()
        assert (record["finish_reason"], record["error"]) == ("cancelled", "")
        assert record["output_tokens"] == 2 * len(first)
        await stage.router.close()

    run(test())


def test_what_a_client_that_has_left_would_have_got_is_not_sent(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        stage = make()
        gate = asyncio.Event()
        stage.clients["a"].script = (gate, *HELLO)
        request = FakeRequest(stage.user_of("a"))
        task = asyncio.create_task(stage.router.serve(request))
        await until(lambda: stage.clients["a"].asked)
        request.has_left = True
        gate.set()
        await task
        assert (request.sent, request.num_ends) == ([], 1)
        await stage.router.close()

    run(test())


# What is written down.


def test_an_outcome_says_what_became_of_a_request(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        stage = make()
        await stage.router.serve(FakeRequest(stage.user_of("b"), "id-1"))
        await stage.router.close()
        (start,) = stage.records("start")
        assert Routing.model_validate(start["routing"]) == stage.routing
        (record,) = stage.records()
        assert record == {"event": "outcome", **json.loads(json.dumps(stage.outcomes[0].to_dict()))}
        assert record["at"] >= start["at"]
        assert 0 < record["ttft_s"] <= record["e2e_s"]
        known = {"id": "id-1", "arm": "b", "is_shadow": False, "is_fallback": False, "without": [], "pair": ""}
        known |= {"error": "", "finish_reason": "stop", "output_tokens": 5, "first_tokens": 2, "prompt_tokens": 7}
        known |= {"target_passes": 2, "judged": 4, "accepted": 3, "unverified": 1, "tier": "turbo", "lossless": False}
        assert known.items() <= record.items()
        assert len(record["unit"]) == len(record["text_sha"]) == 16
        assert set(stage.outcomes[0].counts()) == set(METRICS)
        assert stage.outcomes[0].counts()["ssv_ab_output_tokens"] == 5

    run(test())


def test_the_same_text_has_the_same_digest_however_it_came(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        stage = make(**SHADOW)
        stage.clients["b"].script = (result_of("Hello", "stop"),)
        await stage.router.serve(FakeRequest("u"))
        await until(lambda: len(stage.outcomes) == 2)
        stage.clients["b"].script = (result_of("Hullo", "stop"),)
        await stage.router.serve(FakeRequest("u"))
        await until(lambda: len(stage.outcomes) == 4)
        digests = [{r["text_sha"] for r in stage.records()[i : i + 2]} for i in (0, 2)]
        assert [len(each) for each in digests] == [1, 2]
        await stage.router.close()

    run(test())


def test_an_answer_that_came_at_once_ended_with_its_first_token(make: Callable[..., Stage]) -> None:
    """Else the moment that the stream takes to end would count as time per token."""

    async def test() -> None:
        stage = make()
        for client in stage.clients.values():
            client.script = (result_of("Hello", "stop", 5),)
        await stage.router.serve(FakeRequest("u"))
        (record,) = stage.records()
        assert record["ttft_s"] == record["e2e_s"]
        assert record["first_tokens"] == record["output_tokens"] == 5
        await stage.router.close()

    run(test())


def test_a_full_disk_does_not_stop_the_traffic(
    make: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        stage = make(**SHADOW)

        def full(self: Journal, record: Mapping[str, Any]) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", full)
            fall_back(stage.routing.fallback_path, {"c": "none of ours"})
            await stage.router.serve(request := FakeRequest("u"))
            await until(lambda: len(stage.outcomes) == 2)
        assert (request.text, request.error) == ("Hello", None)
        assert "the log of outcomes cannot be written" in caplog.text
        assert len(stage.outcomes) == 2  # metrics go on
        await stage.router.serve(FakeRequest("u"))
        assert stage.records()
        await stage.router.close()

    run(test())


def test_a_log_that_cannot_be_written_is_an_error_at_the_start(make: Callable[..., Stage], tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(FileNotFoundError):
            make(log=tmp_path / "none" / "log.jsonl")

    run(test())


def test_a_log_of_a_router_that_was_killed_goes_on(make: Callable[..., Stage], tmp_path: Path) -> None:
    async def test() -> None:
        for number in range(2):
            stage = make()
            await stage.router.serve(FakeRequest("u", f"id-{number}"))
            await stage.router.close()
            if number == 0:
                with stage.log.open("a") as file:
                    file.write('{"event":"outcome","id":"torn')
        lines = stage.log.read_text().splitlines()
        assert len(lines) == 5
        assert [json.loads(line)["event"] for line in (*lines[:2], *lines[3:])] == ["start", "outcome"] * 2

    run(test())


# Copies.


def test_a_shadow_is_asked_the_same_and_answers_nobody(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        stage = make(**SHADOW)
        stage.clients["b"].script = (result_of("Hullo", "stop"),)
        request = FakeRequest("u", "id-1")
        await stage.router.serve(request)
        await until(lambda: len(stage.outcomes) == 2)
        assert (request.text, request.arms) == ("Hello", {"a"})
        asked = {arm: stage.clients[arm].asked for arm in "ab"}
        assert [[(set(inputs), id) for inputs, id in each] for each in asked.values()] == [
            [({"text_input", "ssv_tier"}, "id-1")]
        ] * 2
        copies = {record["is_shadow"]: record for record in stage.records()}
        assert (copies[False]["arm"], copies[True]["arm"]) == ("a", "b")
        assert copies[False]["pair"] == copies[True]["pair"] != ""
        assert copies[False]["unit"] == copies[True]["unit"]
        await stage.router.close()

    run(test())


def test_a_shadow_that_hangs_or_fails_neither_delays_nor_fails_the_answer(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        stage = make(**SHADOW)
        gate = asyncio.Event()
        for step in (gate, ServerError("burns", "UNAVAILABLE"), KeyError("odd")):
            stage.clients["b"].script = (step, *HELLO)
            request = FakeRequest("u")
            await stage.router.serve(request)  # while the copy of the first hangs
            assert (request.text, request.num_ends, request.error) == ("Hello", 1, None)
        await until(lambda: len(stage.outcomes) == 5)
        assert [o.error[:14] for o in stage.outcomes if o.is_shadow] == ["UNAVAILABLE: b", "INTERNAL: KeyE"]
        gate.set()
        await until(lambda: len(stage.outcomes) == 6)
        assert (stage.outcomes[-1].is_shadow, stage.outcomes[-1].finish_reason) == (True, "stop")
        await stage.router.close()

    run(test())


def test_a_copy_goes_on_when_the_client_has_left_or_the_answer_failed(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        stage = make(**SHADOW)
        gate = asyncio.Event()
        stage.clients["b"].script = (gate, *HELLO)
        stage.clients["a"].script = (ServerError("burns", "UNAVAILABLE"),)
        await stage.router.serve(request := FakeRequest("u"))
        assert request.error == "UNAVAILABLE: burns"
        gate.set()
        await until(lambda: len(stage.outcomes) == 2)
        assert {r["is_shadow"]: (r["error"], r["finish_reason"]) for r in stage.records()} == {
            False: ("UNAVAILABLE: burns", ""),
            True: ("", "stop"),
        }
        await stage.router.close()

    run(test())


def test_only_a_share_of_requests_is_copied_and_requests_of_one_id_are_not_mixed_up(
    make: Callable[..., Stage],
) -> None:
    async def test() -> None:
        stage = make(**SHADOW, shadow_share=0.5)
        requests = [FakeRequest(str(number), "1") for number in range(40)]
        await asyncio.gather(*(stage.router.serve(request) for request in requests))
        copied = sum(stage.routing.is_shadowed(str(number)) for number in range(40))
        assert 10 < copied < 30
        await until(lambda: len(stage.outcomes) == 40 + copied)
        records = stage.records()
        assert sum(record["is_shadow"] for record in records) == copied
        pairs = [record["pair"] for record in records if record["pair"]]
        assert len(pairs) == 2 * len(set(pairs)) == 2 * copied
        live = LiveComparison()
        for record in (*stage.records("start"), *records):
            live.take(record)
        assert (live.pairs("b"), live.malformed) == ((copied, 0), 0)
        await stage.router.close()

    run(test())


# Falling back.


def test_an_arm_out_of_service_is_replaced_by_the_first_until_its_file_goes(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        stage = make()
        user = stage.user_of("b")

        async def ask() -> str:
            request = FakeRequest(user)
            await stage.router.serve(request)
            return request.arms.pop()

        path = stage.routing.fallback_path
        assert await ask() == "b"
        fall_back(path, {"b": "slow"})
        assert await ask() == "a"
        assert await ask() == "a"
        path.write_text('{"b": "slow')  # torn: as before
        assert await ask() == "a"
        path.write_text("{}")
        os.utime(path, ns=(1, 1))
        assert await ask() == "b"
        fall_back(path, {"b": "again"})
        assert await ask() == "a"
        path.unlink()
        assert await ask() == "b"
        records = stage.records()
        assert [r["is_fallback"] for r in records] == [False, True, True, True, False, True, False]
        assert [r["without"] for r in records] == [[], ["b"], ["b"], ["b"], [], ["b"], []]
        expected = [{"b": "slow"}, {}, {"b": "again"}, {}]
        assert [r["arms"] for r in stage.records("fallback")] == expected == stage.fallbacks
        # Asked with the settings of the arm that answers.
        assert all(inputs["ssv_tier"]._get_content()[4:] == b"premium" for inputs, _ in stage.clients["a"].asked)
        await stage.router.close()

    run(test())


def test_who_is_in_the_first_arm_anyway_does_not_fall_back_but_says_what_was_missing(
    make: Callable[..., Stage],
) -> None:
    async def test() -> None:
        stage = make()
        fall_back(stage.routing.fallback_path, {"b": "slow"})
        await stage.router.serve(FakeRequest(stage.user_of("a")))
        fall_back(stage.routing.fallback_path, {"a": "somebody's joke"})
        await stage.router.serve(request := FakeRequest(stage.user_of("a")))
        assert request.arms == {"a"}
        assert [(r["is_fallback"], r["without"]) for r in stage.records()] == [(False, ["b"]), (False, ["b", "a"])]
        await stage.router.close()

    run(test())


def test_a_shadow_out_of_service_gets_no_copies(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        stage = make(**SHADOW)
        fall_back(stage.routing.fallback_path, {"b": "slow"})
        await stage.router.serve(request := FakeRequest("u"))
        await stage.router.close()
        assert request.text == "Hello"
        assert not stage.clients["b"].asked
        assert [(r["is_shadow"], r["pair"]) for r in stage.records()] == [(False, "")]

    run(test())


# The end.


def test_closing_ends_copies_and_requests_and_leaves_nothing_running(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        stage = make(**SHADOW)
        for client in stage.clients.values():
            client.script = (result_of("Hel"), asyncio.Event())
        requests = [FakeRequest(str(number)) for number in range(3)]
        tasks = [asyncio.create_task(stage.router.serve(request)) for request in requests]
        await until(lambda: all(request.sent for request in requests) and len(stage.clients["b"].asked) == 3)
        for _ in range(20):
            await asyncio.sleep(0)
        await stage.router.close()
        assert all(task.done() for task in tasks)
        assert [request.num_ends for request in requests] == [1] * 3
        assert {request.error for request in requests} == {"UNAVAILABLE: the server is being stopped"}
        assert all(client.num_closed == 3 for client in stage.clients.values())
        assert all(client.is_closed for client in stage.clients.values())
        # What was cut is not taken for an answer.
        assert [record["finish_reason"] for record in stage.records()] == ["cancelled"] * 6

    run(test())


def test_many_requests_at_a_time_each_end_once(make: Callable[..., Stage]) -> None:
    async def test() -> None:
        stage = make()
        stage.clients["b"].script = (result_of("Hel"), ServerError("burns", "UNAVAILABLE"))
        requests = [FakeRequest(str(number)) for number in range(200)]
        await asyncio.gather(*(stage.router.serve(request) for request in requests))
        assert [request.num_ends for request in requests] == [1] * 200
        records = stage.records()
        assert len(records) == 200
        for number, request in enumerate(requests):
            assert (request.error is not None) == (stage.routing.arm_of(str(number)) == "b")
        assert {(r["arm"], bool(r["error"])) for r in records} == {("a", False), ("b", True)}
        await stage.router.close()

    run(test())


# Before gRPC servers.


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers as `ensemble` does, by what the prompt says; calls itself by a name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests: list[Any] = []
        self.cancelled = threading.Event()

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            self.requests.append(request)
            what = request.raw_input_contents[0][4:].decode()
            if what == "refuse":
                message = f"in ensemble 'ensemble', [request id: {request.id}] INVALID_ARGUMENT: top_p 5 is wrong"
                yield service_pb2.ModelStreamInferResponse(error_message=message)
                return
            yield service_pb2.ModelStreamInferResponse(infer_response=response_of(self.name))
            if what == "fail":
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            if what == "hang":
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
            yield service_pb2.ModelStreamInferResponse(infer_response=response_of("!", "stop"))


async def serve(triton: Triton) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"grpc://127.0.0.1:{port}"


def test_between_two_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(module, "CANCEL_SECONDS", 0.01)
        tritons = {arm: Triton(arm) for arm in "ab"}
        (server_a, url_a), (server_b, url_b) = [await serve(triton) for triton in tritons.values()]
        arms = {"a": {"share": 0.5}, "b": {"share": 0.5, "url": url_b, "tier": "turbo"}}
        routing = Routing.model_validate({"salt": "s", "log": tmp_path / "log", "arms": arms})
        router = Router(routing, url_a)
        user = {arm: next(u for u in map(str, range(99)) if routing.arm_of(u) == arm) for arm in "ab"}
        for arm in "ab":
            ends = {}
            for what in ("go", "refuse", "fail"):
                request = FakeRequest(user[arm], "id-1", text_input=text_tensor(what))
                await router.serve(request)
                assert request.num_ends == 1
                ends[what] = request.text, request.error
            assert ends == {
                "go": (f"{arm}!", None),
                "refuse": ("", "INVALID_ARGUMENT: top_p 5 is wrong"),
                "fail": (arm, "UNAVAILABLE: Socket closed"),
            }
            request = FakeRequest(user[arm], text_input=text_tensor("hang"))
            task = asyncio.create_task(router.serve(request))
            await until(lambda request=request: request.sent)  # type: ignore[misc]
            request.has_left = True
            await task
            assert await asyncio.to_thread(tritons[arm].cancelled.wait, 10.0)
            asked = tritons[arm].requests
            assert [(r.id, r.model_name) for r in asked[:3]] == [("id-1", "ensemble")] * 3
            tensors = [i.name for i in asked[0].inputs]
            assert tensors == (["text_input"] if arm == "a" else ["text_input", "ssv_tier"])
        await server_b.stop(0)
        request = FakeRequest(user["b"])
        await router.serve(request)
        assert request.error is not None and request.error.startswith("UNAVAILABLE: ")
        await router.close()
        await server_a.stop(0)

    asyncio.run(asyncio.wait_for(test(), 20.0))


# As Triton runs it.


class PbRequest:
    """A request of Triton's, and its response sender."""

    def __init__(self, id: str, tensors: Mapping[str, np.ndarray], **parameters: object) -> None:
        self.tensors, self._id, self._parameters = tensors, id, parameters
        self.responses: list[tuple[Any, int]] = []
        self.ended = threading.Event()
        self.was_asked_too_late = False

    def request_id(self) -> str:
        return self._id

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def get_response_sender(self) -> PbRequest:
        return self

    def is_cancelled(self) -> bool:
        self.was_asked_too_late |= self.ended.is_set()
        return False

    def send(self, response: Any, flags: int) -> None:
        assert not self.ended.is_set()
        self.responses.append((response, flags))
        if flags:
            self.ended.set()


class PbMetric:
    def __init__(self) -> None:
        self.value = 0.0

    def increment(self, value: float) -> None:
        self.value += value

    def set(self, value: float) -> None:
        self.value = value


class PbFamily:
    COUNTER, GAUGE = "counter", "gauge"
    made: dict[str, dict[tuple[tuple[str, str], ...], PbMetric]]

    def __init__(self, name: str, description: str, kind: str) -> None:
        self._metrics = self.made[name] = {}

    def Metric(self, labels: Mapping[str, str]) -> PbMetric:
        return self._metrics.setdefault(tuple(sorted(labels.items())), PbMetric())


@pytest.fixture
def shim(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The model's module, in a server that is made up."""
    fake: Any = ModuleType("triton_python_backend_utils")
    fake.Tensor = lambda name, array: (name, array)
    fake.TritonError = str
    fake.InferenceResponse = lambda tensors=(), error=None: SimpleNamespace(tensors=dict(tensors), error=error)
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    fake.MetricFamily = PbFamily

    def get(request: PbRequest, name: str) -> Any:
        return SimpleNamespace(as_numpy=lambda: request.tensors[name]) if name in request.tensors else None

    fake.get_input_tensor_by_name = get
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    monkeypatch.setattr(PbFamily, "made", {}, raising=False)
    monkeypatch.setattr(module, "AsyncClient", FakeClient)
    found = loaded(ROOT / "triton_repo" / "ab_router" / "1" / "model.py")
    handlers, level = logging.root.handlers[:], logging.root.level
    yield found
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def test_the_model_labels_responses_and_metrics_with_their_arm(shim: ModuleType, tmp_path: Path) -> None:
    arms = {"a": {"share": 0.5}, "b": {"share": 0.5, "tier": "turbo"}}
    routing = Routing.model_validate({"salt": "s", "log": tmp_path / "log", "arms": arms})
    values = {"routing": routing.model_dump_json(), "own_url": OWN, "certificate": ""}
    parameters = {name: {"string_value": value} for name, value in values.items()}
    model = shim.TritonPythonModel()
    model.initialize({"model_config": json.dumps({"parameters": parameters})})
    user = {arm: next(u for u in map(str, range(99)) if routing.arm_of(u) == arm) for arm in "ab"}
    requests = {}
    for arm in "ab":
        tensors = {"text_input": text_tensor("Hi"), "ssv_user": text_tensor(user[arm])}
        requests[arm] = PbRequest("", tensors)
    requests["refused"] = PbRequest(user["b"], {"text_input": text_tensor("Hi"), "ssv_tier": text_tensor("premium")})
    requests["misspelt"] = PbRequest("", {"text_input": text_tensor("Hi")}, max_token=3)
    requests["twice"] = PbRequest("", {"text_input": text_tensor("Hi")}, text_input="Ho")
    requests["parameter"] = PbRequest("", {"ssv_user": text_tensor(user["a"])}, text_input="Hi")
    model.execute([*requests.values()])
    assert all(request.ended.wait(60.0) for request in requests.values())
    fall_back(routing.fallback_path, {"b": "slow"})
    requests["back"] = PbRequest("", requests["b"].tensors)
    model.execute([requests["back"]])
    assert requests["back"].ended.wait(60.0)
    model.finalize()
    assert not any(request.was_asked_too_late for request in requests.values()), "Triton 2.51 would crash"
    for key, says in (("misspelt", "'max_token' is unknown: use max_tokens"), ("twice", "text_input is given twice")):
        ((refused, flags),) = requests[key].responses
        assert flags == 1 and refused.error.startswith(f"INVALID_ARGUMENT: {says}")
    for key, arm in (("a", b"a"), ("b", b"b"), ("back", b"a"), ("parameter", b"a")):
        responses = requests[key].responses
        assert [flags for _, flags in responses] == [0, 0, 1]
        assert [r.tensors["text_output"][0, 0] for r, _ in responses] == [b"Hel", b"", b"lo"]
        assert {r.tensors["ssv_arm"][0, 0] for r, _ in responses} == {arm}
    ((refused, flags),) = requests["refused"].responses
    assert flags == 1 and refused.error.startswith("INVALID_ARGUMENT: ssv_tier")
    found = {name: {labels: m.value for labels, m in each.items()} for name, each in PbFamily.made.items()}
    assert found["ssv_ab_requests"] == {
        (("arm", "a"), ("reason", "stop"), ("role", "live")): 3,
        (("arm", "b"), ("reason", "stop"), ("role", "live")): 1,
        (("arm", "b"), ("reason", "error"), ("role", "live")): 1,
    }
    assert found["ssv_ab_output_tokens"][("arm", "a"), ("role", "live")] == 15
    assert found["ssv_ab_fallback"] == {(("arm", "a"),): 0, (("arm", "b"),): 1}
    assert set(found) == {*METRICS, "ssv_ab_fallback"}
    # The user is for the router alone.
    clients: Any = model._router._clients
    assert [set(inputs) for inputs, _ in clients["a"].asked] == [{"text_input"}] * 3
