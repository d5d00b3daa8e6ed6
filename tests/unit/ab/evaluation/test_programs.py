"""Programs that a model wrote, locked up: what they can do, and what they cannot."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import pytest

from ssv.ab.evaluation import jail
from ssv.ab.evaluation.programs import Ran, _ran, run_program
from ssv.support.errors import UserError

LOADED, EQUAL, AT_LEAST, ANSWER = 0x20, 0x15, 0x35, 0x06
ALLOW, END = 0x7FFF0000, 0x80000000


def has_landlock() -> bool:
    return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)) >= 1


can_lock = pytest.mark.skipif(
    platform.machine() not in jail.MACHINES or not has_landlock(), reason="this kernel has no Landlock"
)

WORKS = {
    "arithmetic": "assert sum(range(5)) == 10",
    "the library": "import collections, hashlib, json, math, random, re, typing\nassert hashlib.md5(b'x').hexdigest()",
    "its own folder": "open('a', 'w').write('x')\nassert open('a').read() == 'x'",
    "a name": "assert __name__ == '__main__'",
}

FAILS = {
    "a wrong assertion": ("assert 1 == 2, 'no'", "AssertionError: no"),
    "no Python": ("def", "SyntaxError"),
    "an early end": ("raise SystemExit(0)", "SystemExit: 0"),
    "an end without a word": ("import os\nos._exit(0)", "it ended itself"),
    "the network": ("import socket\nsocket.socket()", "PermissionError"),
    "another process": ("import subprocess, sys\nsubprocess.run([sys.executable])", "PermissionError"),
    "a fork": ("import os\nos.fork()", "PermissionError"),
    "a thread": ("import threading\nthreading.Thread(target=print).start()", "RuntimeError"),
    "a signal": ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
    "its own limits": ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (9999, 9999))", ""),
    "memory": ("x = bytearray(1 << 40)", "MemoryError"),
    "a huge file": ("f = open('a', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))", "OSError"),
    "a null pointer": ("import ctypes\nctypes.string_at(0)", "ended by SIGSEGV"),
    "somebody's list of users": ("open('/etc/passwd')", "PermissionError"),
    "a listing": ("import os\nos.listdir('/')", "PermissionError"),
    "another's environment": ("open('/proc/1/environ')", "PermissionError"),
    "a message that says that it passed": (
        "import os, sys\nos.write(int(sys.argv[1]), b'x passed')\nos._exit(0)", "it ended itself"
    ),
}  # fmt: skip


@can_lock
@pytest.mark.parametrize("program", WORKS.values(), ids=WORKS)
def test_what_a_program_can_do(program: str) -> None:
    assert run_program(program) == Ran(True, "passed")


@can_lock
@pytest.mark.parametrize(("program", "why"), FAILS.values(), ids=FAILS)
def test_what_a_program_cannot_do(program: str, why: str) -> None:
    ran = run_program(program)
    assert not ran.passed
    assert ran.why.startswith(why)


@can_lock
def test_it_touches_no_file_outside(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("kept")
    mode = file.stat().st_mode
    for call in ("open({0!r}).read()", "open({0!r}, 'w')", "os.remove({0!r})", "os.truncate({0!r}, 0)",
                 "os.chmod({0!r}, 0)", "os.rename({0!r}, 'here')", "os.utime({0!r})", "os.mkdir({0!r} + 'x')",
                 "os.symlink('a', {0!r} + 'x')"):  # fmt: skip
        ran = run_program(f"import os\n{call.format(str(file))}")
        assert ran.why.startswith(("PermissionError", "OSError")), (call, ran)
    assert file.read_text() == "kept"
    assert file.stat().st_mode == mode
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@can_lock
def test_it_inherits_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    assert run_program("import os\nassert not set(os.environ) - {'PYTHONHASHSEED', 'LC_CTYPE'}").passed


@can_lock
def test_the_same_program_has_the_same_sets() -> None:
    assert run_program("assert hash('a') == " + run_program("raise Exception(hash('a'))").why.split(": ")[1]).passed


@can_lock
def test_it_ends_when_its_time_is_over() -> None:
    assert run_program("while True: pass", cpu_seconds=1).why == "ended after 1 s of CPU time"
    assert run_program("import time\ntime.sleep(600)", clock_seconds=2.0).why == "ended after 2 s"


@can_lock
def test_nothing_stays_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    open_before = len(os.listdir("/proc/self/fd"))
    assert run_program("open('a', 'w').write('x')").passed
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_without_protection_nothing_is_run() -> None:
    with pytest.raises(UserError, match="cannot be run safely here: no Landlock"):
        _ran("token unprotected no Landlock", "token", 1, late=False, cpu_seconds=1, clock_seconds=1.0)


def test_another_machine_is_refused() -> None:
    with pytest.raises(jail.NoProtectionError, match="riscv64"):
        jail.forbid_calls("riscv64")


def answer(program: Sequence[tuple[int, int, int, int]], architecture: int, number: int) -> int:
    """What a filter answers to a call: classic BPF, the few instructions that it has."""
    at, value = 0, 0
    while True:
        code, if_true, if_false, operand = program[at]
        at += 1
        if code == LOADED:
            value = {0: number, 4: architecture}[operand]
        elif code == ANSWER:
            return operand
        else:
            at += if_true if (value == operand if code == EQUAL else value >= operand) else if_false


@pytest.mark.parametrize("machine", jail.MACHINES)
def test_the_filter_refuses_what_it_lists(machine: str) -> None:
    column, architecture = jail.MACHINES[machine]
    numbers = {both[column] for both in jail.FORBIDDEN.values()} - {jail.NONE}
    program = jail.filter_program(sorted(numbers), architecture)
    for number in range(jail.NEWEST + 1):
        assert answer(program, architecture, number) == (0x00050001 if number in numbers else ALLOW)
    for number in (jail.NEWEST + 1, 0x40000000 + 41):  # later ones, and those of another ABI
        assert answer(program, architecture, number) == 0x00050026
    assert answer(program, architecture ^ 1, 0) == END


def test_no_call_is_listed_twice() -> None:
    for column in (0, 1):
        numbers = [both[column] for both in jail.FORBIDDEN.values() if both[column] != jail.NONE]
        assert len(numbers) == len(set(numbers))
