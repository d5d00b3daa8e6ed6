"""The key of the administrative protocols: where it comes from, and that nobody sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ssv.triton_repo import unseen
from ssv.triton_repo.admin_key import AdminKeyError, admin_key, hide
from ssv.triton_repo.bound import NOT_TRACED
from ssv.triton_repo.unseen import start_bound

SECRET = "ssv-admin=s3cret"


def shown(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def test_the_arguments_of_a_process_are_hidden_and_not_changed_for_it() -> None:
    program = "import sys; print('read', flush=True); input(); print(sys.argv[1:])"
    arguments = [f"--http={SECRET}", "--other", f"--grpc={SECRET}"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "read\n"
        assert shown(process.pid).count(SECRET) == 2
        hide(process.pid, SECRET)
        after = shown(process.pid)
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stdout.read() == f"{arguments}\n"
    stars = "*" * len(SECRET)
    assert after.endswith(f"--http={stars} --other --grpc={stars} ")
    assert "s3cret" not in after


def test_a_process_hides_its_own() -> None:
    program = (
        "import os, sys; from ssv.triton_repo.admin_key import hide; hide(os.getpid(), sys.argv[1]); "
        "print(open('/proc/self/cmdline').read(), sys.argv[1])"
    )
    out = subprocess.run([sys.executable, "-c", program, SECRET], capture_output=True, text=True, check=True).stdout
    assert out.count(SECRET) == 1 and out.endswith(f" {SECRET}\n")


def test_a_process_that_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(OSError):
        hide(process.pid, SECRET)


def test_where_the_key_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{SECRET}\n")
    assert admin_key(None, None, {}) is None
    assert admin_key(None, None, {"SSV_ADMIN_KEY": ""}) is None
    assert admin_key(SECRET, None, {}) == SECRET
    assert admin_key(None, file, {}) == SECRET
    assert admin_key(None, None, {"SSV_ADMIN_KEY": SECRET}) == SECRET
    assert admin_key("a=b=c", None, {"SSV_ADMIN_KEY": SECRET}) == "a=b=c"


@pytest.mark.parametrize("key", ["x", "=x", "x=", "", "a=b c", "a:b=c", "a=b,c", "a=b\nc", "a=\x7f"])
def test_a_key_that_is_none_is_refused_and_not_shown(key: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(key)
    with pytest.raises(AdminKeyError, match="--admin-key is no key: give NAME=VALUE"):
        admin_key(key, None, {})
    with pytest.raises(AdminKeyError, match=r"--admin-key-file .* is no key"):
        admin_key(None, file, {})
    with pytest.raises(AdminKeyError, match="both given"):
        admin_key(SECRET, file, {})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AdminKeyError, match="cannot be read"):
        admin_key(None, tmp_path / "nowhere", {})


# What a program is given and nobody sees

TELL = "import json, os, sys; print(json.dumps([sys.argv[1:], list(os.environ)])); sys.stdout.flush(); input()"


def started(
    monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> tuple[subprocess.Popen[bytes], bool, list[str], list[list[str]]]:
    """A program that tells what it was given; whether that is hidden; what was shown of it, twice; what it told."""
    read, write = os.pipe()
    with os.fdopen(read) as told:
        monkeypatch.setattr(unseen, "_start", partial(popen, stdin=subprocess.PIPE, stdout=write))
        process, is_hidden = start_bound(command, SECRET, dict(os.environ))
        os.close(write)
        before = shown(process.pid)
        found = json.loads(told.readline())
        return process, is_hidden, [before, shown(process.pid)], found


def popen(command: list[str], environment: dict[str, str], stderr: int | None, **pipes: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment, stderr=stderr, **pipes)


@pytest.mark.parametrize("is_script", [False, True])
def test_a_program_has_arguments_that_are_never_shown(
    is_script: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = [sys.executable, "-c", TELL]
    if is_script:
        script = tmp_path / "script"
        script.write_text(f"#!{sys.executable}\n{TELL}\n")
        script.chmod(0o755)
        program = [str(script)]
    arguments = ["--models=a", f"--http=x:{SECRET}", "--häß lich=", f"--grpc={SECRET}"]
    process, is_hidden, seen, (found, variables) = started(monkeypatch, [*program, *arguments])
    process.communicate(b"\n")
    assert is_hidden and process.returncode == 0
    assert found == arguments
    stars = "*" * len(SECRET)
    assert all(f"--models=a --http=x:{stars} --häß lich= --grpc={stars} " in text for text in seen), seen
    assert not any("s3cret" in text for text in seen)
    assert not [name for name in variables if "ARGUMENT" in name], "it hands it on to nobody"
    assert set(variables) >= {name for name in os.environ if name != "_"}


def test_where_nothing_may_be_traced_the_program_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(command: list[str], *rest: Any) -> subprocess.Popen[bytes]:
        if "traced" in command:
            return subprocess.Popen([sys.executable, "-c", f"import sys; sys.exit({NOT_TRACED})"])
        return subprocess.Popen(command)

    monkeypatch.setattr(unseen, "_start", refusing)
    process, is_hidden = start_bound([sys.executable, "-c", "", SECRET], SECRET, {})
    assert not is_hidden and process.wait() == 0


def test_a_program_that_cannot_be_started(capfd: pytest.CaptureFixture[str]) -> None:
    process, _ = start_bound(["/nowhere", SECRET], SECRET, {})
    assert process.wait() == 1
    assert "s3cret" not in capfd.readouterr().err
