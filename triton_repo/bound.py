"""Becomes a program that ends when the process that started it does: `python bound.py PID HOW PROGRAM ARGUMENT...`.

Run as a file, with nothing but the standard library: it stands between ssv-serve and each of its children.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

NOT_TRACED = 71
"""Exit status where a program was to be traced and must not be."""

_FREE, _TRACED = "free", "traced"
_PR_SET_PDEATHSIG = 1
_PTRACE_TRACEME = 0


def bound(command: Sequence[str], *, traced: bool = False) -> list[str]:
    """A command that this process's death ends with SIGKILL.

    To be started by the main thread: the kernel looks at that.

    Args:
        traced: whether the program stops before its first instruction, for the thread that has started it (ptrace(2)).
    """
    how = _TRACED if traced else _FREE
    return [sys.executable, "-I", "-S", str(Path(__file__)), str(os.getpid()), how, *command]


def main() -> None:
    parent, how, *command = sys.argv[1:]
    library = ctypes.CDLL(None)
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before it could be bound to
        sys.exit(1)
    if how == _TRACED and library.ptrace(_PTRACE_TRACEME, 0, None, None) == -1:
        sys.exit(NOT_TRACED)
    os.execv(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()
