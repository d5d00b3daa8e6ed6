"""ssv-serve: a Triton Inference Server over a bundle, watched over while it runs.

The server is started with a model repository made for the bundle. Should one of its Python models die, Triton goes on saying that it is
ready, and requests hang or fail: the whole server is stopped then, which ends its clients' streams with an error, and started again, a few
times before ssv-serve gives up with exit status 70. SIGTERM and SIGINT drain: no more requests are taken, those that run are finished.

The composition root of the server: it may import everything of ssv.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from ssv.ab.routing import read_routing
from ssv.builder.console import add_device, add_engine, add_precision, add_version, run_command
from ssv.builder.manifest import read_manifest
from ssv.builder.tiers import Policy
from ssv.runtime.control import ControlSender
from ssv.runtime.memory import GIVE_BACK
from ssv.runtime.server_config import ServerConfig
from ssv.runtime.server_log import log_event, log_to_stderr
from ssv.runtime.strategies import policy_for
from ssv.triton_repo.admin_key import VARIABLE, admin_key, hide
from ssv.triton_repo.installation import Installation, bundled, given
from ssv.triton_repo.repository import disclosure, write_repository

log = logging.getLogger("ssv.serve")

EXIT_DIED = 70

ADMIN_PROTOCOLS = "shared-memory,model-repository,logging,trace"
"""Of Triton, all but health, metadata, configs and statistics, which clients look at."""

POLL_SECONDS = 0.25
RESTART_WINDOW_SECONDS = 600.0


class ServeError(RuntimeError):
    """The server cannot be run; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssv-serve", description="Serve a bundle from a Triton Inference Server.", allow_abbrev=False
    )
    add_version(parser)
    parser.add_argument("--bundle", type=Path, required=True)
    add_engine(parser)
    add_precision(parser)
    add_device(parser)

    def setting(name: str, kind: type, help: str) -> None:
        """An option of the name and the default that the models' setting has."""
        default = ServerConfig.model_fields[name].default
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=default, help=f"{help} (default: {default})")

    setting("threads", int, "of a CPU engine; 0 for one a core")
    setting("max_rows", int, "requests decoded side by side")
    setting("max_waiting", int, "requests that wait for a row; more are refused at once")
    setting("max_length", int, "tokens of prompt and output together")
    setting("max_tokens", int, "of an output, at most")
    setting("max_prompt_bytes", int, "of a prompt's text, at most")
    setting("prefill_chunk", int, "tokens of a prompt between two rounds; 0 for what fits the device")
    setting("prompt_cache_mb", int, "for beginnings of prompts")
    setting("stream_interval_ms", int, "between two responses of a stream, at least")
    parser.add_argument(
        "--responses-per-s",
        type=int,
        help="of all streams together, at most; 0 for no bound (default: 40 on a CPU, which the engines need, and 0 on a GPU)",
    )
    setting("audit_share", float, "share of lossy requests that the target judges afterwards")
    parser.add_argument("--host", default="127.0.0.1", help="address of all ports (default: this machine only)")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--openai-port", type=int, help="serves the OpenAI API as well")
    parser.add_argument(
        "--ab", type=Path, metavar="FILE.yaml", help="arms that the model `ab_router` splits its requests between"
    )
    parser.add_argument(
        "--tls-cert", type=Path, help="PEM; gRPC and the OpenAI API speak TLS, HTTP stays on this machine"
    )
    parser.add_argument("--tls-key", type=Path, help="PEM")
    parser.add_argument(
        "--admin-key",
        metavar="NAME=VALUE",
        help="header that the administrative protocols ask for, also taken from SSV_ADMIN_KEY; without it they are shut to all",
    )
    parser.add_argument("--admin-key-file", type=Path, metavar="FILE", help="has NAME=VALUE; other users do not see it")
    parser.add_argument(
        "--tritonserver", type=Path, help="another server than nvidia-pytriton's, such as the container's"
    )
    parser.add_argument("--ready-timeout", type=float, default=300.0, help="seconds to start (default: %(default)s)")
    parser.add_argument(
        "--drain-timeout", type=float, default=30.0, help="seconds to finish requests (default: %(default)s)"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        help="of a server that died, in ten minutes; then exit status 70 (default: %(default)s)",
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    log_to_stderr()
    key = admin_key(args.admin_key, args.admin_key_file)
    if args.admin_key is not None:
        _hide(os.getpid(), args.admin_key)
    args.admin_key = key
    _check(args)
    if args.responses_per_s is None:
        on_cpu = args.device == "cpu" and args.engine == "torch"
        args.responses_per_s = ServerConfig.model_fields["responses_per_s"].default if on_cpu else 0
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    config = ServerConfig(
        bundle=args.bundle.resolve(),
        precision=args.precision or "",
        **{name: getattr(args, name) for name in ServerConfig.model_fields if name not in ("bundle", "precision")},
    )
    manifest = read_manifest(args.bundle, verify=True)  # before anything is started
    router = _router(args, manifest.policies) if args.ab is not None else None
    with tempfile.TemporaryDirectory(prefix="ssv-serve-") as folder:
        work = Path(folder)
        installation = given(args.tritonserver) if args.tritonserver else bundled(work)
        write_repository(config, work / "models", disclosure(args.bundle, manifest), router)
        return _Supervisor(args, installation, work / "models", stopping).run()


def _check(args: argparse.Namespace) -> None:
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ServeError("--tls-cert and --tls-key belong together: give both")
    for path in (args.tls_cert, args.tls_key):
        if path is not None and not path.is_file():
            raise ServeError(f"{path} is not a file: give the path of a PEM file")
    ports = [args.http_port, args.grpc_port, args.metrics_port, args.openai_port]
    used = [port for port in ports if port is not None]
    if len(set(used)) < len(used) or not all(0 < port < 65536 for port in used):
        raise ServeError(f"ports {used} must be different, and between 1 and 65535: choose others")


def _hide(pid: int, key: str) -> None:
    try:
        hide(pid, key)
    except OSError as error:
        log_event(log, "the admin key can be seen in ps", level=logging.WARNING, pid=pid, error=error)


def _router(args: argparse.Namespace, tiers: Mapping[str, Policy]) -> dict[str, str]:
    """Parameters of `ab_router`.

    Args:
        tiers: of the bundle.

    Raises:
        ServeError: its file or its log cannot be used.
        RequestError: an arm of this server has a tier that it has not.
    """
    routing = read_routing(args.ab)
    for arm in routing.arms.values():
        if arm.url is None and arm.tier is not None:
            policy_for(arm.tier, tiers)
    log_path = routing.log.absolute()
    if log_path.is_dir():
        raise ServeError(f"{args.ab}: log {log_path} is a folder: choose a file")
    if not log_path.parent.is_dir():
        raise ServeError(f"{args.ab}: the folder of log {log_path} does not exist: choose one that does")
    return {
        "routing": routing.model_copy(update={"log": log_path}).model_dump_json(),
        "own_url": f"grpc{'s' if args.tls_cert else ''}://{_reachable(args.host)}:{args.grpc_port}",
        "certificate": str(args.tls_cert.absolute()) if args.tls_cert else "",
    }


class _Supervisor:
    """Starts the server, watches it, starts it again, stops it."""

    def __init__(
        self, args: argparse.Namespace, installation: Installation, models: Path, stopping: threading.Event
    ) -> None:
        self._args, self._installation, self._models, self._stopping = args, installation, models, stopping
        self._http_host = "127.0.0.1" if args.tls_cert else args.host
        self._server: subprocess.Popen[bytes] | None = None
        self._children: list[psutil.Process] = []
        self._openai: subprocess.Popen[bytes] | None = None
        # A key that nobody has shuts what nobody has asked for.
        self._admin_key = args.admin_key or f"ssv-admin={os.urandom(16).hex()}"
        self._was_ready = False

    def run(self) -> int:
        deaths: list[float] = []
        try:
            while True:
                why = self._serve()
                if why is None:
                    return 0
                if not self._was_ready:  # it would die of the same again
                    print(f"error: {why}", file=sys.stderr)
                    return EXIT_DIED
                now = time.monotonic()
                deaths = [at for at in deaths if now - at < RESTART_WINDOW_SECONDS] + [now]
                log_event(log, "server died", level=logging.ERROR, why=why, deaths=len(deaths))
                self._kill()
                if len(deaths) > self._args.restarts:
                    print(f"error: {why}; it has died {len(deaths)} times, which is too often", file=sys.stderr)
                    return EXIT_DIED
        finally:
            self._stop_openai()
            self._kill()

    def _serve(self) -> str | None:
        """Runs the server until it is told to stop, which gives None, or dies, which gives how."""
        self._server = subprocess.Popen(  # noqa: S603
            [str(self._installation.binary), *self._installation.arguments, *self._arguments()],
            env={n: v for n, v in (GIVE_BACK | os.environ | self._installation.environment).items() if n != VARIABLE},
            start_new_session=True,  # a terminal's Ctrl-C is for us
        )
        if (why := self._wait_ready()) is not None or self._stopping.is_set():
            return None if self._stopping.is_set() else why
        self._was_ready = True
        self._children = psutil.Process(self._server.pid).children(recursive=True)
        if self._args.openai_port and self._openai is None and (why := self._start_openai()) is not None:
            return why
        self._announce()
        while not self._stopping.wait(POLL_SECONDS):
            if (status := self._server.poll()) is not None:
                return f"tritonserver ended with status {status}"
            for child in self._children:
                if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
                    return f"the process of a Python model ended (pid {child.pid})"
            if self._openai is not None and (status := self._openai.poll()) is not None:
                self._openai = None
                return f"the OpenAI API ended with status {status}"
        self._drain()
        return None

    def _arguments(self) -> list[str]:
        args = self._args
        given = [
            f"--model-repository={self._models}",
            "--model-control-mode=none",
            "--strict-readiness=true",
            "--disable-auto-complete-config",  # the config files are complete
            "--exit-timeout-secs=5",
            "--grpc-infer-allocation-pool-size=0",  # requests that are kept for reuse keep the size of the largest they were
            f"--http-address={self._http_host}",
            f"--http-port={args.http_port}",
            f"--grpc-address={args.host}",
            f"--grpc-port={args.grpc_port}",
            f"--metrics-address={args.host}",
            f"--metrics-port={args.metrics_port}",
            f"--http-restricted-api={ADMIN_PROTOCOLS}:{self._admin_key}",
            f"--grpc-restricted-protocol={ADMIN_PROTOCOLS}:{self._admin_key}",
            "--log-info=false",
        ]
        if args.tls_cert:
            given += ["--grpc-use-ssl=true", f"--grpc-server-cert={args.tls_cert}", f"--grpc-server-key={args.tls_key}"]
        return given

    def _wait_ready(self) -> str | None:
        assert self._server is not None
        deadline = time.monotonic() + self._args.ready_timeout
        is_hidden = False
        while not self._stopping.is_set():
            if not is_hidden and _has_children(self._server.pid):  # its models start when it has read its arguments
                _hide(self._server.pid, self._admin_key)
                is_hidden = True
            if (status := self._server.poll()) is not None:
                return f"tritonserver ended with status {status} before it was ready"
            if self._get(self._args.http_port, "/v2/health/ready", self._http_host) is not None:
                return None
            if time.monotonic() > deadline:
                return f"tritonserver was not ready after {self._args.ready_timeout:g} s"
            time.sleep(POLL_SECONDS)
        return None

    def _announce(self) -> None:
        args, secure = self._args, bool(self._args.tls_cert)
        endpoints = {
            "grpc": f"grpc{'s' if secure else ''}://{args.host}:{args.grpc_port}",
            "http": f"http://{self._http_host}:{args.http_port}",
            "metrics": f"http://{args.host}:{args.metrics_port}/metrics",
        }
        if args.openai_port:
            endpoints["openai"] = f"http{'s' if secure else ''}://{args.host}:{args.openai_port}/v1"
        for kind, url in endpoints.items():
            print(f"{kind:8}{url}", flush=True)
        log_event(log, "serving", pid=os.getpid(), endpoints=endpoints)

    def _start_openai(self) -> str | None:
        """Starts the API and waits until it answers; how it failed, if it did."""
        args = self._args
        secure = ["--tls-cert", str(args.tls_cert), "--tls-key", str(args.tls_key)] if args.tls_cert else []
        url = f"grpc{'s' if secure else ''}://{_reachable(args.host)}:{args.grpc_port}"
        command = [sys.executable, "-m", "ssv.client.openai_api", "--url", url, "--host", args.host]
        command += ["--port", str(args.openai_port), "--bundle", str(args.bundle), *secure]
        self._openai = subprocess.Popen(command, start_new_session=True)  # noqa: S603
        deadline = time.monotonic() + self._args.ready_timeout
        while not self._stopping.is_set():
            if (status := self._openai.poll()) is not None:
                self._openai = None
                return f"the OpenAI API ended with status {status} before it was ready"
            try:
                with socket.create_connection((_reachable(args.host), args.openai_port), timeout=1.0):
                    return None
            except OSError:
                if time.monotonic() > deadline:
                    return f"the OpenAI API was not ready after {self._args.ready_timeout:g} s"
                time.sleep(POLL_SECONDS)
        return None

    def _drain(self) -> None:
        """Lets what runs come to its end, then stops the server."""
        assert self._server is not None
        log_event(log, "draining", seconds=self._args.drain_timeout)
        deadline = time.monotonic() + self._args.drain_timeout
        if ControlSender(self._server.pid).drain():
            while time.monotonic() < deadline and self._server.poll() is None and self._num_requests():
                time.sleep(POLL_SECONDS)
            time.sleep(POLL_SECONDS)  # the last pieces are on their way
        self._stop_openai()
        self._server.send_signal(signal.SIGTERM)
        try:
            self._server.wait(10.0)
        except subprocess.TimeoutExpired:
            log_event(log, "tritonserver does not end by itself", level=logging.WARNING)
        log_event(log, "stopped")

    def _num_requests(self) -> float:
        text = self._get(self._args.metrics_port, "/metrics", self._args.host) or ""
        names = ("ssv_requests_decoding", "ssv_requests_joining", "ssv_requests_waiting")
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(names))

    def _get(self, port: int, path: str, host: str) -> str | None:
        try:
            with urlopen(f"http://{_reachable(host)}:{port}{path}", timeout=5.0) as response:
                return response.read().decode()
        except (URLError, OSError):
            return None

    def _stop_openai(self) -> None:
        if self._openai is not None and self._openai.poll() is None:
            self._openai.terminate()
            try:
                self._openai.wait(5.0)
            except subprocess.TimeoutExpired:
                self._openai.kill()
        self._openai = None

    def _kill(self) -> None:
        """Ends the server and whatever it has started, and removes the shared memory that they leave."""
        if self._server is None:
            return
        try:
            left = psutil.Process(self._server.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            left = []
        for process in {*self._children, *left}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._server.poll() is None:
            self._server.kill()
        self._server.wait()
        self._server, self._children = None, []
        _remove_shared_memory()


def _has_children(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).children())
    except psutil.NoSuchProcess:
        return False


def _reachable(host: str) -> str:
    """Where this machine reaches a server that listens at `host`."""
    return "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104


def _remove_shared_memory() -> None:
    """Regions of Python models whose processes have gone: nobody else has them open."""
    in_use = {file.path for process in psutil.process_iter() for file in _maps(process)}
    for path in Path("/dev/shm").glob("triton_python_backend_shm_region_*"):  # noqa: S108
        if str(path) not in in_use:
            path.unlink(missing_ok=True)


def _maps(process: psutil.Process) -> list[Any]:
    try:
        return process.memory_maps() if process.uids().real == os.getuid() else []
    except psutil.Error:
        return []


if __name__ == "__main__":
    sys.exit(main())
