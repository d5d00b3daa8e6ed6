"""Arguments of a program that `ps` never shows, for programs that take a secret in no other way.

What `ps` shows of a process is the part of its memory where its arguments lie when it begins. The program itself is
given pointers to them. So it is started with stars in their place, and with the arguments in its environment, which
other users cannot read; it is held before its first instruction, and the pointers are turned to those. The environment
that it hands on has them no more. (A program that starts another with its own arguments, as a script does, shows them.)
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from ssv.triton_repo.bound import NOT_TRACED, bound

_VARIABLE = "SSV_ARGUMENT_"

_PTRACE_CONT, _PTRACE_DETACH = 7, 17

# Fields 28 and 48 to 51 of /proc/PID/stat (proc(5)), counted from what follows the command's name, which is the third.
_STACK, _ARGUMENTS, _ENVIRONMENT = 25, slice(45, 47), slice(47, 49)
_WORD = 8
"""Bytes of a pointer: Linux programs of 64 bits, which all of Triton are."""


def start_bound(
    command: Sequence[str], secret: str, environment: Mapping[str, str], stderr: int | None = None
) -> tuple[subprocess.Popen[bytes], bool]:
    """Starts a program in a session of its own, bound to this process, whose arguments are shown without a secret.

    To be called by the main thread.

    Returns:
        The process, and whether the secret is hidden: where processes must not be traced it is not.
    """
    names = {argument: f"{_VARIABLE}{place}" for place, argument in enumerate(command) if secret in argument}
    stars = {argument: argument.replace(secret, "*" * len(secret)) for argument in names}
    hidden = {name: argument for argument, name in names.items()}
    shown = [stars.get(argument, argument) for argument in command]
    process = _start(bound(shown, traced=True), {**environment, **hidden}, stderr)
    if _turned(process, {stars[argument]: name for argument, name in names.items()}):
        return process, True
    return _start(bound(command), environment, stderr), False


def _start(command: Sequence[str], environment: Mapping[str, str], stderr: int | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=dict(environment), stderr=stderr, start_new_session=True)  # noqa: S603


def _turned(process: subprocess.Popen[bytes], variables: Mapping[str, str]) -> bool:
    """Waits until the program is loaded, turns its pointers, and lets it begin; False if it must not be traced."""
    while True:
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        if found is None or found.si_code not in (os.CLD_TRAPPED, os.CLD_STOPPED):
            return process.wait() != NOT_TRACED
        os.waitpid(process.pid, os.WUNTRACED)
        if found.si_status == signal.SIGTRAP:
            break
        _ptrace(_PTRACE_CONT, process.pid, found.si_status)  # a signal that came before
    try:
        turn(process.pid, variables)
    except OSError:
        process.kill()
        process.wait()
        return False
    _ptrace(_PTRACE_DETACH, process.pid, 0)
    return True


def _ptrace(request: int, pid: int, data: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.restype, call.argtypes = ctypes.c_long, (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    if call(request, pid, None, data) == -1:
        raise OSError(ctypes.get_errno(), "ptrace")


def turn(pid: int, variables: Mapping[str, str]) -> None:
    """Turns the pointers to a program's arguments to values of its environment, which then loses them.

    Args:
        pid: of a process that has not begun.
        variables: the name by the argument that is shown.

    Raises:
        OSError: there is no such process, its memory is not ours to write, or it is laid out in another way.
    """
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        arguments, environment = (_texts(memory, *map(int, stat[fields])) for fields in (_ARGUMENTS, _ENVIRONMENT))
        values, emptied = {}, {}
        for address, text in environment.items():
            if (name := text.partition("=")[0]) in variables.values():
                values[name] = address + len(os.fsencode(name)) + 1
                emptied[address] = address + len(os.fsencode(text))
        stack = int(stat[_STACK])
        (count,) = _words(memory, stack, 1)
        if count != len(arguments) or len(values) != len(variables):
            raise OSError(f"the memory of process {pid} is laid out in another way")
        # The count of arguments, pointers to them, a null, pointers to the environment, a null.
        for place, pointer in enumerate(_words(memory, stack + _WORD, count), 1):
            if (argument := arguments.get(pointer, "")) in variables:
                _write(memory, stack + place * _WORD, values[variables[argument]])
        begin = stack + (count + 2) * _WORD
        for place, pointer in enumerate(_words(memory, begin, len(environment))):
            if pointer in emptied:
                _write(memory, begin + place * _WORD, emptied[pointer])


def _texts(memory: BinaryIO, start: int, end: int) -> dict[int, str]:
    """Texts that lie one after the other, each with a null at its end, by address."""
    memory.seek(start)
    found, address = {}, start
    for text in memory.read(end - start).split(b"\0")[:-1]:
        found[address] = os.fsdecode(text)
        address += len(text) + 1
    return found


def _words(memory: BinaryIO, address: int, count: int) -> tuple[int, ...]:
    memory.seek(address)
    return struct.unpack(f"<{count}Q", memory.read(count * _WORD))


def _write(memory: BinaryIO, address: int, word: int) -> None:
    memory.seek(address)
    memory.write(struct.pack("<Q", word))
