"""Word from the other processes of a server to the one that decodes: that a client is gone, that no more requests are
wanted, and that an operator wants a tier in use again that was withdrawn.

Triton does not pass a client's cancellation on to the models inside an ensemble that run already, only to those that
come after: it is `postprocessing` that learns of it. Messages are datagrams on a Unix socket named after the server's
process; who may write to it is who may run processes on the machine.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

_MAX_BYTES = 4096


def _address(server_pid: int) -> str:
    return f"\0ssv-control-{server_pid}"


class ControlReceiver:
    """Calls back for each message, from a thread of its own."""

    def __init__(
        self,
        server_pid: int,
        on_cancel: Callable[[str], None],
        on_drain: Callable[[], None],
        on_reset: Callable[[str], None],
    ) -> None:
        self._on_cancel, self._on_drain, self._on_reset = on_cancel, on_drain, on_reset
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(_address(server_pid))
        threading.Thread(target=self._receive, name="ssv control", daemon=True).start()

    def _receive(self) -> None:
        while True:
            data = self._socket.recv(_MAX_BYTES)
            try:
                self._take(json.loads(data))
            except Exception:  # whatever came: those after it have to be heard
                log.exception("a control message was not understood, or failed")

    def _take(self, message: object) -> None:
        if not isinstance(message, dict):
            raise ValueError(f"{message!r} is no message")
        if isinstance(key := message.get("cancel"), str):
            self._on_cancel(key)
        elif isinstance(tier := message.get("reset"), str):
            self._on_reset(tier)
        elif "drain" in message:
            self._on_drain()


class ControlSender:
    """Sends messages; when nobody takes them, they are lost."""

    def __init__(self, server_pid: int) -> None:
        self._address = _address(server_pid)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def cancel(self, key: str) -> None:
        """Nobody waits for the answer with this key."""
        self._send({"cancel": key})

    def drain(self) -> bool:
        """No more requests are to be taken; returns whether somebody heard."""
        return self._send({"drain": True})

    def reset(self, tier: str) -> bool:
        """A tier is to be used again, and what was found of it forgotten; returns whether somebody heard."""
        return self._send({"reset": tier})

    def _send(self, message: dict[str, object]) -> bool:
        try:
            self._socket.sendto(json.dumps(message).encode(), self._address)
        except OSError:
            return False
        return True
