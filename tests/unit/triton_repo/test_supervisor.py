"""Processes that belong together: bound to each other's life, started again, and cleaned up after."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from triton_asks import wait_until

from ssv.runtime.serving.metrics import Metrics, Reader
from ssv.triton_repo import guardian, supervisor, tritonserver
from ssv.triton_repo.bound import bound
from ssv.triton_repo.guardian import VARIABLE, Guardian, end, members
from ssv.triton_repo.installation import Installation
from ssv.triton_repo.supervisor import Deaths, GivenUp, Supervisor, in_url, reachable
from ssv.triton_repo.tritonserver import Tritonserver

SLEEP = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"]

# Bound to each other's life


def test_a_bound_process_is_the_program_itself() -> None:
    done = subprocess.run(
        bound([sys.executable, "-c", "import os, sys; print(sys.argv, os.getpid())", "a b", "--c"]), capture_output=True
    )
    assert done.stdout.startswith(b"['-c', 'a b', '--c'] ")


def test_a_bound_process_ends_with_whoever_started_it() -> None:
    """Killed, so that it can do nothing about it."""
    code = (
        "import subprocess, sys; from ssv.triton_repo.bound import bound\n"
        f"child = subprocess.Popen(bound({SLEEP!r}), stdout=subprocess.PIPE, start_new_session=True)\n"
        "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "it is gone")


def test_a_process_whose_parent_has_gone_already_does_not_begin() -> None:
    command = bound(SLEEP)
    command[command.index(str(os.getpid()))] = "1"  # somebody else
    assert subprocess.run(command, capture_output=True, timeout=60.0).returncode == 1


# The guardian

LEAVER = f"""
import os, subprocess, sys
from pathlib import Path
from ssv.triton_repo.guardian import VARIABLE, Guardian
folder = Path(sys.argv[1])
guardian = Guardian(folder, "ssv_none_")
leave = "import os, subprocess; subprocess.Popen({SLEEP!r}, start_new_session=True); os._exit(0)"
marked = os.environ | {{VARIABLE: f"{{folder}}/tritonserver"}}
subprocess.run([sys.executable, "-c", leave], env=marked, stdout=subprocess.DEVNULL)
print(guardian.pid, flush=True)
sys.stdin.read()
"""
"""Starts a process that starts another, in a session of its own, and ends: nobody is its parent any more."""


def started_by(mark: str) -> list[int]:
    """The processes with a mark, once there are any."""
    wait_until(lambda: bool(members(mark)), "it runs")
    return members(mark)


def test_nobody_outlives_a_server_that_is_killed(tmp_path: Path) -> None:
    """Not even whoever has lost its parent, and waits for ever."""
    folder = tmp_path / "server"
    folder.mkdir()
    other = subprocess.Popen(SLEEP, env=os.environ | {VARIABLE: f"{folder}-2/tritonserver"}, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-c", LEAVER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        guard = psutil.Process(int(server.stdout.readline()))
        (left,) = started_by(str(folder))
        assert psutil.Process(left).ppid() != server.pid
        numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        wait_until(lambda: numbers <= _ignored(guard.pid), "it is not to be ended by what ends ssv-serve")
        server.kill()
    wait_until(lambda: not psutil.pid_exists(left), "it is gone")
    wait_until(lambda: not folder.exists(), "its files are gone")
    wait_until(lambda: not guard.is_running() or guard.status() == psutil.STATUS_ZOMBIE, "and so is the guardian")
    assert other.poll() is None, "it is of another server"
    other.kill()
    other.wait()


def _ignored(pid: int) -> set[int]:
    """Signals that a process ignores."""
    (line,) = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("SigIgn:")]
    return {number for number in range(1, 32) if int(line.split()[1], 16) >> (number - 1) & 1}


def test_a_guardian_that_dies_is_started_again(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    guard = Guardian(folder, "ssv_none_")
    assert not guard.look_after(), "it lives"
    first = guard.pid
    os.kill(first, signal.SIGKILL)
    wait_until(guard.look_after, "it is seen")
    assert guard.pid != first and folder.exists()
    guard.close()
    assert not folder.exists()


def test_a_part_of_a_server_is_ended_alone(tmp_path: Path) -> None:
    def start(part: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(SLEEP, env=os.environ | {VARIABLE: f"{tmp_path}/{part}"}, stdout=subprocess.DEVNULL)

    triton, openai = start("tritonserver"), start("openai")
    wait_until(lambda: set(members(str(tmp_path))) == {triton.pid, openai.pid}, "both run")
    end(f"{tmp_path}/tritonserver")
    assert triton.wait() == -signal.SIGKILL
    assert openai.poll() is None and members(str(tmp_path)) == [openai.pid]
    end(str(tmp_path))
    assert openai.wait() == -signal.SIGKILL


# The log


@pytest.mark.parametrize(
    ("line", "is_shown"),
    [
        (
            b'W1126 10:43:21.386402 6121 pinned_memory_manager.cc:273] "Unable to allocate pinned system '
            b"memory, pinned memory pool will not be available: "
            b'CUDA driver version is insufficient for CUDA runtime version"\n',
            False,
        ),
        (b'E1126 10:43:21.386867 6121 server.cc:241] "CudaDriverHelper has not been initialized."\n', False),
        (
            b'E1126 10:43:36.5 6121 ensemble_scheduler.cc:1468] "unable to create stream for ensemble: '
            b'CUDA driver version is insufficient for CUDA runtime version"\n',
            False,
        ),
        (b"Error: Failed to initialize NVML\n", False),
        (b'W1126 10:43:36.5 6121 metrics.cc:798] "DCGM unable to start: DCGM initialization error"\n', False),
        (
            b"E1126 10:51:27.1 9481 model_lifecycle.cc:642] "
            b"\"failed to load 'draining' version 1: Internal: RuntimeError\"\n",
            False,
        ),
        (
            b"E1126 10:51:27.1 9481 model_lifecycle.cc:642] "
            b"\"failed to load 'ssv' version 1: Internal: RuntimeError\"\n",
            True,
        ),
        (b'{"event": "request", "error": "CudaDriverHelper has not been initialized."}\n', True),
        (b"E1126 something else\n", True),
    ],
)
def test_a_server_on_a_cpu_does_not_complain_of_it(
    line: bytes, is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = SimpleNamespace(buffer=io.BytesIO())
    monkeypatch.setattr(tritonserver.sys, "stderr", shown)
    tritonserver._copy([line], [tritonserver._DRAINS, tritonserver._NO_GPU])
    assert shown.buffer.getvalue() == (line if is_shown else b"")


def test_a_server_on_a_gpu_may_complain(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = SimpleNamespace(buffer=io.BytesIO())
    monkeypatch.setattr(tritonserver.sys, "stderr", shown)
    line = b"Error: Failed to initialize NVML\n"
    tritonserver._copy([line], [tritonserver._DRAINS])
    assert shown.buffer.getvalue() == line


# What is left in shared memory


def given(**options: Any) -> argparse.Namespace:
    base = {"device": "cpu", "engine": "torch", "admin_key": None, "ab": None, "host": "127.0.0.1", "grpc_port": 1}
    return argparse.Namespace(**base, tls_cert=None, tls_key=None, **options)


def test_only_its_own_shared_memory_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever others have there, and whether or not their processes can be seen."""
    monkeypatch.setattr(guardian, "SHARED_MEMORY", tmp_path)
    program = tmp_path / "sleep"
    program.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    program.chmod(0o755)
    server = Tritonserver(given(), Installation(program), Path("models"), str(tmp_path))
    (prefix,) = re.findall(r"shm-region-prefix-name=(\S+)", " ".join(server.arguments()))
    others = [f"triton_python_backend_shm_region_{1:032}", f"ssv_{os.getpid()}_0123_x", f"x{prefix}1", "sem.other"]
    for name in (*others, f"{prefix}1", f"{prefix}2"):
        (tmp_path / name).touch()
    server.start({}, {})
    server.kill()
    assert server.how_it_ended() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "sleep"])


# Started again


class Quiet:
    """A front that nobody asks."""

    def __init__(self, *_: object) -> None:
        self.state, self.num_running = "starting", 0

    def lead_to(self, *_: object) -> None: ...

    def close(self) -> None: ...


class Idle:
    """A guardian without a process."""

    def __init__(self, *_: object) -> None: ...

    def look_after(self) -> bool:
        return False

    def close(self) -> None: ...


class FakeTriton:
    """Ends as often as it is told to, then has the whole stopped."""

    pid, http_port, metrics_port, shared_memory = os.getpid(), 0, 0, "ssv_0_"

    def __init__(self, deaths: int, stopping: threading.Event) -> None:
        self.deaths, self.stopping, self.starts = deaths, stopping, 0

    def start(self, *_: object) -> None:
        self.starts += 1

    def is_ready(self) -> bool:
        return True

    def how_it_ended(self) -> str | None:
        if self.is_asked_again():
            if self.starts <= self.deaths:
                return "tritonserver ended with status -9"
            self.stopping.set()
        return None

    def is_asked_again(self) -> bool:
        """Whether it has been ready since it was started."""
        self._asked = (*getattr(self, "_asked", ()), self.starts)
        return self._asked.count(self.starts) > 1

    def be_not_ready(self) -> None: ...

    def end(self, seconds: float) -> None: ...

    def kill(self) -> None: ...


def supervised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int, restarts: int
) -> tuple[Supervisor, FakeTriton, Reader]:
    stopping = threading.Event()
    triton = FakeTriton(deaths, stopping)
    monkeypatch.setattr(supervisor, "Front", Quiet)
    monkeypatch.setattr(supervisor, "Guardian", Idle)
    monkeypatch.setattr(supervisor, "Tritonserver", lambda *_: triton)
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.001)
    args = given(
        restarts=restarts,
        openai_port=None,
        ready_timeout=60.0,
        drain_timeout=1.0,
        http_port=2,
        metrics_port=3,
        bundle=tmp_path,
    )
    place = supervisor.Place(tmp_path)
    place.boards.mkdir()
    sockets: Any = {"http": None, "metrics": None}
    return Supervisor(args, Installation(Path("x")), place, sockets, stopping), triton, Reader(place.boards)


def test_a_server_that_dies_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, triton, reader = supervised(tmp_path, monkeypatch, deaths=2, restarts=2)
    Metrics(tmp_path / "metrics", "ssv").taken("premium")
    assert made.run() == 0
    assert triton.starts == 3
    assert reader.get("ssv_restarts", process="tritonserver") == 2
    assert reader.get("ssv_requests", tier="premium", reason="error") == 1, "what it had taken is lost"
    assert reader.get("ssv_draining") == 1


def test_a_server_that_dies_too_often_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, triton, _ = supervised(tmp_path, monkeypatch, deaths=9, restarts=2)
    assert made.run() == supervisor.EXIT_DIED
    assert triton.starts == 3
    assert "it has died 3 times, which is too often" in capsys.readouterr().err


def test_the_openai_api_is_started_again_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, triton, reader = supervised(tmp_path, monkeypatch, deaths=0, restarts=1)
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(subprocess.Popen(SLEEP, stdout=subprocess.DEVNULL))
        made._openai = started[-1]

    monkeypatch.setattr(made, "_start_openai", start)
    start()
    made._look_after_openai()
    assert len(started) == 1, "it lives"
    for num, died in enumerate(started[:1], 1):
        died.send_signal(signal.SIGKILL)
        died.wait()
        made._look_after_openai()
        assert len(started) == num + 1
    assert reader.get("ssv_restarts", process="openai") == 1
    assert triton.starts == 0
    started[-1].kill()
    started[-1].wait()
    with pytest.raises(GivenUp, match="the OpenAI API ended with status -9; it has died 2 times"):
        made._look_after_openai()


def test_deaths_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    deaths = Deaths(1)
    assert not deaths.another()
    now[0] = supervisor.RESTART_WINDOW_SECONDS + 1
    assert not deaths.another()
    now[0] += 1
    assert deaths.another()


def test_addresses() -> None:
    assert [reachable(host) for host in ("0.0.0.0", "::", "10.0.0.1")] == ["127.0.0.1", "::1", "10.0.0.1"]
    assert [in_url(host) for host in ("::1", "10.0.0.1", "localhost")] == ["[::1]", "10.0.0.1", "localhost"]
