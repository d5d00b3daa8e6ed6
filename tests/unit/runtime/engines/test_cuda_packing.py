"""Weights as fragments of tensor cores, and the numbers of a step, against what decoder.cu says of both."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
import torch
from tiny import tiny_spec
from trees import branches, random_parents

from ssv.plugins.cuda.compiler import source_of
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.engines.cuda import engine, launching, places
from ssv.runtime.engines.cuda.packing import interleave, pack
from ssv.runtime.engines.cuda.places import TOKENS, blocks, write


def multiplied(packed: torch.Tensor, x_K: torch.Tensor) -> torch.Tensor:
    """The product as the kernel's lanes form it: mma.m16n8k16 of A fragments and of x in pieces of 16 bytes."""
    tiles, pairs = packed.shape[:2]
    out = torch.zeros(tiles * 16)
    for tile in range(tiles):
        for pair in range(pairs):
            for product in range(2):
                for lane in range(32):
                    g, q = divmod(lane, 4)
                    a = packed[tile, pair, product, lane].float().view(4, 2)
                    piece = x_K[pair * 32 + 8 * q : pair * 32 + 8 * q + 8].view(4, 2)
                    b0, b1 = piece[2 * product], piece[2 * product + 1]
                    # a0 and a2 are row g's, of the first and the second half of the product's 16 channels.
                    out[tile * 16 + g] += (a[0] * b0).sum() + (a[2] * b1).sum()
                    out[tile * 16 + g + 8] += (a[1] * b0).sum() + (a[3] * b1).sum()
    return out


@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (21, 64)])
def test_packed_weights_are_the_product(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randint(-8, 8, shape).float()  # exact in bf16, and so are the sums
    x_K = torch.randint(-4, 4, shape[1:]).float()
    found = multiplied(pack(weight), x_K)
    assert torch.equal(found[: shape[0]], weight @ x_K)
    assert not found[shape[0] :].any()


def test_gate_and_up_take_turns_of_eight() -> None:
    rows = torch.arange(48)[:, None]
    found = interleave(rows)[:, 0].tolist()
    assert found[:16] == [*range(8), *range(24, 32)] and found[16:32] == [*range(8, 16), *range(32, 40)]
    assert interleave(torch.arange(48.0)).tolist() == found


def named(source: str) -> dict[str, int]:
    """The numbers that the enum of decoder.cu gives to parts of a step."""
    (body,) = re.findall(r"enum \{\s*(NUM_TOKENS.*?)\};", source, re.DOTALL)
    found: dict[str, int] = {"TOKENS": TOKENS}
    after = -1
    for entry in re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL).split(","):
        name, _, value = (word.strip() for word in entry.partition("="))
        if value:
            after = sum(found[word.strip()] if word.strip() in found else int(word) for word in value.split("+"))
        else:
            after += 1
        found[name] = after
    return found


AT = named(source_of("decoder"))


def test_the_parts_of_a_step_are_where_the_kernels_look_for_them() -> None:
    assert AT["DEPTH"] == places.DEPTH and AT["PATH"] == places.SIZE_OF_CHAINS
    assert f"#define TOKENS {TOKENS} " in source_of("decoder")
    assert f"S_SIZE = {places.SETTINGS}\n" in source_of("sample")


def test_how_rows_choose_is_where_the_kernels_look_for_it() -> None:
    (body,) = re.findall(r"enum \{\s*(S_TEMPERATURE.*?)\};", source_of("sample"), re.DOTALL)
    names = [word.strip() for word in re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL).split(",")]
    found = places.settings([0.5, 0.0], [40, 0], [0.25, 1.0], np.array([2**63 + 7, 5], dtype=np.uint64), [0, 1])
    floats = found.view(np.float32)
    assert floats[:, names.index("S_TEMPERATURE")].tolist() == [0.5, 0.0]
    assert floats[:, names.index("S_TOP_P")].tolist() == [0.25, 1.0]
    assert found[:, names.index("S_TOP_K")].tolist() == [40, 0] and found[:, names.index("S_AHEAD")].tolist() == [0, 1]
    assert found[:, names.index("S_SEED_LOW")].tolist() == [7, 5]
    assert found[:, names.index("S_SEED_HIGH")].tolist() == [-(2**31), 0]
    signed = places.settings([0.5], [40], [0.25], np.array([7 - 2**63]), [0])
    assert np.array_equal(signed, found[:1])


STRUCTURES = {
    "decoder": ["Embed", "Join", "Linear", "Attention", "Largest", "Sift", "Judge", "Grow"],
    "sample": ["Draw", "Perturb"],
    "rounds": ["Plant", "Lay", "Settle", "Compact"],
}


@pytest.mark.parametrize(("source", "name"), [(source, name) for source, names in STRUCTURES.items() for name in names])
def test_arguments_are_laid_out_as_the_kernels_declare_them(source: str, name: str) -> None:
    (body,) = re.findall(rf"struct {name} \{{(.*?)\n\}};", source_of(source), re.DOTALL)
    declared = []
    for statement in re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL).split(";"):
        kind = ctypes.c_float if statement.split()[:1] == ["float"] else ctypes.c_int
        for part in statement.split(","):
            if words := re.findall(r"\w+", part):
                is_pointer = "*" in part or "*" in statement.split(",")[0]
                declared.append((words[-1], ctypes.c_void_p if is_pointer else kind))
    structure = {"Linear": launching.Product}.get(name) or getattr(launching, name)
    assert [(field.rstrip("_"), kind) for field, kind in structure._fields_] == declared


def test_blocks_hold_tokens_in_order() -> None:
    (one,) = blocks([3, 0, 2])
    assert [(r.b, r.start, r.stop, r.first) for r in one.runs] == [(0, 0, 3, 0), (2, 0, 2, 3)] and one.num_tokens == 5
    many = list(blocks([60, 70]))
    assert [block.num_tokens for block in many] == [64, 64, 2]
    assert [(r.b, r.start, r.stop, r.first) for block in many for r in block.runs] == [
        (0, 0, 60, 0),
        (1, 0, 4, 60),
        (1, 4, 68, 0),
        (1, 68, 70, 0),
    ]


def part(numbers: np.ndarray, name: str, count: int) -> list[int]:
    return numbers[AT[name] : AT[name] + count].tolist()


def test_numbers_of_chains() -> None:
    numbers = np.zeros(places.SIZE, dtype=np.int32)
    (block,) = blocks([3, 2])
    ids = np.array([[7, 8, 9], [5, 6, 0]])
    assert write(numbers, block, ids, [10, 300], 2, [4, 0], None, group_tokens=2) == 302
    assert numbers[:4].tolist() == [5, 2, 3, 0]
    assert part(numbers, "ID", 5) == [7, 8, 9, 5, 6]
    assert part(numbers, "ROW", 5) == [2, 2, 2, 3, 3]
    assert part(numbers, "SLOT", 5) == [10, 11, 12, 300, 301]
    assert part(numbers, "SEEN", 5) == [11, 12, 13, 301, 302]
    assert min(part(numbers, "PREFIX", 5)) > 10_000
    assert part(numbers, "GATHER", 2) == [4, 0]
    assert part(numbers, "GROUP_FIRST", 3) == [0, 2, 3] and part(numbers, "GROUP_COUNT", 3) == [2, 1, 2]
    assert part(numbers, "GROUP_NEW", 3) == [0, 0, 3] and part(numbers, "GROUP_NUM_NEW", 3) == [3, 3, 2]


def test_numbers_of_a_tree_that_is_cut() -> None:
    """Its second part sees nodes of the first in the slots that these were given."""
    numbers = np.zeros(places.SIZE, dtype=np.int32)
    tree = branches([20], [random_parents(70, seed=1)])
    first, second = blocks([70])
    for block in (first, second):
        write(numbers, block, np.zeros((1, 70), dtype=np.int64), [20], 0, [], tree, group_tokens=4)
    paths = numbers[AT["PATH"] :].reshape(TOKENS, places.DEPTH)
    for m in range(6):
        path = [slot for slot in tree.path_BTD[0, 64 + m].tolist() if slot >= 0]
        assert paths[m, : len(path)].tolist() == path and path[-1] == 84 + m
        assert part(numbers, "SEEN", 6)[m] == 20 + len(path)
    assert part(numbers, "SLOT", 6) == list(range(84, 90)) and part(numbers, "PREFIX", 6) == [20] * 6
    assert numbers[3] == 1 and numbers[2] == 2


def test_a_path_longer_than_there_is_room_for_is_refused() -> None:
    (block,) = blocks([1])
    tree = branches([0], [list(range(-1, places.DEPTH))])
    with pytest.raises(EngineError, match=f"room for {places.DEPTH}"):
        write(np.zeros(places.SIZE, dtype=np.int32), block, np.zeros((1, 1)), [0], 0, [], tree, group_tokens=1)


def test_models_that_the_kernels_cannot_run_are_told() -> None:
    assert engine.misfit(tiny_spec()) is None
    assert "hidden_size 72" in str(engine.misfit(tiny_spec(hidden_size=72)))
    assert "head_dim 20" in str(engine.misfit(tiny_spec(head_dim=20, num_heads=8, num_kv_heads=2)))
    assert "32 query heads" in str(engine.misfit(tiny_spec(num_heads=32, num_kv_heads=1)))


@pytest.mark.parametrize("width", launching.WIDTHS)
def test_attention_of_big_models_fits_the_shared_memory_of_small_gpus(width: int) -> None:
    """Of 99 KB, compute capabilities 8.6, 8.9 and 12.0, in groups as large as there is room for."""
    spec = tiny_spec(hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128)
    num = launching.group_tokens_for(spec, width)
    assert launching.attention_bytes(spec, width) <= 98 * 1024
    assert num == {8: 1, 16: 1, 32: 2, 64: 3}[width]
