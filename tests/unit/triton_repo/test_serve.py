"""What ssv-serve is told and tells tritonserver; the running server is in tests/triton."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssv.ab.routing import Routing
from ssv.bundle.policy import Policy
from ssv.triton_repo import checks, installation, serve, supervisor
from ssv.triton_repo.installation import Installation, InstallationError
from ssv.triton_repo.repository import MODELS, ROUTER
from ssv.triton_repo.tritonserver import Tritonserver


def parsed(*options: str) -> argparse.Namespace:
    return serve._parser().parse_args(["--bundle", "bundle", *options])


def arguments(*options: str) -> dict[str, str]:
    """What tritonserver is started with."""
    server = Tritonserver(parsed(*options), Installation(Path("tritonserver")), Path("models"), "mark")
    return dict(argument.split("=", 1) for argument in server.arguments() if "=" in argument)


def test_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    given = arguments()
    assert {given[f"--{kind}-address"] for kind in ("http", "grpc", "metrics")} == {"127.0.0.1"}
    given = arguments("--host", "10.0.0.1")
    assert given["--grpc-address"] == "10.0.0.1"
    # The front is before these.
    assert given["--http-address"] == given["--metrics-address"] == "127.0.0.1"


def test_grpc_speaks_tls() -> None:
    given = arguments("--host", "10.0.0.1", "--tls-cert", "c.pem", "--tls-key", "k.pem")
    assert given["--grpc-use-ssl"] == "true"
    assert (given["--grpc-server-cert"], given["--grpc-server-key"]) == ("c.pem", "k.pem")


def loaded(*options: str) -> list[str]:
    server = Tritonserver(parsed(*options), Installation(Path("tritonserver")), Path("models"), "mark")
    return [argument.partition("=")[2] for argument in server.arguments() if argument.startswith("--load-model=")]


def test_all_models_are_loaded_but_the_one_that_ends_readiness() -> None:
    assert loaded() == list(MODELS)
    assert loaded("--ab", "arms.yaml") == [*MODELS, ROUTER]


def test_a_server_without_a_gpu_does_not_look_for_one() -> None:
    assert arguments()["--allow-gpu-metrics"] == "false"
    assert "--allow-gpu-metrics" not in arguments("--device", "cuda")
    assert "--allow-gpu-metrics" not in arguments("--engine", "tensorrt")


def test_two_servers_have_not_the_same_shared_memory() -> None:
    one, other = arguments()["--backend-config"], arguments()["--backend-config"]
    assert one != other
    assert one.startswith("python,shm-region-prefix-name=ssv_")


def test_administration_is_shut() -> None:
    given = arguments()
    shut, key = given["--grpc-restricted-protocol"].split(":")
    assert set(shut.split(",")) == {"shared-memory", "model-repository", "logging", "trace"}
    assert given["--http-restricted-api"] == f"{shut}:{key}"
    name, _, value = key.partition("=")
    assert name == "ssv-admin" and len(value) == 32
    assert arguments()["--http-restricted-api"] != given["--http-restricted-api"], "anybody could know the key"


def test_a_key_that_is_none_ends_before_anything_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--bundle", "/nowhere", "--admin-key", "s3cret"]) == 2
    error = capsys.readouterr().err
    assert "--admin-key is no key" in error and "give NAME=VALUE" in error
    assert "s3cret" not in error


def test_an_admin_key_of_ones_own() -> None:
    assert arguments("--admin-key", "x-key=secret")["--http-restricted-api"].endswith(":x-key=secret")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-cert", "c.pem"], "belong together"),
        (["--http-port", "8001"], "must be different"),
        (["--openai-port", "70000"], "between 1 and 65535"),
        (["--ready-timeout", "-1"], "--ready-timeout -1.0 must be 0 or more"),
        (["--drain-timeout", "nan"], "--drain-timeout nan must be 0 or more"),
        (["--restarts", "-1"], "--restarts -1 must be 0 or more"),
        (["--precision", "fp8"], "--precision fp8 is none of the torch engine's"),
    ],
)
def test_options_that_cannot_be(options: list[str], message: str) -> None:
    with pytest.raises(serve.ServeError, match=message):
        checks.check_options(parsed(*options))


TIERS = {"turbo": Policy(accept_below=0.4, verify_above=0.8, risk_budget=1.0, max_pending=6)}
ARMS = """
salt: s
log: {log}
arms:
  now: {{share: 0.5}}
  new: {{share: 0.5, tier: turbo}}
"""


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What has been started, which nothing may be; over a bundle that is fine."""
    started: list[object] = []
    monkeypatch.setattr(
        serve, "read_manifest", lambda bundle, verify: SimpleNamespace(policies=TIERS, files={}, engines={})
    )
    monkeypatch.setattr(serve, "bundled", started.append)
    monkeypatch.setattr(supervisor, "Supervisor", lambda *arguments: started.append(arguments))
    # The handlers are this process's.
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    monkeypatch.setattr(serve, "log_to_stderr", lambda: None)
    return started


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "arms.yaml cannot be read (No such file or directory)"),
        ("salt: [", "arms.yaml is not YAML (while parsing a flow node"),
        ("", "arms.yaml: the file: Input should be"),
        (ARMS.replace("0.5}}", "0.6}}"), "arms.yaml: the file: the shares add up to 1.1: they must be 1 together"),
        (ARMS.replace("tier: turbo", "teir: turbo"), "arms.yaml: arms.new.teir: Extra inputs are not permitted"),
        (ARMS.replace("{log}", "{log}/none/log"), "arms.yaml: the folder of log "),
        (ARMS, "is a folder"),
        (ARMS.replace("{log}", "{log}/log").replace("tier: turbo", "tier: fast"), "'fast'"),
    ],
)
def test_bad_files_of_arms_end_before_anything_is_started(
    text: str | None, message: str, never: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "arms.yaml"
    if text is not None:
        path.write_text(text.format(log=tmp_path))
    assert serve.main(["--bundle", str(tmp_path), "--ab", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    assert not never


def test_the_router_is_told_where_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arms.yaml").write_text(ARMS.format(log="log.jsonl"))
    given = serve._router(parsed("--ab", "arms.yaml", "--grpc-port", "9001"), TIERS)
    routing = Routing.model_validate_json(given.pop("routing"))
    assert routing.log == tmp_path / "log.jsonl", "the model runs in another folder"
    assert list(routing.arms) == ["now", "new"]
    assert given == {"own_url": "grpc://127.0.0.1:9001", "certificate": ""}
    secure = ("--tls-cert", "c.pem", "--tls-key", "k.pem", "--host", "0.0.0.0")
    given = serve._router(parsed("--ab", "arms.yaml", *secure), TIERS)
    assert given["own_url"] == "grpcs://127.0.0.1:8001", "the address of all is nobody's"
    assert given["certificate"] == str(tmp_path / "c.pem")


def test_an_arm_without_a_tier_of_the_bundle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(f"salt: s\nlog: {tmp_path}/log\narms: {{now: {{share: 0.5}}, new: {{share: 0.5, tier: fast}}}}")
    with pytest.raises(serve.ServeError, match=r"arms\.yaml: arms\.new\.tier: .*'?fast'?.*; known: "):
        serve._router(parsed("--ab", str(path)), TIERS)


def test_a_bundle_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert serve.main(["--bundle", str(tmp_path / "none")]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(InstallationError, match="no program that can be run"):
        installation.given(Path("/no/tritonserver"))


def test_the_bundled_server(tmp_path: Path) -> None:
    found = installation.bundled(tmp_path)
    assert found.binary.is_file()
    assert (tmp_path / "backends" / "python" / "triton_python_backend_stub").resolve().is_file()
    assert (tmp_path / "backends" / "python" / "libtriton_python.so").resolve().is_file()
    assert found.environment["PATH"].startswith(str(Path(sys.executable).parent))


def test_no_server_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InstallationError, match="pip install"):
        installation.bundled(tmp_path)
