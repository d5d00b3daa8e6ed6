"""Where tritonserver is, and what it needs to run Python models: the one of nvidia-pytriton, or another."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from ssv.support.errors import UserError


class InstallationError(UserError):
    """No usable tritonserver; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Installation:
    """A tritonserver, and how it is started.

    Attributes:
        binary: tritonserver.
        arguments: that it always needs.
        environment: variables to set for it.
    """

    binary: Path
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def given(binary: Path) -> Installation:
    """A tritonserver that brings its own backends along, as NVIDIA's container does.

    Raises:
        InstallationError: it is not there or cannot be executed.
    """
    found = shutil.which(binary)
    if found is None:
        raise InstallationError(f"{binary} is no program that can be run", "give the path of tritonserver")
    return Installation(Path(found), environment=_python_environment())


def bundled(work: Path) -> Installation:
    """The tritonserver inside nvidia-pytriton, with its Python backend set up for this Python in a folder of ours.

    Raises:
        InstallationError: nvidia-pytriton is not installed, or has no stub for this Python.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise InstallationError(
            "no tritonserver", "pip install 'ssv[serve]' brings one, or give --tritonserver the path of another"
        )
    root = Path(spec.origin).parent / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        has = ", ".join(sorted(path.name for path in stub.parent.parent.iterdir()))
        raise InstallationError(f"nvidia-pytriton has no stub for Python {version}, only for {has}", "use one of these")
    backend = work / "backends" / "python"
    backend.mkdir(parents=True)
    for path in (stub, *(root / "backends" / "python").iterdir()):
        (backend / path.name).symlink_to(path)
    # The stub links to libpython, the server to libraries that its wheel keeps beside the package.
    libraries = [sysconfig.get_config_var("LIBDIR"), str(root.parent.parent / "nvidia_pytriton.libs")]
    libraries += [os.environ["LD_LIBRARY_PATH"]] if os.environ.get("LD_LIBRARY_PATH") else []
    return Installation(
        root / "bin" / "tritonserver",
        [f"--backend-directory={backend.parent}"],
        _python_environment() | {"LD_LIBRARY_PATH": ":".join(libraries)},
    )


def _python_environment() -> dict[str, str]:
    """The stub starts a Python of its own, which finds the packages of the environment that it is told, by these."""
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    in_venv = {"VIRTUAL_ENV": sys.prefix} if sys.prefix != sys.base_prefix else {}
    return {**in_venv, "PATH": path, "PYTHONUNBUFFERED": "1"}
