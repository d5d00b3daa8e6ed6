"""Long waits say what they wait for; short ones say nothing."""

from __future__ import annotations

import sys
import threading

import pytest

from ssv.support.waiting import waiting


class Written:
    """Stands for stderr; tells when something has been written."""

    def __init__(self) -> None:
        self.text, self.came = "", threading.Event()

    def write(self, text: str) -> None:
        self.text += text
        if "\n" in text:
            self.came.set()

    def flush(self) -> None:
        pass

    def next(self) -> str:
        assert self.came.wait(30.0)
        self.came.clear()
        return self.text


def test_what_is_done_now_is_said_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    written = Written()
    monkeypatch.setattr(sys, "stderr", written)
    with waiting("loading a bundle", first=0.001, between=0.001) as say:
        assert written.next().startswith("loading a bundle (0 s so far)\n")
        say("checking weights")
        written.next()
        assert "checking weights (" in written.next()
    assert not any(thread.name == "ssv waiting" for thread in threading.enumerate())


def test_what_is_short_or_fails_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("nothing"):
        pass
    with pytest.raises(ValueError, match="broken"), waiting("nothing"):
        raise ValueError("broken")
    assert not any(thread.name == "ssv waiting" for thread in threading.enumerate())
    assert capsys.readouterr().err == ""
