"""Keys of those who may ask the OpenAI API: from a file or the environment.

There is no option for a key itself, which `ps` would show to everybody on the machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ssv.support.errors import UserError

VARIABLE = "SSV_API_KEY"


class AccessKeyError(UserError):
    """Keys that cannot be used; the message says why, without them."""


def access_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys of a file, one a line, or else the one of the environment; none where anybody may ask.

    Raises:
        AccessKeyError: the file cannot be read, has none, or has what no client could send.
    """
    if file is None:
        keys, source = [environment[VARIABLE]] if environment.get(VARIABLE) else [], VARIABLE
    else:
        source = f"--api-key-file {file}"
        try:
            keys = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise AccessKeyError(f"{source} cannot be read ({error})", "give a file with a key a line") from error
        if not keys:
            raise AccessKeyError(f"{source} has no key", "give a file with a key a line")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise AccessKeyError(f"{source} has a key that no client can send", "give printable ASCII without blanks")
    return tuple(keys)
