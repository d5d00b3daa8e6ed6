"""The CUDA kernels compile for every GPU that they are written for, without one."""

from __future__ import annotations

import pytest

from ssv.plugins.cuda.compiler import CAPABILITIES, CompileError, compile_source, source_of

ONE = {"BLOCKS": 1, "SEVERAL": 0, "CHANNELS": 1, "HOLDS": 0}
SEVERAL = {"BLOCKS": 2, "SEVERAL": 1, "CHANNELS": 1, "HOLDS": 0}
WIDE = {"TILES": 4, "THREADS": 256, "BLOCKS": 1, "SEVERAL": 1, "CHANNELS": 2, "HOLDS": 0}
PARTS: dict[str, dict[str, int]] = {
    "products of 8 tokens": {"TILES": 1, "BITS": 16, "AHEAD": 4, "THREADS": 512} | ONE,
    "products of 32 tokens": {"TILES": 4, "BITS": 16, "AHEAD": 4, "THREADS": 384} | ONE,
    "products of 64 tokens that are held": {"TILES": 8, "BITS": 16, "AHEAD": 4, "THREADS": 256}
    | SEVERAL
    | {"BLOCKS": 1, "HOLDS": 1},
    "FP8": {"TILES": 1, "BITS": 8, "AHEAD": 8, "THREADS": 256} | SEVERAL,
    "INT4": {"TILES": 1, "BITS": 4, "AHEAD": 8, "GROUP_PAIRS": 1, "THREADS": 256} | SEVERAL,
    "two tiles of channels at once": {"BITS": 16, "AHEAD": 4} | WIDE,
    "the same of FP8": {"BITS": 8, "AHEAD": 8} | WIDE,
    "the same of INT4": {"BITS": 4, "AHEAD": 4, "GROUP_PAIRS": 4} | WIDE,
    "one group of heads": {"HEAD_DIM": 64, "GROUP": 3, "QK_NORM": 0},
}


@pytest.mark.parametrize("part", ["products of 8 tokens", "FP8", "INT4"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability(capability: str, part: str) -> None:
    cubin = compile_source(source_of("decoder"), capability, PARTS[part])
    assert cubin[:4] == b"\x7fELF"
    assert all(name in cubin for name in (b"store", b"add", b"gate"))


@pytest.mark.parametrize(
    "macros",
    [*PARTS.values(), {"HEAD_DIM": 128, "GROUP": 4, "QK_NORM": 1}, {"HEAD_DIM": 80, "GROUP": 1, "QK_NORM": 0}],
    ids=str,
)
def test_every_part(macros: dict[str, int]) -> None:
    assert compile_source(source_of("decoder"), "9.0", macros)[:4] == b"\x7fELF"


STAGES = {"STAGES": 5, "STAGE_PAIRS": 2}
MANY: dict[str, dict[str, int]] = {
    "products of many tokens": {"BITS": 16, "CHANNELS": 2} | STAGES,
    "with one tile of channels": {"BITS": 16, "CHANNELS": 1} | STAGES,
    "of FP8": {"BITS": 8, "CHANNELS": 2} | STAGES,
    "of INT4": {"BITS": 4, "GROUP_PAIRS": 2, "CHANNELS": 1} | STAGES,
    "attention": {"HEAD_DIM": 64, "GROUP": 3, "QK_NORM": 0, "STAGED": 256},
    "of normed heads": {"HEAD_DIM": 128, "GROUP": 4, "QK_NORM": 1, "STAGED": 128},
    "of narrow heads": {"HEAD_DIM": 80, "GROUP": 1, "QK_NORM": 0, "STAGED": 128},
}


@pytest.mark.parametrize("part", ["products of many tokens", "attention"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_many_tokens_on_every_capability(capability: str, part: str) -> None:
    cubin = compile_source(source_of("wide"), capability, MANY[part] | {"TOKENS": 512})
    assert all(name in cubin for name in ((b"attend_many", b"turn") if part == "attention" else (b"store", b"gate")))


@pytest.mark.parametrize("macros", MANY.values(), ids=MANY)
def test_every_part_of_many_tokens(macros: dict[str, int]) -> None:
    assert compile_source(source_of("wide"), "9.0", macros | {"TOKENS": 512})[:4] == b"\x7fELF"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("source", "kernels"), [("rounds", (b"plant", b"settle")), ("sample", (b"draw", b"perturb"))])
def test_what_needs_no_model(source: str, kernels: tuple[bytes, ...], capability: str) -> None:
    cubin = compile_source(source_of(source), capability, {})
    assert all(name in cubin for name in kernels)


def test_what_the_compiler_says_is_in_the_error() -> None:
    with pytest.raises(CompileError, match=r"identifier .nonsense. is undefined"):
        compile_source("__global__ void f() { nonsense(); }", "9.0", {})
