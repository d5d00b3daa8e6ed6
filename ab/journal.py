"""Append-only JSON lines that a crash in mid-line does not spoil."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ssv.support.errors import UserError
from ssv.support.json_text import parse_json


class Journal:
    """Writes records; each is on its way to the disk before `append` returns, whatever becomes of the process."""

    def __init__(self, path: Path) -> None:
        """Opens a journal, or goes on with one that is there.

        Raises:
            OSError: the file cannot be written.
        """
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # a line that a crash has cut must not take the next one with it
        self._is_torn = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Raises OSError: the disk is full, or gone."""
        # One write, but for a disk that is nearly full: lines of several threads do not mix. Of a line that did not
        # fit, the part that did must not take the next one with it.
        data = (b"\n" if self._is_torn else b"") + json.dumps(record, separators=(",", ":")).encode() + b"\n"
        while data:
            written = os.write(self._file, data)
            data = data[written:]
            self._is_torn = bool(data)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class JournalReader:
    """Reads what has come since the last time.

    Attributes:
        torn: lines so far that were no JSON object: what a crash has cut.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.torn = 0

    def read(self) -> list[dict[str, Any]]:
        """Records of whole lines; one that is still being written is left for the next time.

        Raises:
            OSError: there is no such file.
            UserError: the file has become shorter: it is not the same any more.
        """
        with self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:
                raise UserError(f"{self._path} has become shorter while it was read", "run the command anew")
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        return self._records(data[:end])

    def rest(self) -> list[dict[str, Any]]:
        """What comes after the last line's end: a record whose line was cut right before it, or a torn line."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        return self._records(data)

    def _records(self, data: bytes) -> list[dict[str, Any]]:
        records = []
        for line in data.split(b"\n"):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                self.torn += 1
        return records
