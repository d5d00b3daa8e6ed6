"""Runs programs that a model wrote, each in a process of its own that may do almost nothing (`jail.py`).

What it protects: a program has no network, starts no process, signals none, reads and writes no file outside of its own
folder, which vanishes afterwards (Python's library and the system's can be read), inherits no variable of the
environment and no open file, and ends when its CPU time, its memory or the time on the clock is used up.

What it does not protect: from a bug of the kernel, from what running beside it tells by its timing, from learning which
files exist (not what is in them), and from a program that sets out to be counted as right without being so, which could
find how it reports. Use a virtual machine where programs are written by somebody who means harm.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ssv.ab.evaluation import jail
from ssv.support.errors import UserError

CPU_SECONDS = 5
"""Of a program, its start included: the tests of HumanEval take hundredths."""

MEMORY_MB = 1024
CLOCK_SECONDS = 30.0
"""For one that sleeps, or runs on a machine that others keep busy."""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a program ended.

    Attributes:
        passed: whether it came to its end.
        why: "passed", what it raised, or by what it was ended.
    """

    passed: bool
    why: str


def run_program(
    text: str,
    *,
    cpu_seconds: int = CPU_SECONDS,
    memory_mb: int = MEMORY_MB,
    clock_seconds: float = CLOCK_SECONDS,
) -> Ran:
    """Runs a program of Python.

    Raises:
        UserError: this machine cannot take from a program what it must not have; the program was not run.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="ssv-program-") as folder:
        Path(folder, jail.PROGRAM).write_text(text, encoding="utf-8", errors="replace")
        reading, writing = os.pipe()
        with open(reading, "rb") as report:
            try:
                command = [sys.executable, "-s", "-S", "-P", "-B", jail.__file__]
                process = subprocess.Popen(  # noqa: S603
                    [*command, str(writing), str(cpu_seconds), str(memory_mb)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    env={"PYTHONHASHSEED": "0"},  # the same program has the same order of sets, and the same end
                    pass_fds=(writing,),
                    start_new_session=True,
                )
            finally:
                os.close(writing)
            late = False
            try:
                process.communicate(f"{token}\n".encode(), timeout=clock_seconds)
            except subprocess.TimeoutExpired:
                late = process.poll() is None  # it may have ended while this process did not get its turn
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                process.wait()
            said = report.read(4096).decode(errors="replace")
    return _ran(said, token, process.returncode, late=late, cpu_seconds=cpu_seconds, clock_seconds=clock_seconds)


def _ran(said: str, token: str, code: int, *, late: bool, cpu_seconds: int, clock_seconds: float) -> Ran:
    """What became of a process, by what it reported and how it ended."""
    reported, kind, words = (*said.split(" ", 2), "", "")[:3]
    if reported == token and kind == "unprotected":
        raise UserError(
            f"programs that a model wrote cannot be run safely here: {words}",
            "use Linux 5.13 or later on x86-64 or aarch64, or leave --humaneval out",
        )
    if late:
        return Ran(False, f"ended after {clock_seconds:g} s")
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return Ran(False, f"ended after {cpu_seconds} s of CPU time")
    if code < 0:
        return Ran(False, f"ended by {signal.Signals(-code).name}")
    if reported != token:
        return Ran(False, "it ended itself")
    return Ran(True, kind) if kind == "passed" else Ran(False, words)
