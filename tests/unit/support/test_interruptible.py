"""Waiting ends by a signal also where nothing wakes the main thread for it."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ssv.support import interruptible
from ssv.support.background import begun

LONG = 60.0


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What a thread waits for that has nothing to do until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def interrupt_unseen() -> None:
    """Another thread takes the signal once this one sleeps: as where it comes right before that, nothing wakes it."""

    def take() -> None:
        time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=take, daemon=True).start()


def sleeping(released: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=released.wait, args=(LONG,), daemon=True)
    thread.start()
    return thread


WAITS: dict[str, Callable[[threading.Event], object]] = {
    "for a thread": lambda released: interruptible.join(sleeping(released)),
    "for an item": lambda released: interruptible.get(queue.Queue()),
    "for an item, not for ever": lambda released: interruptible.get(queue.Queue(), LONG),
    "for the time": lambda released: interruptible.sleep(LONG),
    "for work in the background": lambda released: begun(lambda: released.wait(LONG))(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_a_signal_that_wakes_nobody_ends_a_wait(
    wait: Callable[[threading.Event], object], released: threading.Event
) -> None:
    began = time.monotonic()
    interrupt_unseen()
    with pytest.raises(KeyboardInterrupt):
        wait(released)
    assert time.monotonic() - began < LONG / 2


def test_a_thread_that_ends_is_waited_for_no_longer(released: threading.Event) -> None:
    thread = sleeping(released)
    released.set()
    interruptible.join(thread)
    assert not thread.is_alive()


@pytest.mark.parametrize("patience", [None, 0.0, LONG])
def test_an_item_that_is_there_is_got(patience: float | None) -> None:
    items = queue.Queue[int]()
    items.put(7)
    assert interruptible.get(items, patience) == 7


def test_patience_and_sleep_are_as_long_as_they_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruptible, "SLICE_SECONDS", 0.01)
    for wait in (lambda: interruptible.sleep(0.025), lambda: interruptible.get(queue.Queue(), 0.025)):
        began = time.monotonic()
        with contextlib.suppress(queue.Empty):
            wait()
        assert time.monotonic() - began >= 0.025


def test_nothing_comes_in_time() -> None:
    for patience in (0.0, -1.0, 0.001):
        with pytest.raises(queue.Empty):
            interruptible.get(queue.Queue(), patience)
