"""Compiles an engine in a process of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from ssv.builder.config import EngineConfig
from ssv.bundle.tensorrt_api import EngineBuildError

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def compile_apart(bundle: Path, config: EngineConfig) -> None:
    """Compiles an engine in a process of its own, which does not outlive this one.

    That process has none of this one's weights in memory, and it shows its progress itself.

    Raises:
        EngineBuildError: the engine was not compiled; that process has said why.
    """
    options = {
        "role": config.role,
        "precision": config.precision,
        "checkpoint": config.checkpoint,
        "flavor": config.flavor,
        "compute-capability": ",".join(config.compute_capability),
        "max-rows": config.max_rows,
        "max-length": config.max_length,
        "max-pending": config.max_pending,
        "prefill-chunk": config.prefill_chunk,
        "plugins": config.plugins,
        "bundle": bundle,
    }
    words = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "ssv.builder.cli", "compile", *words]
    parent = os.getpid()
    # `run` ends the child when it is interrupted; killed, this process can do nothing, and the system does it.
    done = subprocess.run(  # noqa: S603
        command,
        stdout=subprocess.DEVNULL,
        check=False,
        preexec_fn=lambda: _die_with(parent),
    )
    if done.returncode:
        raise EngineBuildError(
            f"the {config.role} engine in {config.precision} was not compiled, its error stands above"
        )


def _die_with(parent: int) -> None:
    """In the child, before it is another program: has the system kill it when its parent dies."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that
            os._exit(1)
