"""Says on stderr what is being waited for, once that takes long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Say = Callable[[str], None]
"""Called with what is being done now, such as "checking target/model.safetensors"."""

_FIRST_SECONDS = 2.0
_SECONDS_BETWEEN = 5.0


@contextmanager
def waiting(what: str, first: float = _FIRST_SECONDS, between: float = _SECONDS_BETWEEN) -> Iterator[Say]:
    """Says on stderr, while the block runs, what is being done, and since when.

    The first line comes after `first` seconds, the others `between` seconds apart.

    Yields:
        What to call when something else is being done; calling it is optional.
    """
    current, over, start = [what], threading.Event(), time.monotonic()

    def tell() -> None:
        seconds = first
        while not over.wait(seconds):
            print(f"{current[0]} ({time.monotonic() - start:.0f} s so far)", file=sys.stderr, flush=True)
            seconds = between

    thread = threading.Thread(target=tell, name="ssv waiting", daemon=True)
    thread.start()
    try:
        yield lambda now: current.__setitem__(0, now)
    finally:
        over.set()
        thread.join()


def say_nothing(now: str) -> None:
    """A `Say` that tells nobody."""
