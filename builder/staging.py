"""A bundle in the making beside its place, and its exchange with the one that is there.

All that a run writes lies in one hidden folder beside the bundle, `.NAME.building`: the bundle in the making, the
record of its finished parts (`ssv.builder.parts`), quantized checkpoints. It is locked while the run lives. A run that
fails or is killed leaves it if parts have been finished; the next one takes those over and removes the rest.

The exchange is one step of the file system (Linux's renameat2). Where the file system does not have it there are two,
and between them the old bundle lies at `.NAME.retired`, from where the next run restores it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ssv.builder.place import bundle_at
from ssv.bundle.manifest import BundleError, locked_file, retired_place
from ssv.support.files import sync
from ssv.support.progress import notice

RECORD_NAME = "parts.json"
_BUNDLE, _LOCK, _QUANTIZED = "bundle", "lock", "quantized-"


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a bundle is being built.

    Attributes:
        out: its place, without links.
        work: the hidden folder.
    """

    out: Path
    work: Path

    @property
    def bundle(self) -> Path:
        """The bundle in the making."""
        return self.work / _BUNDLE

    @property
    def record(self) -> Path:
        """File that says which parts are finished."""
        return self.work / RECORD_NAME

    def quantized(self, name: str) -> Path:
        """Place of a quantized checkpoint that an engine is compiled from."""
        return self.work / f"{_QUANTIZED}{name}"

    @property
    def holds_finished(self) -> bool:
        """Whether parts are kept that need not be made again."""
        return self.record.exists() or any(self.work.glob(f"{_QUANTIZED}*"))


@contextmanager
def staging(out: Path) -> Iterator[Stage]:
    """A stage whose bundle takes the place `out` when the block succeeds.

    If the block fails, finished parts stay for the next run.

    Raises:
        BundleError: the place cannot be written, holds something else than a bundle, or another run is building it.
    """
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Stage(out, out.parent / f".{out.name}.building")
        lock = _lock(stage)
    except OSError as error:
        raise BundleError(f"{out.parent} cannot be written ({error.strerror})", "choose another folder") from error
    try:
        _tidy(stage)
        bundle_at(out)
        stage.bundle.mkdir(exist_ok=True)
        yield stage
        bundle_at(out)  # building may have taken hours, in which files of the user's came
        _make_durable(stage.bundle)
        exchange(stage.bundle, out)
        _clear(stage.work)
    finally:
        if stage.work.exists() and stage.holds_finished:
            notice(f"what has been finished is kept in {stage.work}, the same command goes on from there")
        else:
            _clear(stage.work)
        os.close(lock)


def exchange(new: Path, place: Path) -> None:
    """Puts a folder in a place; the folder that was there is afterwards at `new`, or gone.

    Whenever the process is killed a reader finds the one or the other, where the file system can exchange; see the
    module's head.
    """
    retired = retired_place(place)
    try:
        if not place.exists() or not any(place.iterdir()):
            new.rename(place)
        elif not _swap(new, place):
            try:
                place.rename(retired)
                new.rename(place)
            except BaseException:
                if not place.exists():
                    retired.rename(place)
                raise
            # Where it is certainly ours: deleted only in part it could not be told from a stranger's any more.
            retired.rename(new)
    except OSError as error:
        raise BundleError(f"{place} cannot be replaced ({error.strerror})", "choose another folder") from error
    sync(place.parent)


# --- the hidden folder ----------------------------------------------------------------------------------------------


def _lock(stage: Stage) -> int:
    """Descriptor of the folder's lock, held until it is closed or the process dies."""
    path = stage.work / _LOCK
    if stage.work.is_dir() and any(stage.work.iterdir()) and not path.exists():
        raise BundleError(
            f"{stage.work} is none of ours and in the way", "move it, or choose another folder for the bundle"
        )
    while True:
        stage.work.mkdir(exist_ok=True)
        try:
            return locked_file(path)
        except FileNotFoundError:
            continue  # a run that ends removed the folder
        except BlockingIOError as error:
            raise BundleError(
                f"another run is building {stage.out}", "choose another folder, or wait for it"
            ) from error


def _tidy(stage: Stage) -> None:
    """Restores a bundle that a killed exchange had set aside, and removes what dead runs have left.

    Finished parts stay.
    """
    for path in stage.work.iterdir():
        if path.name not in (_BUNDLE, _LOCK, RECORD_NAME) and not path.name.startswith(_QUANTIZED):
            _remove(path)
    retired = retired_place(stage.out)
    if bundle_at(retired) is not None:
        if bundle_at(stage.out) is not None:
            aside = stage.work / retired.name
            retired.rename(aside)
            _remove(aside)
        else:
            retired.rename(stage.out)  # an empty folder gives way
    # Earlier versions quantized beside the bundle, in folders that hold nothing else.
    for path in stage.out.parent.glob(f".{_QUANTIZED}*"):
        held = {each.name.strip(".").removesuffix(".part") for each in path.iterdir()} if path.is_dir() else set()
        if held and held <= {"target", "draft"}:
            _remove(path)


def _clear(work: Path) -> None:
    """Removes the hidden folder, what shows that it is ours last."""
    if not work.exists():
        return
    for path in work.iterdir():
        if path.name != _LOCK:
            _remove(path)
    shutil.rmtree(work, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# --- the file system ------------------------------------------------------------------------------------------------

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def _swap(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(error, os.strerror(error))


def _make_durable(bundle: Path) -> None:
    """Makes a bundle readable by other users and writes all of it to the disk.

    After that, a power cut that follows the exchange finds it whole.
    """
    mask = _umask()
    for path in [*bundle.rglob("*"), bundle]:
        if path.is_file():
            # Some files come from libraries that write them for their owner alone; a server runs as another user.
            path.chmod(path.stat().st_mode | 0o444 & ~mask)
        sync(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
