"""CUDA C++ to machine code, by NVRTC: the compiler that PyTorch's CUDA builds bring along. It needs no GPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent

CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
"""Of the GPUs that the kernels are written for."""


_OF_DECODERS = ("step.cuh", "arithmetic.cuh", "products.cuh", "attention.cuh")
_SHARED = {"decoder": _OF_DECODERS, "wide": _OF_DECODERS}


def source_of(name: str) -> str:
    """The source of the kernels `decoder`, `wide`, `rounds` or `sample`, with what they share before it."""
    parts = (*_SHARED.get(name, ("step.cuh",)), f"{name}.cu")
    return "".join(f'#line 1 "{part}"\n{(_FOLDER / part).read_text()}' for part in parts)


class CompileError(RuntimeError):
    """Source that NVRTC does not take, or no NVRTC; the message holds what it says."""


def compile_source(source: str, capability: str, macros: Mapping[str, int]) -> bytes:
    """A cubin of a source.

    Args:
        capability: compute capability, as "9.0".
        macros: constants that the source is specialised to.

    Raises:
        CompileError: NVRTC is not found, or reports an error.
    """
    library = _nvrtc()
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None), "create")
    try:
        # Products are fused with sums where the source says so (`fmaf`) and nowhere else. Left to the compiler, two
        # copies of the same lines may round differently, and a token's bits depend on which of them it went through.
        words = [f"--gpu-architecture=sm_{capability.replace('.', '')}", "--std=c++17", "--fmad=false"]
        words += [f"-D{name}={value}" for name, value in macros.items()]
        options = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
        if library.nvrtcCompileProgram(program, len(words), options):
            raise CompileError(_text(library, program))
        size = ctypes.c_size_t()
        _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)), "size")
        cubin = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, cubin), "get")
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def version() -> str:
    """NVRTC's.

    Raises:
        CompileError: it is not found.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "version")
    return f"{major.value}.{minor.value}"


def _text(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "log")
    log = ctypes.create_string_buffer(size.value)
    _check(library.nvrtcGetProgramLog(program, log), "log")
    return log.value.decode(errors="replace")


def _check(status: int, what: str) -> None:
    if status:
        raise CompileError(f"NVRTC: {what} failed with status {status}")


@cache
def _nvrtc() -> ctypes.CDLL:
    for name in _places():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompileError("NVRTC (libnvrtc.so) is not found: install nvidia-cuda-nvrtc, or a CUDA build of PyTorch")


def _places() -> Iterator[str]:
    """Names that the loader may know, then what packages have installed."""
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
    for entry in sys.path:
        for found in sorted(Path(entry).glob("nvidia/*/lib/libnvrtc.so.*")):
            if "builtins" not in found.name:
                yield str(found)
