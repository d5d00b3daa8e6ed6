"""What ssv-serve refuses before anything is started, by its name."""

from __future__ import annotations

import argparse
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_trtllm
import pytest
from certificates import lock, self_signed
from cryptography.x509 import DNSName
from tokenizers import Tokenizer
from tokenizers.models import BPE

from ssv.bundle.manifest import EngineEntry, Manifest
from ssv.runtime.serving.config import ConfigError, ServerConfig
from ssv.support.errors import UserError
from ssv.triton_repo import checks, serve, supervisor
from ssv.triton_repo.checks import (
    Gpu,
    ServeError,
    check_audit_state,
    check_machine,
    check_tls,
    checked_chat_template,
    listen,
)

SPEC = {
    "num_layers": 2,
    "num_kv_heads": 2,
    "num_heads": 4,
    "head_dim": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_positions": 128,
}


def parsed(*options: str) -> argparse.Namespace:
    return serve._parser().parse_args(["--bundle", "bundle", *options])


DIGEST = "0" * 64


def manifest(*engines: EngineEntry) -> Manifest:
    made: Any = SimpleNamespace(
        target=SPEC,
        draft={"decoder": {**SPEC, "num_layers": 1}},
        heads=None,
        default_precision="int8",
        engines={f"{one.role}-{one.precision}-{i}": one for i, one in enumerate(engines)},
    )
    return made


def engine(role: str, precision: str = "int4", capability: str = "8.9", max_batch: int = 8) -> EngineEntry:
    return EngineEntry.model_validate(
        {
            "role": role,
            "precision": precision,
            "flavor": "tensorrt_rtx",
            "tensorrt": "1",
            "compute_capabilities": [capability],
            "file": "f",
            "compute_type": "float16",
            "max_batch": max_batch,
            "max_length": 2048,
            "max_pending": 10,
            "prefill_chunk": 64,
            "source": DIGEST,
            "build_seconds": 1.0,
            "peak_memory_bytes": 1,
        }
    )


def config(**given: Any) -> ServerConfig:
    return ServerConfig(**{"bundle": Path("b"), "prompt_cache_mb": 0, **given})


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def with_ports(taken: str = "", port: int = 0, host: str = "127.0.0.1") -> list[str]:
    kinds = ("http", "grpc", "metrics", "openai")
    found = dict(zip(kinds, free_ports(4), strict=True)) | ({taken: port} if taken else {})
    return ["--host", host, *(word for kind, number in found.items() for word in (f"--{kind}-port", str(number)))]


# Ports and host


def test_ports_that_are_free_are_taken_or_left() -> None:
    args = parsed(*with_ports())
    found = listen(args.host, False, args)
    try:
        assert {kind: each.getsockname() for kind, each in found.items()} == {
            "http": ("127.0.0.1", args.http_port),
            "metrics": ("127.0.0.1", args.metrics_port),
        }
        for port in (args.grpc_port, args.openai_port):
            socket.create_server(("127.0.0.1", port)).close()
    finally:
        for each in found.values():
            each.close()


@pytest.mark.parametrize("kind", ["http", "grpc", "metrics", "openai"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_that_is_taken(kind: str, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        args = parsed(*with_ports(kind, port, host))
        with pytest.raises(ServeError, match=rf"--{kind}-port {port} is taken on {host}: choose another"):
            listen(args.host, False, args)
        for free in {args.http_port, args.grpc_port, args.metrics_port, args.openai_port} - {port}:
            socket.create_server(("127.0.0.1", free)).close()  # nothing is held on to


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("no-such-host.invalid", "is not a name that is known here"),
        ("192.0.2.1", "is not an address of this machine"),
        ("1.2.3.4.5", "is not a name that is known here"),
        ("", "--host is empty"),
        ("http://127.0.0.1", "is not a name that is known here"),
    ],
)
def test_a_host_that_cannot_be(host: str, message: str) -> None:
    args = parsed(*with_ports(host=host))
    with pytest.raises(ServeError, match=message):
        listen(args.host, False, args)


def test_http_stays_here_with_tls() -> None:
    args = parsed(*with_ports(host="0.0.0.0"))
    found = listen(args.host, True, args)
    try:
        assert found["http"].getsockname()[0] == "127.0.0.1"
        assert found["metrics"].getsockname()[0] == "0.0.0.0"
    finally:
        for each in found.values():
            each.close()


# TLS


def certificate(folder: Path, name: str, san: bool = True) -> tuple[Path, Path]:
    return self_signed(folder, name, san=[DNSName("localhost")] if san else [])


def test_a_certificate_and_its_key(tmp_path: Path) -> None:
    check_tls(*certificate(tmp_path, "one"))
    check_tls(None, None)


ALL_SAID = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A file beside a bundle's tokenizer."""
    (tmp_path / "tokenizer").mkdir()
    Tokenizer(BPE()).save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return tmp_path / "chat.jinja"


def test_a_chat_template_is_its_text(template: Path) -> None:
    template.write_bytes(b"\xef\xbb\xbf" + ALL_SAID.encode())
    assert checked_chat_template(template, template.parent) == ALL_SAID, "a mark of the byte order is none of it"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"{% for message in messages %}", "line 1: Unexpected end of template"),
        (b"Hello\n\n{{ messages | upside_down }}", "line 3: No filter named 'upside_down'"),
        (b"{{ raise_exception('nobody speaks') }}", "fails on a small conversation .*nobody speaks"),
        (b"{{ messages[9].content + 'x' }}", "fails on a small conversation"),
        (b"{{ messages[0].content.encode() }}", "fails on a small conversation .*makes bytes"),
        (b"{% for i in range(10 ** 9) %}{% endfor %}", "fails on a small conversation .*Range too big"),
        (b"{{ messages.__class__.__mro__ }}", "fails on a small conversation .*unsafe"),
        (b"", "leaves out what is said by: user, assistant, user"),
        (b"{{ messages[-1].content }}", "leaves out what is said by: user, assistant: "),
        (b"caf\xe9", r"is not UTF-8 \(byte 0xe9 at 3\): save it as UTF-8"),
        (b"\xff\xfe{\x00", r"is not UTF-8 \(byte 0xff at 0\)"),
    ],
)
def test_a_chat_template_that_cannot_be(template: Path, source: bytes, says: str) -> None:
    template.write_bytes(source)
    with pytest.raises(ServeError, match=f"^--chat-template {template}.*{says}"):
        checked_chat_template(template, template.parent)


def test_a_chat_template_that_is_no_file(template: Path) -> None:
    for path, says in ((template, "No such file"), (template.parent, "Is a directory")):
        with pytest.raises(ServeError, match=rf"--chat-template {path} cannot be read \({says}"):
            checked_chat_template(path, template.parent)


def test_files_for_tls_that_cannot_be(tmp_path: Path) -> None:
    (one, key), (other, other_key) = certificate(tmp_path, "one"), certificate(tmp_path, "other")
    locked = tmp_path / "locked.key"
    lock(key, locked, "secret")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_bytes(b"\x00nonsense")
    for pair, message in (
        ((one, other_key), "give a certificate and its key"),
        ((other, key), "give a certificate and its key"),
        ((key, one), "give a certificate and its key"),
        ((nonsense, key), "give a certificate and its key"),
        ((one, nonsense), "give a certificate and its key"),
        ((one, locked), "give a certificate and its key"),
        ((one, tmp_path / "none.key"), "none.key is not a file"),
        ((tmp_path, key), "is not a file"),
        (certificate(tmp_path, "nameless", san=False), "no name in subjectAltName"),
    ):
        with pytest.raises(ServeError, match=message):
            check_tls(*pair)


def test_a_file_for_tls_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, key = certificate(tmp_path, "one")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(ServeError, match=r"one.pem cannot be read \(Permission denied\)"):
        check_tls(one, key)


# Device, engine, precision


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "gpu", lambda: None)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "gpu", lambda: Gpu("9.0", 80 << 30))
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: "2.13.0")
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: object())


def test_a_cpu_needs_no_gpu(no_gpu: None) -> None:
    check_machine(config(), manifest())


@pytest.mark.parametrize(
    ("given", "named"), [({"device": "cuda"}, "--device cuda"), ({"engine": "tensorrt"}, "--engine tensorrt")]
)
def test_a_machine_without_a_gpu(given: dict[str, str], named: str, no_gpu: None) -> None:
    both = manifest(engine("target"), engine("draft"))
    with pytest.raises(
        ServeError, match=f"{named}: this machine has no NVIDIA GPU .*: use --engine torch --device cpu"
    ):
        check_machine(config(**given), both)


def test_a_torch_without_cuda(h100: None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_machine(config(device="cuda"), manifest())
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    with pytest.raises(ServeError, match=r"torch 2.13.0\+cpu has no CUDA: use"):
        check_machine(config(device="cuda"), manifest())


@pytest.mark.parametrize(
    ("engines", "given", "message"),
    [
        ([], {}, "no engine of the target: build one"),
        ([("target", "int4", "9.0")], {}, "no engine of the draft: build one"),
        (
            [("target", "int4", "9.0"), ("draft", "int4", "9.0")],
            {"precision": "fp8"},
            "--precision fp8: .* in int4: choose",
        ),
        (
            [("target", "int4", "9.0"), ("draft", "int4", "8.9")],
            {},
            "draft are for compute capability 8.9, this GPU has 9.0",
        ),
        (
            [("target", "int4", "9.0"), ("draft", "int4", "9.0")],
            {"max_rows": 9},
            "--max-rows 9: engines of the target take 8",
        ),
    ],
)
def test_engines_that_are_not_there(engines: list[Any], given: dict[str, Any], message: str, h100: None) -> None:
    with pytest.raises(ServeError, match=message):
        check_machine(config(engine="tensorrt", **given), manifest(*(engine(*one) for one in engines)))


def test_engines_that_are_there(h100: None) -> None:
    check_machine(
        config(engine="tensorrt"), manifest(engine("target", capability="9.0"), engine("draft", capability="9.0"))
    )


# Memory


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = checks.memory_needed(config(max_rows=4, max_length=100), manifest())
    # Keys and values of three layers in fp32, and their weights in int8.
    assert needed >= 2 * 3 * 2 * 8 * 100 * 4 * 4
    monkeypatch.setattr(checks, "free_memory", lambda: needed)
    check_machine(config(max_rows=4, max_length=100), manifest())
    with pytest.raises(
        ServeError, match=r"5 rows of 100 tokens .* GiB: give at most --max-rows 4 or --max-length \d+, or"
    ):
        check_machine(config(max_rows=5, max_length=100), manifest())


def test_heads_count_though_they_are_made_later() -> None:
    """Three of one ResBlock and, unless they share one, an LM head each, in int8."""
    spec: dict[str, Any] = {"hidden_size": 64, "num_heads": 3, "num_layers": 1, "head_size": 100}
    without, with_heads = manifest(), manifest()
    base = checks.memory_needed(config(), without)
    for own, num_lm_heads in ((False, 1), (True, 3)):
        with_heads.heads = {**spec, "own_lm_heads": own}
        assert checks.memory_needed(config(), with_heads) - base == 64 * (3 * 64 + num_lm_heads * 100)


def test_lengths_are_at_most_what_the_model_has() -> None:
    long, longer = (checks.memory_needed(config(max_length=length), manifest()) for length in (128, 100_000))
    assert long == longer


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_CGROUP", tmp_path)
    everything = checks.free_memory()
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 50000\n")
    assert checks.free_memory() == 650000 < everything
    (tmp_path / "memory.max").write_text("max\n")
    assert checks.free_memory() > 650000


def test_the_gpu_does_not_hold_it(h100: None) -> None:
    with pytest.raises(ServeError, match=r"--gpu-memory-share 0\.9 of the GPU.s memory is 72\.0 GiB"):
        check_machine(config(device="cuda", max_rows=10**9), manifest())
    with pytest.raises(ServeError, match=r"--gpu-memory-share 0\.5 of the GPU.s memory is 40\.0 GiB") as caught:
        check_machine(config(device="cuda", max_rows=10**9, gpu_memory_share=0.5), manifest())
    (rows,) = re.findall(r"at most --max-rows (\d+),", str(caught.value))  # no length is short enough for so many
    check_machine(config(device="cuda", max_rows=int(rows), gpu_memory_share=0.5), manifest())
    with pytest.raises(ServeError, match="GiB"):
        check_machine(config(device="cuda", max_rows=int(rows) + 1, gpu_memory_share=0.5), manifest())


def test_a_share_of_gpu_memory_is_of_the_torch_engine_there() -> None:
    checks.check_options(parsed("--device", "cuda", "--gpu-memory-share", "0.5"))
    for options in ((), ("--device", "cuda", "--engine", "tensorrt")):
        with pytest.raises(ServeError, match="--gpu-memory-share is of --engine torch --device cuda"):
            checks.check_options(parsed(*options, "--gpu-memory-share", "0.5"))


def test_too_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.psutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(ServeError, match="/dev/shm has less than 16 MiB free"):
        check_machine(config(), manifest())


# As a command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-rows", "0"], "--max-rows 0 cannot be"),
        (["--audit-share", "2"], "--audit-share 2.0 cannot be"),
        (["--threads", "-1"], "--threads -1 cannot be"),
    ],
)
def test_settings_are_named_as_they_were_given(options: list[str], message: str) -> None:
    args = parsed(*options)
    args.responses_per_s = 0
    with pytest.raises(ServeError, match=message):
        serve._config(args, Path("/srv/ssv"))


def test_what_audits_find_is_kept_where_it_is_told_or_with_the_server(tmp_path: Path) -> None:
    for options, expected in (
        ((), "/srv/ssv/audits.json"),
        (("--audit-state", str(tmp_path / "state")), str(tmp_path / "state")),
    ):
        args = parsed(*options)
        args.responses_per_s = 0
        assert serve._config(args, Path("/srv/ssv")).audit_state == expected


def test_files_of_audits_that_cannot_be(tmp_path: Path) -> None:
    check_audit_state(None)
    check_audit_state(tmp_path / "state")
    for path in (tmp_path, tmp_path / "missing" / "state"):
        with pytest.raises(ServeError, match=f"--audit-state {path} cannot be written"):
            check_audit_state(path)
    (tmp_path / "other").write_text("{}")
    with pytest.raises(ConfigError, match="is no state of audits"):
        check_audit_state(tmp_path / "other")


def test_a_second_server_says_so_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> None:
        pytest.fail("something was started")

    monkeypatch.setattr(serve, "read_manifest", lambda bundle, verify: never() if verify else manifest())
    monkeypatch.setattr(serve, "log_to_stderr", lambda: None)
    monkeypatch.setattr(supervisor, "Supervisor", never)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main(["--bundle", str(tmp_path), *with_ports("metrics", port)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"error: --metrics-port {port} is taken on 127.0.0.1",
        "hint: choose another, or end what listens there",
    ]


TRTLLM = ("--engine", "tensorrt_llm")


def test_tensorrt_llm_is_looked_for_before_anything_is_started() -> None:
    with fake_trtllm.installed(None), pytest.raises(UserError, match="TensorRT-LLM is not installed") as caught:
        checks.check_options(parsed(*TRTLLM))
    assert "pip install 'tensorrt-llm" in str(caught.value.cure)
    with fake_trtllm.installed():
        checks.check_options(parsed(*TRTLLM, "--tensor-parallel", "2", "--precision", "bf16"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((*TRTLLM, "--prefill-chunk", "64"), "--prefill-chunk means nothing"),
        ((*TRTLLM, "--prompt-cache-mb", "64"), "--prompt-cache-mb means nothing"),
        ((*TRTLLM, "--audit-share", "0.1"), "--audit-share means nothing"),
        ((*TRTLLM, "--threads", "2"), "--threads means nothing"),
        ((*TRTLLM, "--precision", "int8"), "in bf16"),
        (("--tensor-parallel", "2"), "--tensor-parallel is of TensorRT-LLM"),
    ],
)
def test_options_that_an_engine_has_no_use_for(options: tuple[str, ...], says: str) -> None:
    with fake_trtllm.installed(), pytest.raises(ServeError, match=says):
        checks.check_options(parsed(*options))


@pytest.mark.parametrize(
    "origin", ["https://a.example/", "https://a.example/app", "a.example", "", "https://A.example", "https://"]
)
def test_origins_that_no_browser_sends(origin: str) -> None:
    fine = ("*", "null", "https://a.example", "http://localhost:3000", "chrome-extension://abc", "http://[::1]:5")
    checks.check_options(parsed("--openai-port", "9000", "--allowed-origins", *fine))
    with pytest.raises(ServeError, match="is no origin that a browser sends: give scheme and host"):
        checks.check_options(parsed("--openai-port", "9000", "--allowed-origins", "*", origin))


@pytest.mark.parametrize("options", [("--api-key-file", "keys"), ("--allowed-origins", "*")])
def test_options_of_an_api_that_is_not_served(options: tuple[str, ...]) -> None:
    with pytest.raises(ServeError, match=f"{options[0]} is of the OpenAI API, which is not served: give --openai-port"):
        checks.check_options(parsed(*options))
    checks.check_options(parsed(*options, "--openai-port", "9000"))


def test_gpus_share_the_memory_of_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    made = manifest()
    needed = checks.memory_needed(config(engine="tensorrt_llm"), made)
    monkeypatch.setattr(checks, "gpu", lambda: Gpu("9.0", needed // 2 + 1))
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: "2.0")
    check_machine(config(engine="tensorrt_llm", tensor_parallel=2), made)
    with pytest.raises(ServeError, match="the GPU's memory"):
        check_machine(config(engine="tensorrt_llm"), made)
