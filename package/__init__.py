"""Sparse Speculative Verification: build, decode, serve and measure draft/target pairs.

    from ssv import LLM, Request, SamplingParams

What stands here is loaded when it is asked for: `import ssv` loads nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssv.bundle.policy import Policy
    from ssv.runtime.llm import LLM
    from ssv.runtime.request import Chunk, Output, Request, RequestError, SamplingParams

_HOMES = {
    "LLM": "ssv.runtime.llm",
    "Chunk": "ssv.runtime.request",
    "Output": "ssv.runtime.request",
    "Policy": "ssv.bundle.policy",
    "Request": "ssv.runtime.request",
    "RequestError": "ssv.runtime.request",
    "SamplingParams": "ssv.runtime.request",
}

__all__ = ["LLM", "Chunk", "Output", "Policy", "Request", "RequestError", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
