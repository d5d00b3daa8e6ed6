"""What a number was measured on, and the record that says so."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ssv.support.files import write_whole


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, memory in GiB, and GPU if that is what runs."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if not device.startswith("cpu"):
        import torch

        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def cpu_model() -> str:
    """The CPU's name, "unknown" where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of packages, "-" for those not installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "-"
    return found


def commit() -> str:
    """Commit of the checkout that the code runs from, with "+changes" if it differs; "unknown" outside of one."""
    root = Path(__file__).resolve().parent
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_record(figures: dict[str, Any], out: Path | None, packages: dict[str, str], device: str = "cpu") -> None:
    """Prints a benchmark's figures with command, machine, versions, commit and date.

    They are also written to a file if one is given.
    """
    record = {
        **figures,
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(device),
        "versions": packages,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    text = json.dumps(record, indent=1)
    print(text)
    if out is not None:
        write_whole(out, text + "\n")


def _git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
