"""Scripts and other files outside the package, as modules that tests can call."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def loaded(path: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> ModuleType:
    """A file as a module of its own, run anew.

    Args:
        monkeypatch: to have it found by its name until the test ends, as what looks itself up there needs it.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if monkeypatch is not None:
        monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module
