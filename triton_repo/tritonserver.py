"""tritonserver: its command line, its process, and the word that it is not ready any more."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from ssv.runtime.serving.log import log_event
from ssv.triton_repo.admin_key import VARIABLE
from ssv.triton_repo.guardian import VARIABLE as MARK_VARIABLE
from ssv.triton_repo.guardian import end, remove_shared_memory
from ssv.triton_repo.installation import Installation
from ssv.triton_repo.repository import DRAINING, MODELS, ROUTER
from ssv.triton_repo.unseen import start_bound

log = logging.getLogger("ssv.serve")

ADMIN_PROTOCOLS = "shared-memory,model-repository,logging,trace"
"""Of Triton, all but health, metadata, configs and statistics, which clients look at."""

_NO_GPU = re.compile(
    rb"^([EW]\d{4} .*(CUDA driver version is insufficient|CudaDriverHelper has not been initialized"
    rb"|no pinned memory pool|DCGM|NVML)|Error: Failed to initialize NVML)"
)
"""What a tritonserver that was built for GPUs says on a machine without one, where nothing is wrong with that."""

_DRAINS = re.compile(rb"E\d{4} .*(the server drains, and is to say that it is not ready|failed to load 'draining')")
"""What it says of the model that it cannot load (`Tritonserver.be_not_ready`)."""


class Tritonserver:
    """One process at a time, with those of its Python models.

    Attributes:
        http_port, metrics_port: of the latest, on this machine.
        shared_memory: what the names of its regions begin with; nobody else's do.
    """

    def __init__(self, args: argparse.Namespace, installation: Installation, models: Path, mark: str) -> None:
        """Sets a server up that has not been started.

        Args:
            args: of ssv-serve.
            models: the model repository.
            mark: of its processes (`ssv.triton_repo.guardian`).
        """
        self._args, self._installation, self._models, self._mark = args, installation, models, mark
        self._on_cpu = args.device == "cpu" and args.engine == "torch"
        self.shared_memory = f"ssv_{os.getpid()}_{secrets.token_hex(8)}_"
        # A key that nobody has shuts what nobody has asked for.
        self._admin = args.admin_key or f"ssv-admin={secrets.token_hex(16)}"
        self._process: subprocess.Popen[bytes] | None = None
        self.http_port = self.metrics_port = 0

    @property
    def pid(self) -> int:
        """The process, which has been started."""
        assert self._process is not None
        return self._process.pid

    def start(self, defaults: Mapping[str, str], environment: Mapping[str, str]) -> None:
        """Starts the process, on ports of its own.

        Args:
            defaults: variables to set unless they are set.
            environment: variables to set.
        """
        self.http_port, self.metrics_port = _free_ports(2)
        variables = dict(defaults) | os.environ | self._installation.environment | dict(environment)
        variables[MARK_VARIABLE] = self._mark
        self._process, is_hidden = start_bound(
            [str(self._installation.binary), *self._installation.arguments, *self.arguments()],
            self._admin,
            {name: value for name, value in variables.items() if name != VARIABLE},
            stderr=subprocess.PIPE,
        )
        if not is_hidden:
            log_event(log, "the admin key can be seen in ps", level=logging.WARNING, pid=self._process.pid)
        told = [_DRAINS, _NO_GPU] if self._on_cpu else [_DRAINS]
        threading.Thread(target=_copy, args=(self._process.stderr, told), name="ssv log", daemon=True).start()

    def arguments(self) -> list[str]:
        """The options of tritonserver's command line."""
        args = self._args
        models = [*MODELS, ROUTER] if args.ab is not None else MODELS
        given = [
            f"--model-repository={self._models}",
            # Explicit, for one model more at the end (`be_not_ready`); nobody else has the key.
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in models),
            "--strict-readiness=true",
            "--disable-auto-complete-config",  # the config files are complete
            "--exit-timeout-secs=5",
            # Requests that are kept for reuse keep the size of the largest they were.
            "--grpc-infer-allocation-pool-size=0",
            f"--backend-config=python,shm-region-prefix-name={self.shared_memory}",
            "--http-address=127.0.0.1",  # `ssv.triton_repo.front` is before it
            f"--http-port={self.http_port}",
            f"--grpc-address={args.host}",
            f"--grpc-port={args.grpc_port}",
            "--metrics-address=127.0.0.1",
            f"--metrics-port={self.metrics_port}",
            f"--http-restricted-api={ADMIN_PROTOCOLS}:{self._admin}",
            f"--grpc-restricted-protocol={ADMIN_PROTOCOLS}:{self._admin}",
            "--log-info=false",
        ]
        if args.tls_cert:
            given += ["--grpc-use-ssl=true", f"--grpc-server-cert={args.tls_cert}", f"--grpc-server-key={args.tls_key}"]
        if self._on_cpu:
            given += ["--allow-gpu-metrics=false"]
        return given

    def how_it_ended(self) -> str | None:
        """None while it has not."""
        if self._process is None or (status := self._process.poll()) is None:
            return None
        return f"tritonserver ended with status {status}"

    def is_ready(self) -> bool:
        """Whether the server says that it and all its models are ready; it has five seconds to say so."""
        return self._ask("/v2/health/ready", timeout=5.0)

    def be_not_ready(self) -> None:
        """Has it say that it is not ready, over HTTP and gRPC, while it goes on answering: a model is loaded that
        cannot be.
        """
        # It is not ready from the moment on when the model begins to load.
        threading.Thread(target=self._load, args=(DRAINING,), name="ssv drain", daemon=True).start()

    def _load(self, model: str) -> None:
        self._ask(f"/v2/repository/models/{model}/load", b"{}", timeout=5.0)

    def _ask(self, path: str, body: bytes | None = None, *, timeout: float) -> bool:
        name, _, value = self._admin.partition("=")
        request = Request(f"http://127.0.0.1:{self.http_port}{path}", body, {name: value})
        try:
            with urlopen(request, timeout=timeout) as response:  # noqa: S310
                return bool(response.status == 200)
        except (URLError, OSError, HTTPException):
            return False

    def end(self, seconds: float) -> None:
        """Asks it to end, which takes what clients leave it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self) -> None:
        """Ends it and whatever it has started, also what has lost its parent, and removes their shared memory."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        end(self._mark)
        self._process = None
        remove_shared_memory(self.shared_memory)


def _copy(lines: Iterable[bytes], without: Sequence[re.Pattern[bytes]]) -> None:
    """Passes on what tritonserver and its models write, but for complaints about what is as it should be."""
    for line in lines:
        if not any(pattern.match(line) for pattern in without):
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
