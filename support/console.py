"""What the command line tools share: errors as a person wants to read them, and options."""

from __future__ import annotations

import argparse
import errno
import math
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

from ssv.support.errors import UserError, is_out_of_memory
from ssv.support.precisions import ENGINE_PRECISIONS, TORCH_PRECISIONS


def run_command(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit status; errors go to stderr.

    What the user can mend ends as `error:` and, where there is something to do, `hint:`, with status 2. That is a
    `UserError`, what the operating system refuses (a file, a device, memory), and a package that is not installed.
    Everything else is a bug: its traceback is shown, with a line that asks for a report, and the status is 1.
    """
    try:
        return command()
    except Exception as error:
        mendable = _mendable(error)
        if mendable is None:
            traceback.print_exc()
            print(
                f"error: this is a bug in ssv {version('ssv')}: please report it, with all of the above",
                file=sys.stderr,
            )
            return 1
        print(f"error: {mendable.what}", file=sys.stderr)
        if mendable.cure:
            print(f"hint: {mendable.cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        ended = isinstance(error, _Terminated)
        print(f"error: {'terminated' if ended else 'interrupted'}", file=sys.stderr)
        return 128 + (signal.SIGTERM if ended else signal.SIGINT)


# What only a mistake of ours makes the operating system say: a file descriptor or an address that is none, a child that
# is not there.
_BUGS = frozenset((errno.EBADF, errno.EFAULT, errno.ECHILD, errno.ESRCH))


def _mendable(error: Exception) -> UserError | None:
    """What a user can do about an exception; None if it is a bug."""
    match error:
        case UserError():
            return error
        case _ if is_out_of_memory(error):
            wanted = re.search(r"[Tt]ried to allocate [\d.]+ \w+", str(error))
            what = "out of memory" + (f" ({wanted.group().lower()})" if wanted else "")
            return UserError(what, "use a smaller batch or length, or a machine with more memory")
        case OSError() if error.errno is not None and error.errno not in _BUGS:
            what = error.strerror or str(error)
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = what if error.filename is None else f"{error.filename}: {what}"
            return UserError(what, "choose a place with more room" if is_full else "")
        case ModuleNotFoundError() if error.name is not None and error.name.partition(".")[0] != "ssv":
            return UserError(f"{error.name} is not installed", "install ssv with the extra that brings it, or ssv[all]")
    return None


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception that tidies up on its way as Ctrl-C does."""


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """While the block runs, SIGTERM ends it as Ctrl-C does.

    What it has begun is tidied up, and its children end with it.
    """

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
    """Adds `--version`."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('ssv')}")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Adds `--precision`."""
    choices = tuple(dict.fromkeys((*TORCH_PRECISIONS, *ENGINE_PRECISIONS)))
    help = (
        f"torch: {', '.join(TORCH_PRECISIONS)}; tensorrt: that of a compiled engine "
        "(default: the bundle's on a CPU, bf16 on CUDA; with tensorrt, that of the only engine)"
    )
    parser.add_argument("--precision", choices=choices, help=help)


def add_engine(parser: argparse.ArgumentParser, *, hosted: bool = False) -> None:
    """Adds `--engine`.

    Args:
        hosted: whether TensorRT-LLM is a choice too.
    """
    help = "torch, or the bundle's compiled engines on this GPU"
    help += ", or TensorRT-LLM on one or several (default: torch)" if hosted else " (default: torch)"
    choices = ["torch", "tensorrt", *(["tensorrt_llm"] if hosted else [])]
    parser.add_argument("--engine", default="torch", choices=choices, help=help)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to compute (default: cpu)")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Adds `--threads`."""
    help = "of the torch engine on a CPU (default: as many as there are cores that nobody else uses)"
    parser.add_argument("--threads", type=positive, metavar="N", help=help)


def add_max_rows(parser: argparse.ArgumentParser, help: str, default: int = 8) -> None:
    """Adds `--max-rows`, with what it means for the command."""
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


def positive_number(text: str) -> float:
    """An option's number that measures something.

    Raises:
        argparse.ArgumentTypeError: not a finite number above 0.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def require_device(device: str) -> None:
    """Refuses a device that this machine lacks.

    Raises:
        UserError: naming it.
    """
    if not device.startswith("cuda"):
        return
    import torch  # commands that compute nothing must not wait for it

    if not torch.cuda.is_available():
        why = "no GPU was found" if torch.version.cuda else "this torch is built without CUDA"
        raise UserError(f"CUDA is not available, {why}", "use --device cpu")
