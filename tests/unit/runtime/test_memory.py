"""Freed memory: given back by one process, kept by another; and files whose pages are let go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ssv.model.checkpoint import read_safetensors
from ssv.runtime.memory import GIVE_BACK, drop_mapped_pages

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


def resident_kb(path: Path) -> int:
    """How much of a file is in this process's memory."""
    resident, is_of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            is_of_file = values[-1:] == [str(path)]
        elif is_of_file and name == "Rss:":
            resident += int(values[0])
    return resident


@pytest.mark.skipif(sys.platform != "linux", reason="the pages of /proc")
def test_pages_of_a_file_are_dropped_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.arange(1 << 20), "y": torch.ones(1 << 20)}, path)
    weights = read_safetensors(path)
    total = int(weights["x"].sum()) + int(weights["y"].sum())
    assert resident_kb(path) >= 12 << 10
    drop_mapped_pages(weights["x"])
    assert resident_kb(path) < 1 << 10
    assert int(weights["x"].sum()) + int(weights["y"].sum()) == total


def test_memory_of_no_file_keeps_what_it_has() -> None:
    x = torch.arange(1 << 20)
    drop_mapped_pages(x)
    assert int(x[-1]) == (1 << 20) - 1
