"""What is at the place of what is to be made: nothing, something that may be replaced, or something to leave alone."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ssv.bundle.manifest import MANIFEST_NAME, SCHEMA_VERSION, BundleError, Manifest, read_manifest
from ssv.support.files import part_of
from ssv.support.json_text import parse_json

# What `ssv-build compile` leaves in a bundle if it is killed: a plan in the making, or one that no manifest names yet.
_LEFT_BY_COMPILE = re.compile(r"(target|draft)/(\.(target|draft)-.*\.part|(target|draft)-.*-[0-9a-f]{12}\.engine)")
_OWN_FILES = (MANIFEST_NAME, part_of(Path(MANIFEST_NAME)).name)
# Keys that a manifest has had in every schema version.
_KEYS = {"schema_version", "name", "target", "draft", "eos_token_ids", "tiers", "files", "sources", "versions"}


def bundle_at(out: Path) -> Manifest | None:
    """The manifest of the bundle at a place, which a new one may replace.

    Its files are not hashed. A bundle is replaced only if nothing but what it consists of is deleted with it.

    Returns:
        None where there is nothing, or an empty folder.

    Raises:
        BundleError: anything else is there: a file, a folder that is no bundle for certain, a bundle of another schema,
            files in a bundle that its manifest does not list, a mount point. The message names it.
    """
    if not os.path.lexists(out):
        return None
    if not out.is_dir():
        raise BundleError(f"{out} exists and is not a folder", "choose another one")
    if out.is_mount():
        raise BundleError(f"{out} is a mount point and cannot be replaced as a whole", "choose a folder inside of it")
    try:
        if not any(out.iterdir()):
            return None
    except OSError as error:
        raise BundleError(f"{out} cannot be read ({error.strerror})", "choose another folder") from error
    if not (out / MANIFEST_NAME).is_file():
        raise BundleError(f"{out} exists and is not a bundle", "choose another folder")
    _refuse_strangers_manifest(out)
    try:
        manifest = read_manifest(out, verify=False)
    except BundleError as error:
        raise BundleError(
            f"{out} is left as it is, its manifest cannot be used ({error})",
            "choose another folder, or remove this one first",
        ) from error
    if foreign := _unlisted(out, manifest):
        named = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise BundleError(
            f"{out} holds files that its manifest does not list and that would be deleted ({named})",
            "choose another folder, or move them first",
        )
    return manifest


def check_file_place(out: Path, *beside: str) -> None:
    """Checks that a file can be written, before what takes long, and makes its folder.

    Args:
        out: its place, where another file may be.
        beside: endings of what is written beside it under the same name.

    Raises:
        BundleError: it cannot.
    """
    if out.is_dir():
        raise BundleError(f"{out} is a folder, and a file is to be written", f"name one in it, such as {out / 'made'}")
    if out.suffix in beside:
        raise BundleError(f"{out}: what ends in {out.suffix} is written beside it", "choose another name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(out.parent, os.W_OK)
    except OSError as error:
        raise BundleError(f"{out.parent} is no folder ({error.strerror})", "choose another place") from error
    if not writable:
        raise BundleError(f"{out.parent} cannot be written", "choose another place")


def _refuse_strangers_manifest(out: Path) -> None:
    """Refuses a manifest.json that is no bundle's: browser extensions, web sites and container images have one, too."""
    path = out / MANIFEST_NAME
    try:
        data = parse_json(path.read_text())
    except (ValueError, OSError) as error:
        raise BundleError(
            f"{out} holds a {MANIFEST_NAME} that cannot be read ({error})",
            "choose another folder, or remove this one if it was a bundle",
        ) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or not data.keys() >= _KEYS:
        raise BundleError(f"{out} holds a {MANIFEST_NAME} that is not a bundle's", "choose another folder")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{out} is a bundle of schema version {version}, this ssv writes {SCHEMA_VERSION} and can take nothing "
            "over from it",
            "choose another folder, or move this one first",
        )


def _unlisted(out: Path, manifest: Manifest) -> list[str]:
    """Files of the folder that are not the bundle's."""
    names = (
        (Path(folder) / name).relative_to(out).as_posix()
        for folder, folders, files in os.walk(out)
        for name in [*files, *(each for each in folders if (Path(folder) / each).is_symlink())]
    )
    return sorted(
        name
        for name in names
        if name not in manifest.files and name not in _OWN_FILES and not _LEFT_BY_COMPILE.fullmatch(name)
    )
