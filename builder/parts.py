"""Which parts of a bundle need not be made again: those whose sources are what they were.

A part is taken over from the run before, if that was interrupted or failed after finishing it, or from the bundle that
is there. Whether its sources are the same is judged by their content (`digest`s of files, settings that change the
result), never by a path.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ConfigDict, Field, ValidationError

from ssv.builder.staging import Stage
from ssv.bundle.manifest import (
    EngineEntry,
    FileEntry,
    Manifest,
    digest,
    engine_source,
    file_entry,
)
from ssv.support.files import write_json
from ssv.support.progress import notice
from ssv.support.strict import Strict

_PART_FILES = {
    "target": ("target/config.json", "target/model.safetensors", "tokenizer/"),
    "draft": ("draft/draft.safetensors",),
    "heads": ("heads.safetensors",),
    "scorer": ("scorer.safetensors", "scorer.json"),
    "ranges": ("activation_ranges.safetensors",),
    "calibration": ("calibration.json",),
}


class _Part(Strict):
    """A finished part: what it was made from, by SHA-256, its files, and its entry if it is an engine."""

    source: str
    files: dict[str, FileEntry]
    engine: EngineEntry | None = None


class _Record(Strict):
    model_config = ConfigDict(frozen=False)  # a part is added when it is finished

    parts: dict[str, _Part] = Field(default_factory=dict)


class Parts:
    """The parts of a bundle in the making.

    Attributes:
        sources: SHA-256 of what each part is made from.
        files: those of all parts, as the manifest lists them.
        engines: by name.
    """

    def __init__(self, stage: Stage, old: Manifest | None) -> None:
        self.stage, self.old = stage, old
        self.sources: dict[str, str] = {}
        self.files: dict[str, FileEntry] = {}
        self.engines: dict[str, EngineEntry] = {}
        self._record = self._whole_parts()
        known = {name for part in self._record.parts.values() for name in part.files}
        for path in sorted(stage.bundle.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(stage.bundle).as_posix() not in known:
                path.unlink()

    def reuse(self, part: str, *sources: object) -> bool:
        """Notes what a part is made from, and takes the part over if it was made from the same before.

        It is looked for in what the run before has left, and in the old bundle.

        Returns:
            Whether it was taken over.
        """
        return self._reuse(part, sources) is not None

    def reuse_engine(self, name: str, *sources: object) -> bool:
        """The same for an engine."""
        taken = self._reuse(_engine_part(name), sources)
        if taken is not None and taken.engine is not None:
            self.engines[name] = taken.engine
        return taken is not None

    def finish(self, part: str) -> None:
        """Notes that a part has been made: from now on it survives a failure of this run."""
        self._finish(
            part,
            [p for p in self.stage.bundle.rglob("*") if p.is_file() and self._name(p).startswith(_PART_FILES[part])],
        )

    def finish_engine(self, name: str, entry: EngineEntry) -> None:
        """The same for an engine."""
        self.engines[name] = entry
        self._finish(_engine_part(name), [self.stage.bundle / entry.file], entry)

    def carry_over_engines(self, manifest: Manifest, there: Manifest | None) -> None:
        """Takes over engines of the old bundle that the recipe does not name and whose weights are still the same.

        Args:
            manifest: of the bundle in the making.
            there: of the old bundle; None if there is none.
        """
        for name, entry in (there.engines if there is not None else {}).items():
            assert there is not None
            if name in self.engines:
                continue
            files = {entry.file: there.files[entry.file]}
            if entry.source != engine_source(manifest, entry.role):
                notice(
                    f"engine {name} was compiled from other weights than the bundle now has and is dropped: run "
                    "`ssv-build compile` again"
                )
            elif not self._are_whole(self.stage.out, files):
                notice(f"engine {name} is damaged and is dropped: run `ssv-build compile` again")
            else:
                self._link(files)
                self.engines[name] = entry

    def drop_unused(self) -> None:
        """Removes what the run before has finished and this one's recipe does not ask for."""
        for part in [name for name in self._record.parts if name not in self.sources]:
            self._forget(part)

    # --- how ----------------------------------------------------------------------------------------------------

    def _reuse(self, part: str, sources: Sequence[object]) -> _Part | None:
        source = self.sources[part] = digest(json.dumps(each, sort_keys=True, default=str) for each in sources)
        finished = self._record.parts.get(part)
        if finished is not None and finished.source == source:
            self.files |= finished.files
            return finished
        self._forget(part)
        taken = self._of_old(part, source)
        if taken is not None:
            self._link(taken.files)
        return taken

    def _of_old(self, part: str, source: str) -> _Part | None:
        old = self.old
        if old is None or old.sources.get(part) != source:
            return None
        engine = old.engines.get(part.removeprefix(_engine_part("")))
        if part in _PART_FILES:
            files = {name: entry for name, entry in old.files.items() if name.startswith(_PART_FILES[part])}
        elif engine is not None:
            files = {engine.file: old.files[engine.file]}
        else:
            return None
        return _Part(source=source, files=files, engine=engine) if self._are_whole(self.stage.out, files) else None

    def _finish(self, part: str, paths: Iterable[Path], entry: EngineEntry | None = None) -> None:
        files = {self._name(path): file_entry(path) for path in paths}
        self.files |= files
        self._record.parts[part] = _Part(source=self.sources[part], files=files, engine=entry)
        self._write_record()

    def _forget(self, part: str) -> None:
        finished = self._record.parts.pop(part, None)
        if finished is not None:
            self._write_record()
            for name in finished.files:
                (self.stage.bundle / name).unlink()

    def _whole_parts(self) -> _Record:
        """What the run before has recorded, without parts whose files are not as it left them."""
        try:
            record = _Record.model_validate_json(self.stage.record.read_text())
        except (OSError, ValidationError):
            return _Record()
        whole = {name: part for name, part in record.parts.items() if self._are_whole(self.stage.bundle, part.files)}
        return _Record(parts=whole)

    def _write_record(self) -> None:
        if self._record.parts:
            write_json(self.stage.record, self._record.model_dump(mode="json"))
        else:
            self.stage.record.unlink(missing_ok=True)

    def _are_whole(self, folder: Path, files: dict[str, FileEntry]) -> bool:
        return all((folder / name).is_file() and file_entry(folder / name) == entry for name, entry in files.items())

    def _link(self, files: dict[str, FileEntry]) -> None:
        for name in files:
            dest = self.stage.bundle / name
            dest.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.stage.out / name, dest)
            except OSError:  # a file system without links, or no right to link another user's file
                shutil.copyfile(self.stage.out / name, dest)
        self.files |= files

    def _name(self, path: Path) -> str:
        return path.relative_to(self.stage.bundle).as_posix()


def _engine_part(name: str) -> str:
    return f"engine {name}"
