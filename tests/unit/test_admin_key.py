"""The key of the administrative protocols: where it comes from, and that nobody sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ssv.triton_repo.admin_key import AdminKeyError, admin_key, hide

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
