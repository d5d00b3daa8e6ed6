"""`ssv-build kernels`: a bundle's kernels as files, in a process of its own that compiles them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bundle import build, write_recipe

from ssv.bundle.manifest import read_manifest


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("kernels")
    build(write_recipe(base), base / "bundle")
    return base / "bundle"


def ssv_build(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", "ssv.builder.cli", "kernels", *map(str, words)]
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)


def test_kernels_are_for_the_models_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    done = ssv_build(
        "--bundle", bundle, "--compute-capability", "8.9,12.0", "--dtype", "float16", "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    written = sorted(Path(line).relative_to(tmp_path / "out").as_posix() for line in done.stdout.splitlines())
    ops = ("draft/score", "draft/sparse_gather", "target/sparse_gather")
    expected = [f"{op}-sm_{sm}.ptx" for op in ops for sm in ("120", "89")]
    assert written == expected
    manifest = read_manifest(bundle)
    facts = json.loads((tmp_path / "out" / "draft" / "score-sm_89.json").read_text())
    assert facts["constants"]["VOCAB"] == manifest.draft["head_size"]
    assert facts["constants"]["HIDDEN"] == manifest.draft["decoder"]["hidden_size"]
    assert facts["arguments"][1] == {"name": "logits", "kind": "input", "type": "float16"}
    facts = json.loads((tmp_path / "out" / "target" / "sparse_gather-sm_120.json").read_text())
    assert facts["constants"]["HIDDEN"] == manifest.target["hidden_size"]
    assert ".target sm_120a" in (tmp_path / "out" / "target" / "sparse_gather-sm_120.ptx").read_text()


def test_nothing_is_written_if_one_cannot_be_compiled(bundle: Path, tmp_path: Path) -> None:
    done = ssv_build("--bundle", bundle, "--compute-capability", "8.9,99.9", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "error: sparse_gather: compute capability: expected one of 7.5, " in done.stderr
    assert not (tmp_path / "out").exists()


def test_interpreted_kernels_are_refused(bundle: Path, tmp_path: Path) -> None:
    done = ssv_build("--bundle", bundle, "--compute-capability", "8.9", "--out", tmp_path / "out", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr
