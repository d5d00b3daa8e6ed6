"""The key of the administrative protocols: where it comes from, and that `ps` does not show it for longer than can be.

Arguments can be read by everybody on the machine. What is shown of them is memory of the process, which is overwritten
once they have been read: of ssv-serve itself, which sees a key among them when it has begun. (What tritonserver is
given is never shown: `unseen.py`.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from ssv.runtime.serving.log import log_event
from ssv.support.errors import UserError

log = logging.getLogger("ssv.serve")

VARIABLE = "SSV_ADMIN_KEY"

# Fields 48 and 49 of /proc/PID/stat (proc(5)), counted from what follows the command's name, which is the third.
_ARG_START, _ARG_END = 45, 46


class AdminKeyError(UserError):
    """The key cannot be used; the message says why, without it."""


def admin_key(option: str | None, file: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """NAME=VALUE of an option, a file or the environment; None if there is none.

    Raises:
        AdminKeyError: it is of another form, given twice, or in a file that cannot be read.
    """
    given: dict[str, str] = {}
    if option is not None:
        given["--admin-key"] = option
    if file is not None:
        try:
            given[f"--admin-key-file {file}"] = file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise AdminKeyError(
                f"--admin-key-file {file} cannot be read ({error})", "give a file with NAME=VALUE"
            ) from error
    if not given and environment.get(VARIABLE):
        given[VARIABLE] = environment[VARIABLE]
    if len(given) > 1:
        raise AdminKeyError(f"{' and '.join(given)} are both given", "give one of them")
    for source, key in given.items():
        name, _, value = key.partition("=")
        if not (name and value) or not key.isprintable() or any(c in ":;, " for c in key):
            raise AdminKeyError(f"{source} is no key", "give NAME=VALUE, printable, without blanks, colons and commas")
        return key
    return None


def hide_or_say(pid: int, secret: str) -> None:
    """Hides a text as `hide` does; where that cannot be done, the log says that it can be seen."""
    try:
        hide(pid, secret)
    except OSError as error:
        log_event(log, "the admin key can be seen in ps", level=logging.WARNING, pid=pid, error=error)


def hide(pid: int, secret: str) -> None:
    """Overwrites a text in the arguments that `ps` shows of a process of one's own.

    Args:
        pid: of a process that has read its arguments already.

    Raises:
        OSError: there is no such process, or its memory is not ours to write.
    """
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    start, end = int(stat[_ARG_START]), int(stat[_ARG_END])
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(start)
        shown, hidden = memory.read(end - start), secret.encode()
        at = shown.find(hidden)
        while at >= 0:
            memory.seek(start + at)
            memory.write(b"*" * len(hidden))
            at = shown.find(hidden, at + len(hidden))
