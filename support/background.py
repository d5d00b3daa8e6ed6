"""Work that another thread does meanwhile, as hashing files, which takes a core of its own and no interpreter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from ssv.support.interruptible import join

T = TypeVar("T")


def begun(work: Callable[[], T]) -> Callable[[], T]:
    """Begins work in a thread, which does not keep the process from ending.

    Returns:
        What waits for the work and gives its result, or raises what it raised; to be called as often as one likes.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # whatever it is, it is raised where the result is asked for
            errors.append(error)

    thread = threading.Thread(target=run, name="ssv background", daemon=True)
    thread.start()

    def finished() -> T:
        join(thread)
        if errors:
            raise errors[0]
        return results[0]

    return finished
