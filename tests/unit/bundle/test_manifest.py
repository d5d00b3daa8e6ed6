"""Manifests: what is written is read, and nothing is used that does not fit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ssv.bundle import manifest as module
from ssv.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    BundleError,
    FileEntry,
    Manifest,
    TierEntry,
    file_entry,
    read_manifest,
    verify_files,
    write_manifest,
)
from ssv.bundle.policy import Policy, verify_all

PREMIUM = Policy(accept_below=0.0, verify_above=0.5, risk_budget=0.9, max_pending=8)
TURBO = Policy(accept_below=0.1, verify_above=0.9, risk_budget=0.99, max_pending=16)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of two files."""
    folder = tmp_path / "bundle"
    (folder / "target").mkdir(parents=True)
    (folder / "target" / "weights.bin").write_bytes(b"weights")
    (folder / "scorer.bin").write_bytes(b"")
    write_manifest(folder, manifest_of(folder, "target/weights.bin", "scorer.bin"))
    return folder


def manifest_of(folder: Path, *names: str) -> Manifest:
    return Manifest(
        name="tiny",
        target={"vocab_size": 12, "rope_scaling": None},
        draft={"layers": [1, 2]},
        eos_token_ids=[0, 2],
        default_precision="int8",
        tiers={
            "premium": TierEntry(policy=PREMIUM, lossless=True),
            "turbo": TierEntry(policy=TURBO, lossless=False, divergence=0.03, divergence_bound=0.041),
        },
        files={name: file_entry(folder / name) for name in names},
        sources={"target": "ab" * 32},
        versions={"torch": "2.0", "é": "ü"},
    )


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / MANIFEST_NAME
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_round_trip(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest == manifest_of(bundle, "target/weights.bin", "scorer.bin")
    assert manifest.schema_version == SCHEMA_VERSION
    assert manifest.policies == {"premium": PREMIUM, "turbo": TURBO}
    write_manifest(bundle, manifest)
    assert read_manifest(bundle) == manifest
    assert sorted(path.name for path in bundle.iterdir()) == [MANIFEST_NAME, "scorer.bin", "target"]


def test_methods_of_its_own(bundle: Path) -> None:
    own = verify_all(12, drafter="suffix", longest_match=9)
    rewrite(bundle, lambda data: data.update(methods={"suffix": own.model_dump(mode="json")}))
    manifest = read_manifest(bundle)
    assert manifest.methods == {"suffix": own}
    assert manifest.policies == {"suffix": own, "premium": PREMIUM, "turbo": TURBO}


def test_only_tiers_trust(bundle: Path) -> None:
    rewrite(bundle, lambda data: data.update(methods={"eagle": TURBO.model_dump(mode="json")}))
    with pytest.raises(BundleError, match=r"methods\.eagle trusts tokens, and only tiers have a bound on that"):
        read_manifest(bundle)


def test_file_entry(bundle: Path) -> None:
    entry = file_entry(bundle / "target" / "weights.bin")
    assert entry == FileEntry(size=7, sha256=hashlib.sha256(b"weights").hexdigest())


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=rf"{tmp_path} is not a bundle \(no manifest.json\).*ssv-build"):
        read_manifest(tmp_path)
    with pytest.raises(BundleError, match="not a bundle"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema_version": 1', b"\xff\xfe\x00", b'{"schema_version": 1,}'])
def test_damaged_json(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest.json is damaged .*build the bundle again"):
        read_manifest(bundle)


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_other_schema_version_names_both(bundle: Path, version: object) -> None:
    rewrite(bundle, lambda data: data.update(schema_version=version))
    with pytest.raises(BundleError, match=f"schema version {version}, this ssv reads {SCHEMA_VERSION}"):
        read_manifest(bundle, verify=False)


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '"text"'])
def test_json_that_is_no_manifest(bundle: Path, content: str) -> None:
    (bundle / MANIFEST_NAME).write_text(content)
    with pytest.raises(BundleError, match=f"schema version None, this ssv reads {SCHEMA_VERSION}"):
        read_manifest(bundle)


def test_newer_version_is_refused_for_its_version_not_for_its_keys(bundle: Path) -> None:
    rewrite(bundle, lambda data: (data.update(schema_version=3, engines={}), data.pop("files")))
    with pytest.raises(BundleError, match="schema version 3"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda data: data.update(colour="red"), "colour: Extra inputs"),
        (lambda data: data["tiers"]["turbo"].update(speed=3), "tiers.turbo.speed: Extra inputs"),
        (lambda data: data["tiers"]["turbo"]["policy"].update(rsk_budget=0.3), "tiers.turbo.policy.rsk_budget: Extra"),
        (lambda data: data["files"]["scorer.bin"].update(mode=1), "files.scorer.bin.mode: Extra inputs"),
        (lambda data: data.pop("eos_token_ids"), "eos_token_ids: Field required"),
        (lambda data: data.update(eos_token_ids=[]), "eos_token_ids: "),
        (lambda data: data.update(default_precision="fp64"), "default_precision: "),
        (lambda data: data["files"]["scorer.bin"].update(sha256="XYZ"), "files.scorer.bin.sha256: "),
        (lambda data: data["tiers"]["turbo"]["policy"].update(accept_below=1.5), "tiers.turbo.policy.accept_below: "),
    ],
)
def test_damaged_manifest_names_the_key(bundle: Path, change: Callable[[dict[str, Any]], object], where: str) -> None:
    rewrite(bundle, change)
    with pytest.raises(BundleError) as caught:
        read_manifest(bundle)
    assert where in str(caught.value)
    assert "is damaged" in str(caught.value)


def test_changed_file(bundle: Path) -> None:
    (bundle / "target" / "weights.bin").write_bytes(b"weighty")
    with pytest.raises(BundleError, match=r"target/weights.bin does not match the manifest \(another SHA-256\)"):
        read_manifest(bundle)
    (bundle / "target" / "weights.bin").write_bytes(b"weight")
    with pytest.raises(BundleError, match="size 6, expected 7"):
        read_manifest(bundle)
    assert read_manifest(bundle, verify=False).name == "tiny"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that have been hashed."""
    names: list[str] = []

    def entry(path: Path) -> FileEntry:
        names.append(path.name)
        return file_entry(path)

    monkeypatch.setattr(module, "file_entry", entry)
    return names


def test_what_one_process_has_checked_another_does_not_hash_again(bundle: Path, hashed: list[str]) -> None:
    manifest = read_manifest(bundle, verify=False)
    assert not hashed
    verified = verify_files(bundle, manifest)
    assert hashed == ["weights.bin", "scorer.bin"]
    handed_on = json.loads(json.dumps(verified))
    assert verify_files(bundle, manifest, verified=handed_on) == verified
    assert len(hashed) == 2


def _rewrite_in_place(path: Path) -> None:
    times = path.stat()
    while path.stat().st_ctime_ns == times.st_ctime_ns:  # a file system's clock may tick every few milliseconds
        path.write_bytes(b"weighty")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p and rsync leave it


def _put_another_there(path: Path) -> None:
    times = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"weighty")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)


def _link_to_another(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"weighty")
    path.unlink()
    path.symlink_to(other)


@pytest.mark.parametrize("change", [_rewrite_in_place, _put_another_there, _link_to_another])
def test_a_change_since_it_was_checked_is_noticed(bundle: Path, change: Callable[[Path], None]) -> None:
    manifest = read_manifest(bundle, verify=False)
    verified = verify_files(bundle, manifest)
    change(bundle / "target" / "weights.bin")
    with pytest.raises(BundleError, match=r"does not match the manifest \(another SHA-256\)"):
        verify_files(bundle, manifest, verified=verified)


def test_a_manifest_that_expects_something_else_is_checked(bundle: Path, hashed: list[str]) -> None:
    verified = verify_files(bundle, read_manifest(bundle, verify=False))
    rewrite(bundle, lambda data: data["files"]["target/weights.bin"].update(sha256="ab" * 32))
    with pytest.raises(BundleError, match="another SHA-256"):
        verify_files(bundle, read_manifest(bundle, verify=False), verified=verified)


def test_files_that_are_not_used_are_not_hashed_but_have_to_be_there(bundle: Path, hashed: list[str]) -> None:
    manifest = read_manifest(bundle, verify=False)
    said: list[str] = []
    verified = verify_files(bundle, manifest, unused={"target/weights.bin"}, say=said.append)
    assert hashed == ["scorer.bin"] and len(said) == 1 and "scorer.bin" in said[0]
    assert verified.keys() == {"scorer.bin"}, "nobody may trust what was not hashed"
    (bundle / "target" / "weights.bin").write_bytes(b"short")
    with pytest.raises(BundleError, match="size 5, expected 7"):
        verify_files(bundle, manifest, unused={"target/weights.bin"})


def test_missing_file(bundle: Path) -> None:
    (bundle / "scorer.bin").unlink()
    with pytest.raises(BundleError, match=r"lacks scorer\.bin"):
        read_manifest(bundle)


@pytest.mark.parametrize("name", ["../secret", "target/../../secret", "{absolute}"])
def test_path_outside_the_bundle(bundle: Path, name: str) -> None:
    secret = bundle.parent / "secret"
    secret.write_text("x")
    name = name.format(absolute=secret)
    entry = file_entry(secret).model_dump()
    rewrite(bundle, lambda data: data["files"].update({name: entry}))
    with pytest.raises(BundleError, match="outside the bundle"):
        read_manifest(bundle)


def test_link_out_of_the_bundle(bundle: Path) -> None:
    secret = bundle.parent / "secret"
    secret.write_text("x")
    (bundle / "link").symlink_to(secret)
    entry = file_entry(secret).model_dump()
    rewrite(bundle, lambda data: data["files"].update(link=entry))
    with pytest.raises(BundleError, match="outside the bundle"):
        read_manifest(bundle)


def test_bundle_behind_a_link_and_a_relative_path(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle.parent / "link").symlink_to(bundle)
    assert read_manifest(bundle.parent / "link").name == "tiny"
    monkeypatch.chdir(bundle)
    assert read_manifest(Path()).name == "tiny"


def test_folder_where_a_file_should_be(bundle: Path) -> None:
    (bundle / "scorer.bin").unlink()
    (bundle / "scorer.bin").mkdir()
    with pytest.raises(BundleError, match=r"lacks scorer\.bin"):
        read_manifest(bundle)


def test_manifest_is_replaced_in_one_step(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that dies half-way leaves the old one."""
    before = (bundle / MANIFEST_NAME).read_text()

    def fail(path: Path, text: str, *args: object, **kwargs: object) -> int:
        with path.open("w") as file:
            file.write(text[:20])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="disk full"):
            write_manifest(bundle, manifest_of(bundle))
    assert (bundle / MANIFEST_NAME).read_text() == before


def test_manifest_cannot_be_changed(bundle: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read_manifest(bundle).name = "other"  # type: ignore[misc]


def test_tier_that_calls_itself_lossless_and_trusts_tokens(bundle: Path) -> None:
    rewrite(bundle, lambda data: data["tiers"]["turbo"].update(lossless=True))
    with pytest.raises(BundleError, match=r"tiers\.turbo"):
        read_manifest(bundle)
