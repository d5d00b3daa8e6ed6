"""What ssv-serve is told and tells tritonserver; the running server is in tests/triton."""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

import pytest

from ssv.triton_repo import installation, serve
from ssv.triton_repo.installation import Installation, InstallationError


def parsed(*options: str) -> argparse.Namespace:
    return serve._parser().parse_args(["--bundle", "bundle", *options])


def arguments(*options: str) -> dict[str, str]:
    """What tritonserver is started with."""
    supervisor = serve._Supervisor(
        parsed(*options), Installation(Path("tritonserver")), Path("models"), threading.Event()
    )
    return dict(argument.split("=", 1) for argument in supervisor._arguments() if "=" in argument)


def test_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    given = arguments()
    assert {given[f"--{kind}-address"] for kind in ("http", "grpc", "metrics")} == {"127.0.0.1"}
    given = arguments("--host", "10.0.0.1")
    assert {given[f"--{kind}-address"] for kind in ("http", "grpc", "metrics")} == {"10.0.0.1"}


def test_with_tls_what_cannot_be_encrypted_stays_on_this_machine() -> None:
    given = arguments("--host", "10.0.0.1", "--tls-cert", "c.pem", "--tls-key", "k.pem")
    assert given["--http-address"] == "127.0.0.1"
    assert given["--grpc-use-ssl"] == "true"
    assert (given["--grpc-server-cert"], given["--grpc-server-key"]) == ("c.pem", "k.pem")


def test_model_control_is_off_and_administration_shut() -> None:
    given = arguments()
    assert given["--model-control-mode"] == "none"
    shut, key = given["--grpc-restricted-protocol"].split(":")
    assert set(shut.split(",")) == {"shared-memory", "model-repository", "logging", "trace"}
    assert given["--http-restricted-api"] == f"{shut}:{key}"
    name, _, value = key.partition("=")
    assert name == "ssv-admin" and len(value) == 32
    assert arguments()["--http-restricted-api"] != given["--http-restricted-api"], "anybody could know the key"


def test_an_admin_key_of_ones_own() -> None:
    assert arguments("--admin-key", "x-key=secret")["--http-restricted-api"].endswith(":x-key=secret")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-cert", "c.pem"], "belong together"),
        (["--tls-cert", "no.pem", "--tls-key", "no.pem"], "not a file"),
        (["--admin-key", "secret"], "NAME=VALUE"),
        (["--http-port", "8001"], "must be different"),
        (["--openai-port", "70000"], "between 1 and 65535"),
    ],
)
def test_options_that_cannot_be(options: list[str], message: str) -> None:
    with pytest.raises(serve.ServeError, match=message):
        serve._check(parsed(*options))


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
