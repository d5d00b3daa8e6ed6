"""Launches a kernel compiled ahead of time through the CUDA driver, as TensorRT does.

What it gets is its PTX, pointers to inputs, int32 scalars, pointers to outputs, and nothing else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ssv.plugins.aot import Artefact

_LOG_BYTES = 8192
_ERROR_LOG_BUFFER, _ERROR_LOG_SIZE = 5, 6  # CUjit_option


def launch(artefact: Artefact, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: Mapping[str, int]) -> None:
    """Launches on the current stream of torch, and waits."""
    cuda = ctypes.CDLL("libcuda.so.1")
    torch.cuda.current_stream().synchronize()  # torch has made a context
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    log = ctypes.create_string_buffer(_LOG_BYTES)
    options = (ctypes.c_int * 2)(_ERROR_LOG_BUFFER, _ERROR_LOG_SIZE)
    values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
    loaded = cuda.cuModuleLoadDataEx(ctypes.byref(module), artefact.ptx.encode(), 2, options, values)
    assert loaded == 0, f"cuModuleLoadDataEx: {loaded} {log.value.decode()}"
    try:
        found = cuda.cuModuleGetFunction(ctypes.byref(function), module, artefact.entry.encode())
        assert found == 0, f"cuModuleGetFunction: {found}"
        spec = artefact.spec
        arguments: list[ctypes.c_void_p | ctypes.c_int32] = [
            *(ctypes.c_void_p(x.data_ptr()) for x in inputs),
            *(ctypes.c_int32(value) for value in spec.scalar_values(sizes)),
            *(ctypes.c_void_p(x.data_ptr()) for x in outputs),
        ]
        assert len(arguments) == len(artefact.arguments)
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        launched = cuda.cuLaunchKernel(
            function, spec.grid(sizes), 1, 1, artefact.threads, 1, 1, artefact.shared_bytes, stream, pointers, None
        )
        assert launched == 0, f"cuLaunchKernel: {launched}"
        torch.cuda.synchronize()
    finally:
        cuda.cuModuleUnload(module)
