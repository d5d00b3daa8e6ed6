"""What the command line tools share: errors as a person wants to read them, and options."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    except KeyboardInterrupt as error:
        ended = isinstance(error, _Terminated)
        print(f"error: {'terminated' if ended else 'interrupted'}", file=sys.stderr)
        return 128 + (signal.SIGTERM if ended else signal.SIGINT)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception that tidies up on its way as Ctrl-C does."""


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """In the block SIGTERM ends what runs in the way of Ctrl-C: what it has begun is tidied up, and its children end with it."""

    def end(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # only that one can have handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('ssv')}")


def add_precision(parser: argparse.ArgumentParser) -> None:
    choices = ["fp32", "bf16", "int8", "int4", "fp16", "fp8"]
    help = (
        "torch: fp32, bf16, int8, int4; tensorrt: that of a compiled engine "
        "(default: the bundle's on a CPU, bf16 on CUDA; with tensorrt, that of the only engine)"
    )
    parser.add_argument("--precision", choices=choices, help=help)


def add_engine(parser: argparse.ArgumentParser) -> None:
    help = "torch, or the bundle's compiled engines on this GPU (default: torch)"
    parser.add_argument("--engine", default="torch", choices=["torch", "tensorrt"], help=help)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to compute (default: cpu)")


def add_threads(parser: argparse.ArgumentParser) -> None:
    help = "of the torch engine on a CPU (default: as many as there are cores that nobody else uses)"
    parser.add_argument("--threads", type=positive, metavar="N", help=help)


def add_max_rows(parser: argparse.ArgumentParser, help: str, default: int = 8) -> None:
    parser.add_argument("--max-rows", type=positive, default=default, metavar="N", help=f"{help} (default: {default})")


def positive(text: str) -> int:
    """An option's number that counts something.

    Raises:
        argparse.ArgumentTypeError: not a whole number from 1 on.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return number


def require_device(device: str) -> None:
    """Refuses a device that this machine lacks.

    Raises:
        RuntimeError: naming it.
    """
    if not device.startswith("cuda"):
        return
    import torch  # commands that compute nothing must not wait for it

    if not torch.cuda.is_available():
        why = "no GPU was found" if torch.version.cuda else "this torch is built without CUDA"
        raise RuntimeError(f"CUDA is not available, {why}: use --device cpu")


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
