"""What a command says of an exception: what the user can mend apart from bugs."""

from __future__ import annotations

import errno
import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from ssv.support.console import run_command
from ssv.support.errors import UserError


class RecipeOfSoup(UserError):
    """Stands for a domain's own error."""


def ended(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Status and lines of a command that raises this."""

    def command() -> int:
        raise error

    status = run_command(command)
    return status, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("kind", [UserError, RecipeOfSoup])
def test_what_and_cure_are_said_apart(kind: type[UserError], capsys: pytest.CaptureFixture[str]) -> None:
    said = ["error: soup: it is cold", "hint: warm it: slowly"]
    assert ended(kind("soup: it is cold", "warm it: slowly"), capsys) == (2, said)
    assert ended(kind("there is no soup: none"), capsys) == (2, ["error: there is no soup: none"])


def test_as_text_a_cure_follows_what_is_wrong() -> None:
    error = RecipeOfSoup("it is cold", "warm it")
    assert (str(error), error.what, error.cure) == ("it is cold: warm it", "it is cold", "warm it")
    assert str(RecipeOfSoup("it is cold")) == "it is cold"


@pytest.mark.parametrize(
    "code", [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOSPC, errno.EROFS, errno.EIO, errno.ECONNREFUSED]
)
def test_what_the_system_refuses_is_no_bug(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    why = os.strerror(code)
    hint = ["hint: choose a place with more room"] if code == errno.ENOSPC else []
    assert ended(OSError(code, why, "a/file"), capsys) == (2, [f"error: a/file: {why}", *hint])
    assert ended(OSError(code, why), capsys) == (2, [f"error: {why}", *hint])


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nothing"
    assert run_command(lambda: len(path.read_bytes())) == 2
    assert capsys.readouterr().err == f"error: {path}: No such file or directory\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 1 GiB"),
    ],
)
def test_too_little_memory_is_no_bug(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    status, (what, hint) = ended(error, capsys)
    assert status == 2
    assert what == "error: out of memory" + (" (tried to allocate 2.00 gib)" if "2.00" in str(error) else "")
    assert hint.startswith("hint: use a smaller batch")


def test_too_little_memory_of_a_cpu_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: len(torch.empty(2**48, dtype=torch.int64))) == 2
    assert "error: out of memory (tried to allocate 2251799813685248 bytes)" in capsys.readouterr().err


def test_a_package_that_is_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        import a_package_that_nobody_has  # type: ignore[import-not-found]

        return len(a_package_that_nobody_has.__name__)

    assert run_command(command) == 2
    assert capsys.readouterr().err.startswith("error: a_package_that_nobody_has is not installed\nhint: install ssv")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a value: use another"),
        RuntimeError("shapes differ: choose others"),
        KeyError("premium"),
        OSError("raised by hand"),
        OSError(errno.EBADF, os.strerror(errno.EBADF)),
        ModuleNotFoundError("No module named 'ssv.nothing'", name="ssv.nothing"),
        AssertionError(),
    ],
    ids=repr,
)
def test_everything_else_is_a_bug_with_its_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = ended(error, capsys)
    assert status == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert any("raise error" in line for line in lines)
    assert lines[-1] == f"error: this is a bug in ssv {version('ssv')}: please report it, with all of the above"


def test_an_interruption_is_neither(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(KeyboardInterrupt(), capsys) == (130, ["error: interrupted"])
