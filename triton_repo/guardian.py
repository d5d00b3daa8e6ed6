"""The processes of a server by the mark in their environment, and the guardian that ends them when ssv-serve is gone.

A child can be bound to its parent (`bound.py`); tritonserver's Python models are children of tritonserver's threads,
and one that waits for a tritonserver that was killed waits for ever. So whatever a server starts inherits a mark, and a
guardian that was started before all of them holds one end of a pipe whose other end ssv-serve alone has: it comes to
its end with ssv-serve, however that ends. Then whoever has the mark is killed, and the files and the shared memory that
they leave are removed.

Run as a file, with nothing but the standard library: `python guardian.py FOLDER PREFIX`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

VARIABLE = "SSV_PART_OF"
"""A server's folder, and what of it: nobody else has a folder of that name."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108

_PROC = Path("/proc")
_POLL_SECONDS = 0.02
_END_SECONDS = 60.0
"""For what was killed to be gone; what cannot be ended so soon waits for a disk or a device."""


class Guardian:
    """The guardian's process, which is started again should it die."""

    def __init__(self, folder: Path, prefix: str) -> None:
        """Starts the guardian's process.

        Args:
            folder: the server's; marks that are it, or begin with it and a slash, are of the server.
            prefix: what the names of its shared memory begin with.
        """
        self._command = [sys.executable, "-I", "-S", __file__, str(folder), prefix]
        self._start()

    def _start(self) -> None:
        # In a session of its own: a signal to the terminal, or to the group of ssv-serve, is not for it.
        self._process = subprocess.Popen(  # noqa: S603
            self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True
        )

    @property
    def pid(self) -> int:
        """The process that runs now, or that ran last."""
        return self._process.pid

    def look_after(self) -> bool:
        """Starts it again if it has died; whether it had."""
        if self._process.poll() is None:
            return False
        self._let_go()
        self._start()
        return True

    def close(self) -> None:
        """Has it do its work, as ssv-serve's end would, and waits until it has."""
        self._let_go()
        self._process.wait()

    def _let_go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()


def members(mark: str) -> list[int]:
    """Process ids of those with a mark, or with one that goes on after a slash; others' are not seen."""
    start = f"{VARIABLE}={mark}".encode()
    found = []
    for path in _PROC.glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if any(entry == start or entry.startswith(start + b"/") for entry in path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
    return found


def end(mark: str) -> None:
    """Kills those with a mark, and returns when they are gone."""
    deadline = time.monotonic() + _END_SECONDS
    # Again until nobody is found, since one may have started another meanwhile.
    while (found := members(mark)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def remove_shared_memory(prefix: str) -> None:
    """Removes the files of shared memory whose names begin with a prefix."""
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        path.unlink(missing_ok=True)


def main() -> None:
    folder, prefix = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # what ends ssv-serve must not end it before
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end(folder)
    remove_shared_memory(prefix)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
