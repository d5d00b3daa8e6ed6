"""Which TensorRT-LLM this is for, and whether it is there. It is imported here, and in `drafter.py`, which its worker
processes import: nowhere before somebody asks for that engine."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from ssv.support.errors import UserError

OLDEST_READ, NEWEST_READ = "1.3.0rc26", "1.4.0rc4"
"""Versions whose published interface `drafter.py` and `engine.py` are written to: the reference pages of these and of
some between them, and for what has no page (drafters, and who calls them when) the sources on main in that time."""

VERSIONS = f">={OLDEST_READ},<1.5"
"""Versions that are taken. In older ones drafters that a user provides had other arguments, or shared their place with
engines' own. A 1.4 that is newer than `NEWEST_READ` is taken without having been read."""

INSTALL = f"pip install 'tensorrt-llm{VERSIONS}' --extra-index-url https://pypi.nvidia.com"


class TrtllmError(UserError):
    """TensorRT-LLM that cannot be used; the message says why, and which can."""


def installed_trtllm() -> str:
    """The version that is installed.

    Raises:
        TrtllmError: it is not installed, or another version.
    """
    from packaging.specifiers import SpecifierSet

    try:
        found = version("tensorrt-llm")
    except PackageNotFoundError as error:
        raise TrtllmError(f"TensorRT-LLM is not installed; this takes a version {VERSIONS}", INSTALL) from error
    if not SpecifierSet(VERSIONS).contains(found, prereleases=True):
        raise TrtllmError(f"TensorRT-LLM {found} is installed; this takes a version {VERSIONS}", INSTALL)
    return found


def load_trtllm() -> ModuleType:
    """Imports TensorRT-LLM.

    Raises:
        TrtllmError: it is not installed, is another version, or cannot be loaded.
    """
    found = installed_trtllm()
    try:
        module = importlib.import_module("tensorrt_llm")
    except (ImportError, OSError) as error:
        raise TrtllmError(f"TensorRT-LLM {found} is installed and cannot be loaded ({error})", INSTALL) from error
    if not hasattr(module, "LLM"):  # the package of that name on the public index has nothing in it
        raise TrtllmError(f"what is installed as TensorRT-LLM {found} is not the engine but a stand-in for it", INSTALL)
    return module
