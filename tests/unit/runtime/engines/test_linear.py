"""Linear layers with quantized weights: every processor's kernels are the definition, bit for bit, for any rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ssv.runtime.engines import linear
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.engines.huge_pages import weight_memory
from ssv.runtime.engines.linear import (
    BLOCK,
    Int4Linear,
    Int8Linear,
    PackedLinear,
    int4_scales,
    int4_values,
    of_each_input,
    processors,
    quantize_blocks,
    use_kernels,
)

KINDS = pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
SHAPES = [(1, 32), (17, 96), (16, 1), (33, 101), (960, 576), (576, 1536), (49152, 96)]


@pytest.fixture(autouse=True)
def best_kernels_afterwards() -> Iterator[None]:
    yield
    use_kernels(processors()[0])


def weights(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def rows(num_rows: int, inputs: int) -> Tensor:
    """Rows of all magnitudes; some are zero, tie, or have an outlier, and one is beyond what has an inverse."""
    generator = torch.Generator().manual_seed(7)
    x_MI = torch.randn(num_rows, inputs, generator=generator)
    x_MI *= 10.0 ** torch.randint(-6, 6, (num_rows, 1), generator=generator)
    for row, change in enumerate((0.0, 1e-32, 1e30)):
        x_MI[3 + row : 4 + row] *= change
    x_MI[6:7] = (torch.arange(inputs) % 9 - 4) / 2.0
    x_MI[7:8, :1] = 1e5
    return x_MI


@KINDS
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES, ids=str)
def test_kernels_are_the_definition_to_the_last_bit(kind: type[PackedLinear], outputs: int, inputs: int) -> None:
    bias_O = torch.linspace(-1, 1, outputs) if outputs % 2 else None
    layer = kind(weights(outputs, inputs), bias_O)
    x_MI = rows(3 if outputs > 1000 else 33, inputs)
    expected_MO = layer.by_definition(x_MI)
    assert expected_MO.shape == (len(x_MI), outputs) and bool(expected_MO.isfinite().all())
    for processor in processors():
        use_kernels(processor)
        assert torch.equal(layer(x_MI), expected_MO), processor


@KINDS
@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(kind: type[PackedLinear], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs, num_rows = (int(torch.randint(1, most, (), generator=generator)) for most in (90, 150, 20))
    layer = kind(weights(outputs, inputs, seed), torch.ones(outputs) if seed % 2 else None)
    x_MI = rows(num_rows, inputs)
    expected_MO = layer.by_definition(x_MI)
    for processor in processors():
        use_kernels(processor)
        assert torch.equal(layer(x_MI), expected_MO), (processor, outputs, inputs, num_rows)


@KINDS
@pytest.mark.parametrize("num_rows", range(1, 33))
def test_a_row_does_not_see_its_neighbours(kind: type[PackedLinear], num_rows: int) -> None:
    layer, x_MI = kind(weights(40, 70), None), rows(33, 70)
    for processor in processors():
        use_kernels(processor)
        alone_MO = torch.cat([layer(x_1I[None]) for x_1I in x_MI])
        assert torch.equal(layer(x_MI[-num_rows:]), alone_MO[-num_rows:]), processor


@KINDS
def test_the_largest_sums_do_not_overflow(kind: type[PackedLinear]) -> None:
    """All weights and all activations at their largest magnitude, of either sign."""
    weight_OI = torch.ones(16, 64) * torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    weight_OI[:, ::32] *= -1  # so that blocks of 4 bits have a range
    layer = kind(weight_OI, None)
    x_MI = torch.ones(4, 64) * torch.tensor([[1.0], [-1.0], [1e20], [-1e-20]])
    for processor in processors():
        use_kernels(processor)
        found_MO = layer(x_MI)
        assert torch.equal(found_MO, layer.by_definition(x_MI)), processor
        assert torch.allclose(found_MO, x_MI @ weight_OI.T, rtol=2e-2), processor


@KINDS
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (17, 96), (70, 101), (600, 64)], ids=str)
def test_packing_with_and_without_a_compiler(
    kind: type[PackedLinear], outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_OI = weights(outputs, inputs)
    weight_OI[0] = 0
    weight_OI[:, 5] = weight_OI[:, 4] / 2
    compiled = kind(weight_OI, None)
    x_MI = rows(9, inputs)
    found_MO = compiled(x_MI)
    monkeypatch.setattr(linear, "_linear", None)
    without = kind(weight_OI, None)
    assert torch.equal(without.packed_TGX, compiled.packed_TGX)
    assert torch.equal(without(x_MI), found_MO)


def test_activations_are_rounded_to_127_levels_of_their_block() -> None:
    x_MI = torch.zeros(1, 70)
    x_MI[0, :32] = torch.arange(32) * 4.0 + 3  # the largest is 127: levels are whole numbers
    x_MI[0, 1], x_MI[0, 2], x_MI[0, 3] = 0.5, 1.5, -2.5  # ties, to even
    x_MI[0, 40] = -1e-3
    values_MGB, scale_MG = quantize_blocks(x_MI)
    assert values_MGB.shape == (1, 3, BLOCK) and values_MGB.dtype == torch.int8
    assert values_MGB[0, 0, :5].tolist() == [3, 0, 2, -2, 19]
    assert values_MGB[0, 1, 8] == -127 and not values_MGB[0, 2].any()
    assert scale_MG[0].tolist() == pytest.approx([1.0, 1e-3 / 127, 0.0])


def test_an_outlier_costs_its_block_alone() -> None:
    layer, x_MI = Int8Linear(torch.eye(64), None), torch.ones(1, 64)
    x_MI[0, 3] = 1e4
    assert torch.allclose(layer(x_MI)[0, 32:], torch.ones(32), rtol=1e-2)
    assert not layer(x_MI)[0, :3].any()


def test_what_q4_1_holds_comes_back() -> None:
    """Of whatever scale and minimum a block has in its file, if both ends of its range are used."""
    generator = torch.Generator().manual_seed(3)
    whole_OI = torch.randint(0, 16, (64, 96), generator=generator)
    whole_OI[:, ::32], whole_OI[:, 1::32] = 0, 15
    scale_OG = (torch.rand(64, 3, generator=generator) / 50 + 1e-3).half()
    least_OG = (torch.randn(64, 3, generator=generator) / 10).half()
    weight_OI = whole_OI * of_each_input(scale_OG, 96) + of_each_input(least_OG, 96)
    found_scale_OG, found_least_OG = int4_scales(weight_OI)
    assert torch.equal(found_least_OG, least_OG)
    assert torch.equal(found_scale_OG, scale_OG)
    assert torch.equal(int4_values(weight_OI, found_scale_OG, found_least_OG), whole_OI.to(torch.uint8))


def test_weights_beyond_fp16_have_no_4_bits() -> None:
    weight_OI = weights(16, 32)
    weight_OI[3, 3] = 1e6
    with pytest.raises(EngineError, match="too large for precision int4"):
        Int4Linear(weight_OI, None)


def test_an_unknown_processor() -> None:
    with pytest.raises(EngineError, match="CPU kernels 'z80' do not run here") as raised:
        use_kernels("z80")
    assert "any" in str(raised.value.cure)


def test_the_environment_chooses_the_kernels() -> None:
    """And what it names wrongly is said."""
    program = "from ssv.runtime.engines import linear; print(linear.processors())"
    found = {}
    for name in ("any", "z80"):
        environment = {**os.environ, "SSV_CPU_KERNELS": name}
        found[name] = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert found["any"].returncode == 0 and "any" in found["any"].stdout
    assert found["z80"].returncode != 0 and "z80" in found["z80"].stderr


def test_memory_for_weights_is_aligned_and_zero_and_apart() -> None:
    pieces = [weight_memory(size) for size in (1, 64, 100, 1 << 20, 40 << 20, 7)]
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % 64 == 0 and not piece.any()
        piece.fill_(number + 1)
    assert [int(piece.min()) for piece in pieces] == [int(piece.max()) for piece in pieces] == [1, 2, 3, 4, 5, 6]
