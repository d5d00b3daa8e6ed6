"""The compiled stages by themselves: under sanitizers, and for aarch64, whose programs qemu runs.

Debian's packages gcc-aarch64-linux-gnu and qemu-user bring what is wanted; without them the tests of aarch64 are
skipped.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

PATIENCE = 600.0
"""Seconds after which something hangs."""

ROOT = Path(__file__).parents[4]
ENGINES = ROOT / "runtime/engines"
SUPPORT = ROOT / "tests/support"
LINEAR = [SUPPORT / "linear_check.c", *(ENGINES / f"_linear_{part}.c" for part in ("any", "x86", "arm"))]
CREW = [SUPPORT / "crew_stress.c", ENGINES / "_crew.c"]
ROUNDING = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
ARM_GCC, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
needs_arm_gcc = pytest.mark.skipif(shutil.which(ARM_GCC) is None, reason="apt-get install gcc-aarch64-linux-gnu")
needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason="apt-get install qemu-user")


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of this machine's processors, and the hash of all that they gave."""
    program = tmp_path_factory.mktemp("own") / "linear_check"
    run("gcc", *SANITIZERS, *ROUNDING, *LINEAR, "-o", program, "-lm")
    return run(program).split()


@needs_gcc
def test_random_shapes_under_sanitizers(own: list[str]) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer end the program with an error; so does a differing product."""
    *names, hash_of_all = own
    assert names[-1] == "any" and len(hash_of_all) == 16


@needs_gcc
@needs_arm_gcc
@needs_qemu
def test_aarch64_gives_the_same_bits(own: list[str], tmp_path: Path) -> None:
    program = tmp_path / "linear_check"
    run(ARM_GCC, "-O3", "-static", *ROUNDING, *LINEAR, "-o", program, "-lm")
    with_dot = run(QEMU, "-cpu", "cortex-a76", program).split()
    without = run(QEMU, "-cpu", "cortex-a53", program).split()
    assert with_dot == ["neon_dot", "any", own[-1]]
    assert without == ["any", own[-1]]


@needs_arm_gcc
@needs_qemu
def test_threads_on_aarch64(tmp_path: Path) -> None:
    program = tmp_path / "crew_stress"
    run(ARM_GCC, "-O2", "-static", *CREW, "-o", program, "-lpthread")
    assert "every stage of every step was done once" in run(QEMU, program)


@needs_arm_gcc
@pytest.mark.parametrize("source", sorted(ROOT.glob("runtime/**/_*.c")), ids=lambda path: path.name)
def test_it_compiles_for_aarch64_without_a_warning(source: Path, tmp_path: Path) -> None:
    headers = sysconfig.get_paths()["include"]
    warnings = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror")
    run(ARM_GCC, "-O3", "-fPIC", *ROUNDING, *warnings, f"-I{headers}", "-c", source, "-o", tmp_path / "compiled.o")
