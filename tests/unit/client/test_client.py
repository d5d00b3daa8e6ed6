"""The gRPC client without a server, and ssv-generate's options for one."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tritonclient.utils import InferenceServerException

from ssv.client.cli import main
from ssv.client.triton import Client, ServerError, Settings, request_inputs, server_error, split_url
from ssv.runtime.reply import Reply
from ssv.support.errors import UserError


def sent(prompt: object, settings: Settings, stream: bool = True) -> dict[str, tuple[list[int], str]]:
    tensors = request_inputs(prompt, settings, stream=stream)  # type: ignore[arg-type]
    return {t.name(): (t.shape(), t.datatype()) for t in tensors}


def test_only_what_is_set_is_sent() -> None:
    assert sent("a", Settings()) == {
        "text_input": ([1, 1], "BYTES"),
        "ssv_chat": ([1, 1], "BOOL"),
        "stream": ([1, 1], "BOOL"),
    }
    assert sent("a", Settings(tier="turbo", stop=("x", "y"), temperature=0.0, seed=0)).keys() - sent(
        "a", Settings()
    ).keys() == {
        "ssv_tier",
        "stop_words",
        "temperature",
        "seed",
    }
    assert sent("a", Settings(latency_bound_ms=40.0))["latency_bound_ms"] == ([1, 1], "FP32")
    assert sent("a", Settings(fates=True))["ssv_return_fates"] == ([1, 1], "BOOL")
    assert sent("a", Settings(stop=("x", "y")))["stop_words"] == ([1, 2], "BYTES")


def test_a_conversation_is_sent_as_messages() -> None:
    messages = [{"role": "system", "content": "é"}, {"role": "user", "content": "a"}]
    tensors = {t.name(): t for t in request_inputs(messages, Settings(), stream=False)}
    assert "ssv_chat" not in tensors
    raw = tensors["ssv_messages"]._get_content()
    assert json.loads(raw[4:]) == messages
    assert "é".encode() in raw, "escaped text would reach the server's limit of bytes early"


@pytest.mark.parametrize("url", ["127.0.0.1:8001", "http://h:8001", "grpc://h", "grpc://:8001", "grpc://h:8001/x", ""])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UserError, match="give grpc://"):
        split_url(url)


def test_addresses() -> None:
    assert split_url("grpc://h:1") == ("h:1", False)
    assert split_url("grpcs://h:1") == ("h:1", True)


@pytest.mark.parametrize(
    ("message", "status", "text"),
    [
        ("in ensemble 'ensemble', UNAVAILABLE: try later", "UNAVAILABLE", "try later"),
        ("in ensemble 'ensemble', [request id: a] Exceeds maximum queue size", "UNAVAILABLE", "too many requests"),
        ("in ensemble 'ensemble', INVALID_ARGUMENT: a: b\nc", "INVALID_ARGUMENT", "a: b\nc"),
        ("unexpected inference input 'x'", "UNKNOWN", "unexpected inference input 'x'"),
        ("failed to connect to all addresses", "UNAVAILABLE", "no server answers at grpc://h:1"),
    ],
)
def test_errors_say_what_the_server_said(message: str, status: str, text: str) -> None:
    error = server_error(InferenceServerException(message), "grpc://h:1")
    assert error.status == status
    assert str(error).startswith(text)


def test_no_server() -> None:
    with Client("grpc://127.0.0.1:9") as client, pytest.raises(ServerError):
        next(client.stream("a", Settings()))


@pytest.mark.parametrize("option", [["--precision", "int8"], ["--threads", "3"]])
def test_what_is_the_servers_to_say_is_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "grpc://127.0.0.1:9", *option, "hello"]) == 2
    assert "cannot be set for a server" in capsys.readouterr().err


class Asked:
    """Stands for the client; keeps what a server is asked."""

    settings: Settings | None = None

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stream(self, prompt: str, settings: Settings) -> Iterator[Reply]:
        Asked.settings = settings
        raise ServerError("asked", "UNAVAILABLE")


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ([], {}),
        (["--policy", '{"max_depth": 3, "children": [4]}'], {"max_depth": 3, "children": [4]}),
        (["--method", "speculative", "--num-draft-tokens", "3"], {"max_pending": 3}),
        (
            ["--method", "speculative", "--num-draft-tokens", "3", "--policy", '{"risk_budget": 0.5}'],
            {"max_pending": 3, "risk_budget": 0.5},
        ),
    ],
)
def test_a_server_is_asked_for_what_the_options_say_of_the_policy(
    monkeypatch: pytest.MonkeyPatch, options: list[str], policy: dict[str, object]
) -> None:
    monkeypatch.setattr("ssv.client.triton.Client", Asked)
    assert main(["--url", "grpc://127.0.0.1:9", *options, "hello"]) == 2
    assert Asked.settings is not None and Asked.settings.policy == policy
    tensors = {t.name(): t for t in request_inputs("hello", Asked.settings, stream=True)}
    assert json.loads(tensors["ssv_policy"]._get_content()[4:] if policy else "{}") == policy


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num-draft-tokens", "3"], "--num-draft-tokens is of the method speculative, not of premium"),
        (["--policy", "{"], "'{' is not JSON"),
        (["--policy", "3"], "'3' is no JSON object"),
        (
            ["--method", "speculative", "--num-draft-tokens", "3", "--policy", '{"max_pending": 4}'],
            "--num-draft-tokens and max_pending of --policy are the same setting: give one of them",
        ),
    ],
)
@pytest.mark.parametrize("where", [["--url", "grpc://127.0.0.1:9"], ["--bundle", "/nowhere"]])
def test_options_of_a_policy_that_cannot_be(
    where: list[str], options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert main([*where, *options, "hello"]) == 2
    except SystemExit as error:  # argparse's own
        assert error.code == 2
    assert says in " ".join(capsys.readouterr().err.replace("hint: ", "").split()).replace(" give one", ": give one")
