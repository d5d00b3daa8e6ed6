"""What the command line tools share: errors as a person wants to read them, and options.

May import: nothing else of ssv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import version


def run_command(command: Callable[[], int]) -> int:
    """Runs a command; what the user can mend ends as `error:` and, where the message says how, `hint:` on stderr, exit code 2.

    Our errors end in ": what to do" where there is something to do.
    """
    try:
        return command()
    except (ValueError, OSError, RuntimeError) as error:
        what, _, cure = str(error).rpartition(": ") if _has_cure(str(error)) else (str(error), "", "")
        print(f"error: {what}", file=sys.stderr)
        if cure:
            print(f"hint: {cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('ssv')}")


def add_precision(parser: argparse.ArgumentParser) -> None:
    choices = ["fp32", "bf16", "int8", "int4", "fp16", "fp8"]
    help = "torch: fp32, bf16, int8, int4 (default: the bundle's on a CPU, bf16 on CUDA); tensorrt: that of a compiled engine"
    parser.add_argument("--precision", choices=choices, help=help)


def add_engine(parser: argparse.ArgumentParser) -> None:
    help = "torch, or the bundle's compiled engines on this GPU (default: torch)"
    parser.add_argument("--engine", default="torch", choices=["torch", "tensorrt"], help=help)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to compute (default: cpu)")


def add_threads(parser: argparse.ArgumentParser) -> None:
    help = "of the torch engine on a CPU (default: as many as there are cores that nobody else uses)"
    parser.add_argument("--threads", type=int, metavar="N", help=help)


_CURES = (
    "build",
    "choose",
    "run ",
    "make one",
    "use ",
    "shorten",
    "calibrate",
    "distill",
    "pip ",
    "convert",
    "add ",
    "give ",
)


def _has_cure(message: str) -> bool:
    return message.rpartition(": ")[2].startswith(_CURES)
