"""A bundle takes its place in one step.

Whatever interrupts that, the old one or the new one is there, and the next run finishes.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import pytest
import staged
from staged import Countdown, fill, publish

from ssv.builder import staging as module
from ssv.builder.place import bundle_at
from ssv.builder.staging import exchange, staging
from ssv.bundle.manifest import (
    BundleError,
    read_manifest,
    retired_place,
)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A place with a bundle."""
    fill(tmp_path / "bundle", "old")
    return tmp_path / "bundle"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_new_bundle_takes_the_place_of_the_old_one(
    out: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(module, "_swap", lambda *_: False)
    publish(out, "new")
    assert read_manifest(out).name == "new"
    publish(out.with_name("first"), "first")
    assert read_manifest(out.with_name("first")).name == "first"
    assert hidden(out.parent) == []


def test_this_file_system_exchanges_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fill(tmp_path / name, name)
    assert module._swap(tmp_path / "one", tmp_path / "two")
    assert [read_manifest(tmp_path / name).name for name in ("one", "two")] == ["two", "one"]


# --- kills ----------------------------------------------------------------------------------------------------------

KilledAt = Callable[[int, Path, bool], bool]


@pytest.fixture(scope="module")
def killed_at() -> Iterator[KilledAt]:
    """`staged.killed_at`, in a process that has no threads."""
    with subprocess.Popen([sys.executable, staged.__file__], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        ask, answers = process.stdin, process.stdout

        def killed(n: int, out: Path, can_exchange: bool) -> bool:
            print(json.dumps([n, str(out), can_exchange]), file=ask, flush=True)
            return bool(json.loads(answers.readline()))

        yield killed


@pytest.mark.parametrize("can_exchange", [True, False])
def test_killed_at_any_step_the_old_or_the_new_bundle_is_there(
    tmp_path: Path, killed_at: KilledAt, can_exchange: bool
) -> None:
    steps, found = 0, set()
    while True:
        out = tmp_path / str(steps) / "bundle"
        fill(out, "old")
        if not killed_at(steps + 1, out, can_exchange):
            break
        steps += 1
        if can_exchange or out.exists():
            found.add(read_manifest(out).name)
        else:
            with pytest.raises(BundleError, match=r"was being replaced .*lies at .*\.bundle\.retired: run the same"):
                read_manifest(out)
            with pytest.raises(RuntimeError, match="no disk"), staging(out):
                assert read_manifest(out).name == "old"  # restored
                raise RuntimeError("no disk")
            found.add("set aside")
        publish(out, "newest")
        assert read_manifest(out).name == "newest"
        assert hidden(out.parent) == []
    assert steps >= 20
    assert found == ({"old", "new"} if can_exchange else {"old", "new", "set aside"})


@pytest.mark.parametrize("can_exchange", [True, False])
def test_interrupted_at_any_step_the_old_or_the_new_bundle_is_there(tmp_path: Path, can_exchange: bool) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    steps, ended = 0, False
    while not ended:
        out = tmp_path / str(steps) / "bundle"
        fill(out, "old")
        steps += 1
        with pytest.MonkeyPatch.context() as patch:
            Countdown(steps, interrupt).watch(patch, can_exchange)
            try:
                publish(out, "new")
                ended = True
            except KeyboardInterrupt:
                pass
        assert read_manifest(out).name in ("old", "new")
        publish(out, "newest")
        assert hidden(out.parent) == []
    assert steps >= 20


def test_a_live_run_is_left_alone_and_a_dead_ones_rest_is_removed(out: Path) -> None:
    with staging(out) as stage:
        fill(stage.bundle, "new")
        with pytest.raises(BundleError, match=rf"another run is building {out}: "), staging(out):
            pass
        assert read_manifest(stage.bundle).name == "new"
    dead = out.parent / ".bundle.building"
    (dead / "bundle" / "target").mkdir(parents=True)
    (dead / "draft").mkdir()
    (dead / "lock").touch()  # what every run makes first and removes last
    (out.parent / ".quantized-x1" / "target").mkdir(parents=True)
    (out.parent / ".quantized-mine").mkdir()
    (out.parent / ".quantized-mine" / "notes.txt").write_text("")
    publish(out, "newest")
    assert hidden(out.parent) == [".quantized-mine"]


def test_a_file_system_without_locks_builds_all_the_same(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(module.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    publish(out, "new")
    assert read_manifest(out).name == "new"


def test_a_bundle_behind_a_link_is_replaced_where_it_lies(out: Path) -> None:
    link = out.with_name("link")
    link.symlink_to(out)
    publish(link, "new")
    assert link.is_symlink() and read_manifest(out).name == "new"


def test_a_failed_exchange_leaves_the_old_one(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = out.with_name("new")
    fill(new, "new")
    rename = Path.rename

    def fails(self: Path, place: Path) -> Path:
        if self == new:
            raise OSError(28, "No space left on device")
        return rename(self, place)

    monkeypatch.setattr(module, "_swap", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(BundleError, match="cannot be replaced"):
        exchange(new, out)
    assert read_manifest(out).name == "old"


# --- what may be replaced -------------------------------------------------------------------------------------------

EXTENSION = {"manifest_version": 3, "name": "Tabs", "version": "1.2"}
IMAGE = {"schemaVersion": 2, "config": {}, "layers": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(EXTENSION), "manifest.json that is not a bundle's: choose another folder"),
        (json.dumps(IMAGE), "is not a bundle's"),
        (json.dumps({"schema_version": 2, "name": "x", "files": {}}), "is not a bundle's"),
        ("[]", "is not a bundle's"),
        ("{", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_a_strangers_folder_is_left_alone(tmp_path: Path, content: str, message: str) -> None:
    out = tmp_path / "folder"
    out.mkdir()
    (out / "manifest.json").write_text(content)
    (out / "background.js").write_text("mine")
    with pytest.raises(BundleError, match=message):
        publish(out, "new")
    assert (out / "manifest.json").read_text() == content
    assert (out / "background.js").read_text() == "mine"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("version", [1, 3])
def test_a_bundle_of_another_schema_is_left_alone(out: Path, version: int) -> None:
    path = out / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": version}))
    before = path.read_text()
    with pytest.raises(
        BundleError, match=rf"schema version {version}, this ssv writes 2 .*: choose another folder, or"
    ):
        publish(out, "new")
    assert path.read_text() == before


@pytest.mark.parametrize("name", ["notes.txt", "target/notes.txt", "target/target-mine.engine", ".env", "link"])
def test_files_that_are_not_the_bundles_are_named_and_left_alone(out: Path, name: str) -> None:
    if name == "link":
        (out / name).symlink_to(out.parent)
    else:
        (out / name).write_text("mine")
    with pytest.raises(BundleError, match=rf"would be deleted \({name}\): choose another folder, or move them first"):
        publish(out, "new")
    assert (out / name).exists() and read_manifest(out).name == "old"


def test_a_file_that_came_while_building_is_left_alone(out: Path) -> None:
    with pytest.raises(BundleError, match=r"notes\.txt"), staging(out) as stage:
        fill(stage.bundle, "new")
        (out / "notes.txt").write_text("mine")
    assert (out / "notes.txt").read_text() == "mine" and read_manifest(out).name == "old"


def test_what_a_killed_compile_left_is_the_bundles(out: Path) -> None:
    for name in ("target/target-fp16-tensorrt_rtx-8.9-0123456789ab.engine", "target/.target-fp16-x.part"):
        (out / name).write_text("")
    assert bundle_at(out) is not None


def test_a_file_a_link_to_nowhere_and_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError, match="is not a folder"):
        publish(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    publish(tmp_path / "empty", "new")
    (tmp_path / "link").symlink_to(tmp_path / "later")
    publish(tmp_path / "link", "new")
    assert read_manifest(tmp_path / "later").name == read_manifest(tmp_path / "empty").name == "new"
    shutil.rmtree(tmp_path / "empty")


def test_a_bundle_set_aside_is_put_back_over_an_empty_folder(tmp_path: Path) -> None:
    """It is the only one there is, and the build may fail."""
    out = tmp_path / "bundle"
    fill(retired_place(out), "old")
    out.mkdir()
    with pytest.raises(RuntimeError, match="fails"), staging(out):
        raise RuntimeError("the build fails")
    assert bundle_at(out) is not None
    assert not retired_place(out).exists()


@pytest.mark.parametrize("name", [".bundle.retired", ".bundle.building"])
def test_hidden_folders_of_others_are_left_alone(name: str, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    fill(out, "old")
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="bundle"), staging(out):
        pytest.fail("it began to build")
    assert (tmp_path / name / "notes.txt").read_text() == "mine"
    assert bundle_at(out) is not None
