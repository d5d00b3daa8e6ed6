"""Compiled kernels by CUDA's driver: loaded from a cubin, launched on a stream, overlapping the kernel before.

`cuLaunchKernelEx` is what programmatic dependent launch needs; PyTorch has no call for it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_MAX_DYNAMIC_SHARED_SIZE = 8
_DEFAULT_SHARED = 47 * 1024
"""Of a block, beside what its own declarations hold; more has to be asked for."""


class DriverError(RuntimeError):
    """A call of the driver that failed."""


class _Value(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("bytes", ctypes.c_char * 64))


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", _Value))


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Kernel:
    """One kernel, whose only argument is a structure."""

    def __init__(self, function: ctypes.c_void_p) -> None:
        self._function, self._shared = function, _DEFAULT_SHARED

    def launch(
        self,
        argument: ctypes.Structure,
        grid: tuple[int, int, int],
        threads: int,
        stream: int,
        *,
        shared: int = 0,
        overlaps: bool = False,
    ) -> None:
        """Puts it on a stream.

        Args:
            argument: copied at once.
            threads: of a block.
            stream: as `torch.cuda.Stream.cuda_stream`.
            shared: bytes of shared memory of a block that its own declarations do not hold.
            overlaps: it may start while the kernel before it runs, and waits for it where it says so
                (`griddepcontrol.wait`).

        Raises:
            DriverError: it cannot be launched so.
        """
        if shared > self._shared:
            _check(_driver().cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED_SIZE, shared), "cuFuncSetAttribute")
            self._shared = shared
        attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=_Value(number=1))
        config = _Config(*grid, threads, 1, 1, shared, stream, ctypes.pointer(attribute), int(overlaps))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, arguments, None), "cuLaunchKernelEx")


class Module:
    """The kernels of a cubin, in the context that is current."""

    def __init__(self, cubin: bytes) -> None:
        """Loads a cubin into the context that is current.

        Raises:
            DriverError: there is no context, or the cubin is for another GPU.
        """
        self._module = ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(self._module), cubin), "cuModuleLoadData")

    def kernel(self, name: str) -> Kernel:
        """A kernel by its name.

        Raises:
            DriverError: the cubin has none of this name.
        """
        function = ctypes.c_void_p()
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()), name)
        return Kernel(function)


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise DriverError(f"CUDA driver: {what}: {(text.value or b'unknown error').decode()} ({status})")


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
