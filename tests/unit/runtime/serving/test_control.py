"""Word between processes: it arrives, and what is no word does no harm."""

from __future__ import annotations

import itertools
import os
import queue
import socket
from collections.abc import Callable

import pytest

from ssv.runtime.serving.control import ControlReceiver, ControlSender, _address

# No process has these ids, and each test has its own: receivers live as long as the process.
_ids = itertools.count(10_000_000 + os.getpid() * 100)


class Heard:
    def __init__(self) -> None:
        self.pid, self.words = next(_ids), queue.Queue[str]()
        ControlReceiver(
            self.pid, self.words.put, lambda: self.words.put("drain"), lambda tier: self.words.put(f"reset {tier}")
        )

    def next(self) -> str:
        return self.words.get(timeout=60.0)


def test_words_arrive_in_order() -> None:
    heard = Heard()
    sender = ControlSender(heard.pid)
    sender.cancel("a")
    assert sender.drain()
    assert sender.reset("turbo")
    sender.cancel("b")
    assert [heard.next() for _ in range(4)] == ["a", "drain", "reset turbo", "b"]


def test_many_senders() -> None:
    heard = Heard()
    for i in range(5):
        ControlSender(heard.pid).cancel(str(i))
    assert [heard.next() for _ in range(5)] == ["0", "1", "2", "3", "4"]


def test_nobody_listens() -> None:
    sender = ControlSender(next(_ids))
    sender.cancel("a")
    assert not sender.drain()
    assert not sender.reset("turbo")


def test_a_sender_may_be_there_first() -> None:
    pid = next(_ids)
    sender, words = ControlSender(pid), queue.Queue[str]()
    assert not sender.drain()
    ControlReceiver(pid, words.put, lambda: words.put("drain"), words.put)
    assert sender.drain()
    assert words.get(timeout=60.0) == "drain"


def test_servers_do_not_hear_each_other() -> None:
    one, other = Heard(), Heard()
    ControlSender(one.pid).cancel("a")
    ControlSender(other.pid).cancel("b")
    assert (one.next(), other.next()) == ("a", "b")


def test_only_one_receiver_of_a_server() -> None:
    heard = Heard()
    with pytest.raises(OSError, match="in use"):
        ControlReceiver(heard.pid, heard.words.put, lambda: None, heard.words.put)


def test_words_that_mean_nothing_are_ignored() -> None:
    heard = Heard()
    ControlSender(heard.pid)._send({"other": 1})
    ControlSender(heard.pid).cancel("a")
    assert heard.next() == "a"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "data", [b"", b"nonsense", b"\xff", b"1", b"null", b'{"reset": 1}', b"[" * 4000, b'{"cancel": ' + b"1" * 5000]
)
def test_nonsense_does_not_end_the_receiver(data: bytes) -> None:
    """Any process of the machine can write to it; without it no cancellation is heard any more."""
    heard = Heard()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.sendto(data, _address(heard.pid))
    ControlSender(heard.pid).cancel("a")
    try:
        word = heard.words.get(timeout=60.0)
    except queue.Empty:
        pytest.fail("the receiver is gone")
    assert word == "a"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_a_callback_does_not_end_the_receiver() -> None:
    words: queue.Queue[str] = queue.Queue()

    def on_cancel(key: str) -> None:
        if key == "bad":
            raise RuntimeError(key)
        words.put(key)

    sender = _sender_to(on_cancel)
    sender.cancel("bad")
    sender.cancel("good")
    try:
        assert words.get(timeout=60.0) == "good"
    except queue.Empty:
        pytest.fail("the receiver is gone")


def _sender_to(on_cancel: Callable[[str], None]) -> ControlSender:
    pid = next(_ids)
    ControlReceiver(pid, on_cancel, lambda: None, on_cancel)
    return ControlSender(pid)
