"""Drafts that a recipe gives instead of having one made: ours, EAGLE-3 heads as published, whole language models."""

from __future__ import annotations

import shutil
from pathlib import Path

from ssv.builder.config import DraftConfig, RecipeError
from ssv.builder.target import Target
from ssv.builder.tokenizer import check_same_tokens
from ssv.model.checkpoint import checkpoint_files, load_checkpoint, refuse_pickle
from ssv.model.draft import DraftSpec, StoredDraft, is_ours, load_draft, write_draft
from ssv.model.eagle3 import read_eagle3
from ssv.model.standalone import standalone_draft


def check_given(config: DraftConfig, target: Target) -> DraftSpec:
    """Reads a given draft and checks it against its target; returns what it is.

    Raises:
        RecipeError, CheckpointError: it is no draft for this target.
    """
    if (file := config.file) is not None and _is_ours(file):
        return load_draft(file, target.decoder).spec
    return _read(config, target).spec


def given_files(config: DraftConfig) -> list[Path]:
    """The files that a given draft is made of.

    Raises:
        CheckpointError: see `checkpoint_files`.
    """
    if (file := config.file) is not None:
        return [file] if _is_ours(file) else [file, file.with_name("config.json")]
    path = config.folder or config.checkpoint
    assert path is not None
    return checkpoint_files(path)


def made_as(config: DraftConfig) -> Path | None:
    """The given file that a bundle's draft will be a copy of; None where it is made of others' files."""
    return config.file if config.file is not None and _is_ours(config.file) else None


def write_given(config: DraftConfig, target: Target, path: Path) -> None:
    """Writes a given draft as a bundle's.

    Raises:
        RecipeError, CheckpointError: see `check_given`.
    """
    if (file := made_as(config)) is not None:
        shutil.copyfile(file, path)
    else:
        made = _read(config, target)
        write_draft(made.spec, made.state, path)


def _is_ours(file: Path) -> bool:
    refuse_pickle(file)
    if is_ours(file):
        return True
    if not file.with_name("config.json").is_file():
        raise RecipeError(
            f"draft.file: {file} is not a draft of ours, and has no config.json beside it, as a published head has",
            "give one that `ssv-build distill` wrote, or the head's folder as `draft.folder`",
        )
    return False


def _read(config: DraftConfig, target: Target) -> StoredDraft:
    if config.checkpoint is None:
        path = config.file or config.folder
        assert path is not None
        return read_eagle3(path, target.decoder)
    spec, weights = load_checkpoint(config.checkpoint)
    check_same_tokens(config.checkpoint, spec.vocab_size, target.tokenizer, target.spec.vocab_size)
    return standalone_draft(spec, weights, target.spec)
