"""Bundles that take their place, and runs that end in the middle of that.

As a program it runs some that are killed: each in a fork of its own, which a process of tests must not have, since its
threads may hold what the fork then waits for. A line of stdin is [step at which it is killed, the bundle's place,
whether folders can be exchanged], and a line of stdout whether it came so far.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssv.builder import staging as module
from ssv.builder.staging import staging
from ssv.bundle.manifest import Manifest, TierEntry, file_entry, write_manifest
from ssv.bundle.policy import Policy


def fill(folder: Path, name: str) -> None:
    """A bundle of two files that say its name."""
    (folder / "target").mkdir(parents=True, exist_ok=True)
    for file in ("target/weights", "scorer"):
        (folder / file).write_text(f"{name} {file}")
    policy = Policy(accept_below=0.0, verify_above=0.5, risk_budget=0.9, max_pending=8)
    manifest = Manifest(
        name=name,
        target={},
        draft={},
        eos_token_ids=[0],
        default_precision="int8",
        tiers={"premium": TierEntry(policy=policy, lossless=True)},
        files={file: file_entry(folder / file) for file in ("target/weights", "scorer")},
        sources={},
        versions={},
    )
    write_manifest(folder, manifest)


def publish(out: Path, name: str) -> None:
    with staging(out) as stage:
        fill(stage.bundle, name)


STEPS = ((os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (os, "fsync"), (module, "_swap"))


class Countdown:
    """Ends the process, or raises, before or after the n-th call that changes folders."""

    def __init__(self, n: int, end: Callable[[], None]) -> None:
        self.left, self.end = n, end

    def watch(self, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
        for owner, name in STEPS:
            real: Callable[..., Any] = getattr(owner, name)
            if name == "_swap" and not can_exchange:
                real = lambda *_: False  # noqa: E731
            monkeypatch.setattr(owner, name, self.counted(real))

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.tick()
            result = real(*args, **options)
            self.tick()
            return result

        return call

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.end()


def killed_at(n: int, out: Path, can_exchange: bool) -> bool:
    """Whether a run came to its n-th step, where it was killed as by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            end = Countdown(n, lambda: os.kill(os.getpid(), signal.SIGKILL))
            end.watch(pytest.MonkeyPatch(), can_exchange)
            publish(out, "new")
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        step, place, exchanges = json.loads(line)
        print(json.dumps(killed_at(step, Path(place), exchanges)), flush=True)
