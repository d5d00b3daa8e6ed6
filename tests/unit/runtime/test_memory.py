"""Freed memory: given back by one process, kept by another."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ssv.runtime.memory import GIVE_BACK

# Frees eight blocks of 8 MB, and prints how much of them the process still holds, in MB; the first makes malloc raise
# its threshold.
PROGRAM = """
import ctypes, sys
from pathlib import Path
from ssv.runtime.memory import keep_large_blocks
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
if sys.argv[1] == "keep":
    assert keep_large_blocks()
size = 8 << 20
before = resident()
libc.free(libc.malloc(size))
blocks = [libc.malloc(size) for _ in range(8)]
for block in blocks:
    ctypes.memset(block, 1, size)
for block in blocks[:-1]:
    libc.free(block)
print(round(resident() - before - size / 2**20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize(("environment", "how", "kept"), [(GIVE_BACK, "", 0), (GIVE_BACK, "keep", 56), ({}, "", 56)])
def test_freed_blocks(environment: dict[str, str], how: str, kept: int) -> None:
    base = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    out = subprocess.run([sys.executable, "-c", PROGRAM, how], env=base | environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert abs(int(out.stdout) - kept) <= 8
