"""What glibc's malloc does with large blocks that are freed.

A server's processes want opposite things. `tritonserver` holds messages of any size for a moment: what it frees shall
go back to the system, or one large message after the other stays in one of malloc's arenas. The engines free and take
the same large tensors at every step: they shall be had again without a page fault for each page.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
"""Environment of a process that gives large blocks back.

malloc has this threshold from the start, but raises it to the size of whatever has been freed (mallopt(3)), and no
longer once it is set.
"""

_MADV_DONTNEED = 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 32 << 20  # that malloc takes for a threshold


def give_back() -> None:
    """Gives back now what is free, also between blocks in use, as after loading.

    It does nothing where malloc cannot be told (not glibc).
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def drop_mapped_pages(tensor: Tensor) -> None:
    """Drops from this process what it has read of the file that a tensor is mapped from: what is read again comes from
    the page cache.

    It does nothing for tensors that no file backs, and outside of Linux.
    """
    storage = tensor.untyped_storage()
    start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        bounds, _, _, _, inode = line.split()[:5]
        first, last = (int(bound, 16) for bound in bounds.split("-"))
        if inode != "0" and first < stop and start < last:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


def keep_large_blocks() -> bool:
    """Has this process keep what it frees, whatever its environment says.

    Returns:
        False where malloc cannot be told (not glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST))
