"""Becomes a program that ends when the process that started it does: `python bound.py PID PROGRAM ARGUMENT...`.

Run as a file, with nothing but the standard library: it stands between ssv-serve and each of its children.

May import: nothing else of ssv.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def bound(command: Sequence[str]) -> list[str]:
    """A command that this process's death ends with SIGKILL. To be started by the main thread: the kernel looks at that."""
    return [sys.executable, "-I", "-S", str(Path(__file__)), str(os.getpid()), *command]


def main() -> None:
    parent, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before it could be bound to
        sys.exit(1)
    os.execv(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()
