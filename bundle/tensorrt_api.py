"""The two TensorRTs that engines are built with: which they are, how they are imported, what they call things.

`tensorrt` is NVIDIA TensorRT 11, for data centres; `tensorrt_rtx` is TensorRT for RTX, whose builder needs no GPU.
Their Python interfaces are the same where this package uses them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field

from ssv.support.errors import UserError
from ssv.support.precisions import EnginePrecision

if TYPE_CHECKING:
    import torch

Flavor = Literal["tensorrt", "tensorrt_rtx"]
Capability = Annotated[str, Field(pattern=r"^\d+\.\d$")]
"""Compute capability of a GPU, such as "8.9"."""

PACKAGES = {"tensorrt": "tensorrt-cu13", "tensorrt_rtx": "tensorrt-rtx-cu13"}


# Tried with TensorRT for RTX 1.7.1 on a whole target and a whole draft, which multiplies fp32 (the scorer) whatever its
# precision.
_LEAST_CAPABILITY = {"fp16": (7, 5), "bf16": (8, 0), "int4": (8, 0), "fp8": (8, 9)}
_LEAST_CAPABILITY_OF_A_DRAFT = (8, 0)


class EngineBuildError(UserError):
    """An engine that cannot be built or used; the message says why and what to do."""


def refuse_capabilities(role: str, precision: EnginePrecision, capabilities: Sequence[str]) -> None:
    """Refuses GPUs that have no arithmetic for an engine.

    Raises:
        ValueError: naming them.
    """
    least = _LEAST_CAPABILITY[precision]
    what = f"a {role} in {precision}"
    if role == "draft" and least < _LEAST_CAPABILITY_OF_A_DRAFT:
        least, what = _LEAST_CAPABILITY_OF_A_DRAFT, "a draft"
    if old := [each for each in capabilities if not _at_least(each, least)]:
        can = [p for p, needs in _LEAST_CAPABILITY.items() if all(_at_least(each, needs) for each in old)]
        instead = f", or the precision {' or '.join(can)}" if can and role == "target" else ""
        raise ValueError(
            f"compute capability {', '.join(old)} does not run {what}, which takes {least[0]}.{least[1]} or more: "
            f"choose another{instead}"
        )


def _at_least(capability: str, least: tuple[int, int]) -> bool:
    return tuple(map(int, capability.split("."))) >= least


@cache
def load_tensorrt(flavor: Flavor) -> ModuleType:
    """Imports one of the two.

    Raises:
        EngineBuildError: not installed, or its libraries are missing.
    """
    if flavor not in get_args(Flavor):
        raise EngineBuildError(f"flavor {flavor!r} is unknown; known: {', '.join(get_args(Flavor))}")
    try:
        trt = importlib.import_module(flavor)
    except ModuleNotFoundError as error:
        raise EngineBuildError(f"{flavor} is not installed", f"pip install {PACKAGES[flavor]}") from error
    except (ImportError, OSError) as error:
        raise EngineBuildError(
            f"{flavor} is installed and cannot be loaded ({error})", f"pip install {PACKAGES[flavor]}"
        ) from error
    if not hasattr(trt.INetworkDefinition, "add_kv_cache_update"):
        raise EngineBuildError(
            f"{flavor} {trt.__version__} is too old, it has no KV cache layer",
            f"pip install --upgrade {PACKAGES[flavor]}",
        )
    return trt


def data_type(trt: ModuleType, dtype: torch.dtype) -> Any:
    """TensorRT's name of a type."""
    name = str(dtype).removeprefix("torch.")
    return getattr(trt, {"float8_e4m3fn": "fp8"}.get(name, name))


def local_capability() -> str:
    """Compute capability of this machine's GPU."""
    import torch  # what only wants names here must not wait for it

    return ".".join(map(str, torch.cuda.get_device_capability()))


def logger(trt: ModuleType) -> Any:
    """A `trt.ILogger` that keeps errors in its attribute `errors`, for messages of ours; nothing is printed."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

        def last(self) -> str:
            """The latest error that is not about the GPU which this machine may lack."""
            told = [message for message in self.errors if "CUDA" not in message and "Cuda" not in message]
            return (told or self.errors or ["it gives no reason"])[-1]

    return Logger()
