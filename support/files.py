"""Files that are written as a whole or not at all, and text that is read."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssv.support.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def part_of(path: Path) -> Path:
    """Where a file or a folder lies while it is being made."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place for a file or a folder in the making, which takes its own place when the block succeeds.

    If the block fails, what was made vanishes, and what was there stays. All of it is on the disk before it takes its
    place: after a power cut, too, the old one is there or the new one.

    Raises:
        OSError: it cannot be written, as on a full disk; naming `path`.
    """
    part = part_of(path)
    try:
        _remove(part)  # left by a process that was killed
        yield part
        for each in (*(part.rglob("*") if part.is_dir() else ()), part):
            sync(each)
        part.replace(path)
    except OSError as error:
        _remove(part)
        if error.errno is not None and error.filename in (None, str(part)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except BaseException:
        _remove(part)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file in one step, over the one that is there; text in UTF-8.

    Raises:
        OSError: see `whole`.
    """
    with whole(path) as part:
        if isinstance(content, str):
            part.write_text(content, encoding="utf-8")
        else:
            part.write_bytes(content)


def write_json(path: Path, document: Any) -> None:
    """Writes a document as JSON, in one step.

    Raises:
        OSError: see `whole`.
    """
    write_whole(path, json.dumps(document, indent=1) + "\n")


def save_whole(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file in one step, over the one that is there.

    Raises:
        OSError: see `whole`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # with torch, which not everybody who writes a file has

    with whole(path) as part:
        part.touch()
        mode = part.stat().st_mode
        try:
            save_file(tensors, part, metadata=metadata)
            part.chmod(mode)  # the library makes a file for its owner alone, and servers run as other users
        except SafetensorError as error:
            code = re.search(r"\(os error (\d+)\)", str(error))  # how the library says what the system said
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def read_text(path: Path) -> str:
    """A file's text, without the byte order mark that some editors put before it.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "give a file that is there") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})", "convert it, for example with iconv") from error


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: they cannot be.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
