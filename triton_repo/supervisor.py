"""Starts tritonserver and the OpenAI API, watches over them, starts them again, and stops them.

Should one of tritonserver's Python models die, it goes on saying that it is ready, and requests hang or fail: the whole
server is stopped then, which ends its clients' streams with an error, and started again, a few times. The OpenAI API is
started again by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from ssv.runtime.memory import GIVE_BACK
from ssv.runtime.methods import METHODS
from ssv.runtime.serving.control import ControlSender
from ssv.runtime.serving.log import log_event
from ssv.runtime.serving.metrics import BOARDS_VARIABLE, Metrics, Reader
from ssv.support.errors import UserError
from ssv.support.waiting import waiting
from ssv.triton_repo.bound import bound
from ssv.triton_repo.front import Front
from ssv.triton_repo.guardian import VARIABLE, Guardian
from ssv.triton_repo.installation import Installation
from ssv.triton_repo.tritonserver import Tritonserver

log = logging.getLogger("ssv.serve")

EXIT_DIED = 70

POLL_SECONDS = 0.1
RESTART_WINDOW_SECONDS = 600.0
END_SECONDS = 0.5
"""For tritonserver, once nothing runs any more: it keeps nothing."""
OPENAI_END_SECONDS = (1.0, 5.0)
"""For the OpenAI API, at least and at most: what it answers may still be on its way to a client."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server's own files are.

    Attributes:
        folder: of this server and no other, which marks its processes.
    """

    folder: Path

    @property
    def models(self) -> Path:
        """The model repository."""
        return self.folder / "models"

    @property
    def boards(self) -> Path:
        """Folder of what the server's processes count."""
        return self.folder / "metrics"

    @property
    def chat_template(self) -> Path:
        """Where the one of --chat-template is, as it was checked."""
        return self.folder / "chat_template.jinja"

    def mark(self, part: str) -> str:
        """What marks the processes of a part of the server."""
        return f"{self.folder}/{part}"


class Deaths:
    """How often something has died of late."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._times: list[float] = []

    def __len__(self) -> int:
        return len(self._times)

    def another(self) -> bool:
        """Counts one more; whether that is too many."""
        now = time.monotonic()
        self._times = [at for at in self._times if now - at < RESTART_WINDOW_SECONDS] + [now]
        return len(self._times) > self._most


class GivenUp(UserError):
    """What died is not started again; the message says why."""


class Supervisor:
    """The processes of one server."""

    def __init__(
        self,
        args: argparse.Namespace,
        installation: Installation,
        place: Place,
        sockets: dict[str, socket.socket],
        stopping: threading.Event,
    ) -> None:
        """Sets the processes up; `run` starts them.

        Args:
            args: of ssv-serve.
            sockets: that listen for HTTP and metrics.
            stopping: set when the server is to end.
        """
        self._args, self._place, self._stopping = args, place, stopping
        self._counted, self._reader = Metrics(place.boards, "serve"), Reader(place.boards)
        self._front = Front(
            sockets["http"], sockets["metrics"], self._counted, self._reader, self._reset_tier, args.admin_key
        )
        self._triton = Tritonserver(args, installation, place.models, place.mark("tritonserver"))
        self._guardian = Guardian(place.folder, self._triton.shared_memory)
        self._children: list[psutil.Process] = []
        self._openai: subprocess.Popen[bytes] | None = None
        self._openai_deaths = Deaths(args.restarts)
        self._was_ready = False

    def run(self) -> int:
        """Serves until it is told to stop; the exit status."""
        deaths = Deaths(self._args.restarts)
        try:
            while True:
                why = self._serve()
                if why is None:
                    return 0
                if not self._was_ready:  # it would die of the same again
                    raise GivenUp(why)
                self._front.state = "starting"
                too_often = deaths.another()
                log_event(log, "server died", level=logging.ERROR, why=why, deaths=len(deaths))
                self._kill()
                self._counted.restarted("tritonserver")
                if too_often:
                    raise GivenUp(f"{why}; it has died {len(deaths)} times, which is too often")
        except GivenUp as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_DIED
        finally:
            self._kill_openai()
            self._kill()
            self._front.close()
            self._guardian.close()

    def _serve(self) -> str | None:
        """Runs the server until it is told to stop, which gives None, or dies, which gives how."""
        self._triton.start(GIVE_BACK, {BOARDS_VARIABLE: str(self._place.boards)})
        self._front.lead_to(self._triton.http_port, self._triton.metrics_port)
        with waiting("starting tritonserver and its models"):
            why = self._wait(self._triton.is_ready, self._triton.how_it_ended, "tritonserver")
        if why is not None:
            return why
        if self._stopping.is_set():
            return None
        self._was_ready = True
        self._children = psutil.Process(self._triton.pid).children(recursive=True)
        if self._args.openai_port and self._openai is None and (why := self._open_openai()) is not None:
            return why
        self._front.state = "serving"
        self._announce()
        while not self._stopping.wait(POLL_SECONDS):
            if (why := self._triton.how_it_ended()) is not None:
                return why
            for child in self._children:
                if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
                    return f"the process of a Python model ended (pid {child.pid})"
            self._look_after_openai()
            if self._guardian.look_after():
                log_event(log, "the guardian died", level=logging.WARNING)
        self._drain()
        return None

    def _wait(self, is_ready: Callable[[], bool], how_it_ended: Callable[[], str | None], name: str) -> str | None:
        """Until something is ready or the server is to stop; what went wrong, if it did."""
        deadline = time.monotonic() + self._args.ready_timeout
        while not self._stopping.is_set():
            if (why := how_it_ended()) is not None:
                return f"{why} before it was ready"
            if is_ready():
                return None
            if time.monotonic() > deadline:
                return f"{name} was not ready after {self._args.ready_timeout:g} s"
            self._stopping.wait(POLL_SECONDS)
        return None

    def _announce(self) -> None:
        args, secure = self._args, bool(self._args.tls_cert)
        host = in_url(args.host)
        endpoints = {
            "grpc": f"grpc{'s' if secure else ''}://{host}:{args.grpc_port}",
            "http": f"http://{'127.0.0.1' if secure else host}:{args.http_port}",
            "metrics": f"http://{host}:{args.metrics_port}/metrics",
        }
        if args.openai_port:
            door = f"http{'s' if secure else ''}://{host}:{args.openai_port}"
            endpoints |= {"openai": f"{door}/v1"} | ({} if args.no_page else {"page": f"{door}/"})
        for kind, url in endpoints.items():
            print(f"{kind:8}{url}", flush=True)
        log_event(log, "serving", pid=os.getpid(), endpoints=endpoints)

    # The OpenAI API

    def _start_openai(self) -> None:
        args = self._args
        secure = ["--tls-cert", str(args.tls_cert), "--tls-key", str(args.tls_key)] if args.tls_cert else []
        url = f"grpc{'s' if secure else ''}://{in_url(reachable(args.host))}:{args.grpc_port}"
        command = [sys.executable, "-m", "ssv.triton_repo.openai.process", "--url", url, "--host", args.host]
        command += ["--port", str(args.openai_port), "--bundle", str(args.bundle), *secure]
        command += ["--max-length", str(args.max_model_len)]
        if args.api_key_file is not None:
            command += ["--api-key-file", str(args.api_key_file)]
        if args.allowed_origins:
            command += ["--allowed-origins", *args.allowed_origins]
        if args.chat_template is not None:
            command += ["--chat-template", str(args.chat_template)]
        if args.ab is not None:
            command.append("--routed")
        if args.engine == "tensorrt_llm":
            command.append("--premium-only")
        if args.no_page:
            command.append("--no-page")
        environment = os.environ | {BOARDS_VARIABLE: str(self._place.boards), VARIABLE: self._place.mark("openai")}
        self._openai = subprocess.Popen(bound(command), env=environment, start_new_session=True)  # noqa: S603

    def _open_openai(self) -> str | None:
        """Starts the API and waits until it answers; how it failed, if it did."""
        self._start_openai()

        def answers() -> bool:
            try:
                with socket.create_connection((reachable(self._args.host), self._args.openai_port), timeout=1.0):
                    return True
            except OSError:
                return False

        return self._wait(answers, self._how_openai_ended, "the OpenAI API")

    def _how_openai_ended(self) -> str | None:
        if self._openai is None or (status := self._openai.poll()) is None:
            return None
        return f"the OpenAI API ended with status {status}"

    def _look_after_openai(self) -> None:
        """Starts the API again if it has died; the engines go on."""
        if (why := self._how_openai_ended()) is None:
            return
        too_often = self._openai_deaths.another()
        log_event(log, "the OpenAI API died", level=logging.ERROR, why=why, deaths=len(self._openai_deaths))
        self._counted.restarted("openai")
        if too_often:
            raise GivenUp(f"{why}; it has died {len(self._openai_deaths)} times, which is too often")
        self._start_openai()

    def _end_openai(self, seconds: float) -> None:
        """Lets the API finish what it answers."""
        if self._openai is not None and self._openai.poll() is None:
            self._openai.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._openai.wait(seconds)
        self._kill_openai()

    def _kill_openai(self) -> None:
        if self._openai is not None:
            self._openai.kill()
            self._openai.wait()
        self._openai = None

    # The end

    def _drain(self) -> None:
        """Takes no more requests, and lets those that run come to their end."""
        log_event(log, "draining", seconds=self._args.drain_timeout)
        deadline = time.monotonic() + self._args.drain_timeout
        self._counted.drain()
        self._front.state = "draining"
        self._triton.be_not_ready()
        ControlSender(self._triton.pid).drain()
        while time.monotonic() < deadline and self._triton.how_it_ended() is None and self._num_running():
            time.sleep(POLL_SECONDS)
        left = deadline - time.monotonic()
        least, most = OPENAI_END_SECONDS
        self._end_openai(min(max(left, least), most))
        while self._front.num_running and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self._triton.end(END_SECONDS)
        log_event(log, "stopped")

    def _reset_tier(self, tier: str) -> bool:
        return ControlSender(self._triton.pid).reset(tier)

    def _num_running(self) -> float:
        return sum(self._reader.get("ssv_requests_running", tier=tier) for tier in METHODS)

    def _kill(self) -> None:
        """Ends the server and whatever it has started, and what they had taken is counted as lost."""
        self._triton.kill()
        self._children = []
        Metrics(self._place.boards, "ssv").died()


def reachable(host: str) -> str:
    """Where this machine reaches a server that listens at `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104


def in_url(host: str) -> str:
    """A host as URLs have it."""
    return f"[{host}]" if ":" in host else host
