"""Files are there as a whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ssv.support import files
from ssv.support.errors import UserError
from ssv.support.files import read_text, save_whole, whole, write_json, write_whole

WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_whole(path, "new é"),
    "bytes": lambda path: write_whole(path, b"new \xff"),
    "json": lambda path: write_json(path, {"new": [1]}),
    "tensors": lambda path: save_whole({"new": torch.ones(2)}, path),
}
NEW = {"text": "new é".encode(), "bytes": b"new \xff", "json": b'{\n "new": [\n  1\n ]\n}\n'}


@pytest.fixture(params=list(WRITERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_file_takes_the_place_of_the_old_one(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    WRITERS[kind](path)
    assert list(tmp_path.iterdir()) == [path]
    if kind == "tensors":
        assert torch.equal(load_file(path)["new"], torch.ones(2))
    else:
        assert path.read_bytes() == NEW[kind]


@pytest.mark.parametrize("step", ["sync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=repr)
def test_what_fails_leaves_the_old_file_and_nothing_else(
    kind: str, step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        if step == "sync":
            patch.setattr(files, "sync", fails)
        else:
            patch.setattr(Path, "replace", fails)
        with pytest.raises(type(error)) as raised:
            WRITERS[kind](path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"
    if isinstance(raised.value, OSError):  # of the file that was to be written, not of its part
        assert raised.value.filename == str(path)


def test_tensors_are_for_whom_other_files_are(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save_whole({"new": torch.ones(2)}, tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_it_is_on_the_disk_before_it_takes_its_place(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, replace = files.sync, Path.replace

    def noted_sync(path: Path) -> None:
        steps.append(f"sync {path.name}")
        sync(path)

    def noted_replace(path: Path, target: Path) -> Path:
        steps.append(f"replace {target.name}")
        return replace(path, target)

    monkeypatch.setattr(files, "sync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    WRITERS[kind](tmp_path / "file")
    assert steps == ["sync .file.part", "replace file"]


def test_a_folder_takes_its_place_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (tmp_path / ".folder.part").mkdir()
    (tmp_path / ".folder.part" / "left").write_text("by a process that was killed")
    with whole(path) as part:
        part.mkdir()
        (part / "a").write_text("a")
        assert not path.exists()
    assert [each.name for each in tmp_path.rglob("*")] == ["folder", "a"]

    def half(place: Path) -> None:
        with whole(place) as part:
            part.mkdir()
            (part / "a").write_text("a")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        half(tmp_path / "other")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_is_not_there_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "none" / "file"
    with pytest.raises(OSError, match="No such file or directory") as raised:
        WRITERS[kind](path)
    assert raised.value.filename == str(path)


def test_what_is_no_error_of_the_system_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: some bug")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(SafetensorError, match="some bug"):
        save_whole({}, tmp_path / "file")


def test_text_may_begin_with_a_byte_order_mark_and_must_be_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbf\xc3\xa9\r\n")
    assert read_text(path) == "é\n"
    path.write_bytes(b"a\xe9")
    with pytest.raises(UserError, match=r"text is not UTF-8 \(byte 1\): convert it"):
        read_text(path)
    with pytest.raises(UserError, match=r"none cannot be read \(No such file or directory\): give a file"):
        read_text(tmp_path / "none")
