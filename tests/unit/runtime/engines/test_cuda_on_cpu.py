"""What the CUDA kernels compute, on the CPU: the model's logits, and the same bits for a token in whatever company."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_cpu import CpuEngine, as_on_a_gpu
from growing import grow_by_stepping
from quantized_weights import quantized_layer, quantized_weights
from tiny import random_draft, relative_error, tiny_decoder, tiny_ids, tiny_spec, tiny_weights
from trees import branches, int32, path_to, random_parents, run

from ssv.model.decoder import Decoder
from ssv.model.draft import Draft
from ssv.model.quantized import QuantizedLinear
from ssv.model.scorer import Scorer
from ssv.plugins.cuda.compiler import compile_source
from ssv.runtime.engines.contract import BlockEngine, TreeShape
from ssv.runtime.engines.cuda import launching, places
from ssv.runtime.engines.cuda.weights import Buffers, Linear
from ssv.runtime.engines.torch_engine import target_engine

MANY = "normed heads of 24, many channels"
SHAPES: dict[str, dict[str, Any]] = {
    "heads of 64": {"hidden_size": 192, "num_heads": 3, "num_kv_heads": 1, "head_dim": 64, "num_layers": 1},
    MANY: {"head_dim": 24, "qk_norm": True, "family": "qwen3", "num_layers": 1,
                                          "vocab_size": 4300},
}  # fmt: skip


@pytest.mark.parametrize(("name", "length"), [("heads of 64", 27), ("heads of 64", 250), (MANY, 251)])
def test_a_token_has_the_same_bits_alone_in_a_chain_in_a_tree_and_beside_other_rows(
    name: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new tokens are in two of the chunks that keys are weighed in, or in two blocks of them."""
    as_on_a_gpu(monkeypatch)
    engine = CpuEngine(tiny_decoder(**SHAPES[name]), max_batch=3, max_length=320)
    for entries in (engine.cache.keys, engine.cache.values):  # [layers, rows, heads, slots, dims]
        entries[:, :, :, :length] = torch.randn_like(entries[:, :1, :, :length])
    tokens = tiny_ids(1, 9, seed=2)
    alone = torch.cat([engine.logits(tokens[:, t : t + 1], [length + t]) for t in range(9)])
    assert torch.equal(engine.logits(tokens, [length], first_row=1), alone)
    beside = engine.logits(torch.cat((tiny_ids(1, 9, seed=5), tokens, tokens)), [length] * 3, counts=[3, 9, 9])
    assert torch.equal(beside[3:12], alone) and torch.equal(beside[12:], alone)
    parents, nodes = random_parents(18, seed=length), tiny_ids(1, 18, seed=7)
    tree = engine.logits(nodes, [length], branches=branches([length], [parents]))
    for node in (2, 17):
        path = path_to(parents, node)
        assert torch.equal(engine.logits(nodes[:, path], [length], first_row=2)[-1], tree[node]), node


@pytest.mark.parametrize(
    ("tiles", "kind", "shared"), [(9, "bf16", 3000), (9, "bf16", 10**6), (12, "fp8", 3000), (15, "int4", 3000)]
)
def test_a_product_is_the_same_however_it_is_cut(
    tiles: int, kind: str, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into blocks of few tokens or many, with one tile of channels or several, of which the last may be alone."""
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(launching, "_num_multiprocessors", lambda device: 2)
    monkeypatch.setattr(launching, "_most_shared", lambda: shared)
    monkeypatch.setattr(launching, "FEW_TILES", 8)
    monkeypatch.setattr(launching, "MANY_WIDTHS", (128, 512))
    torch.manual_seed(tiles)
    outputs, inputs = 16 * tiles - 2, 352  # three parts of a sum, the last one shorter
    layer = quantized_layer(torch.randn(outputs, inputs), kind, 32)
    weight_OI = layer.dequantized() if isinstance(layer, QuantizedLinear) else layer.weight
    linear, x_MK = Linear(layer), torch.randn(128, inputs).bfloat16()
    spec, cpu = tiny_decoder().spec, torch.device("cpu")
    few, many = Buffers(spec, cpu, 320, 112, 0), Buffers(spec, cpu, 320, 112, 0, places.MANY_TOKENS)
    found, plans = {}, set()
    for width, multiprocessors in (*((width, 2) for width in launching.WIDTHS), (128, 2), (128, 999)):
        monkeypatch.setattr(launching, "_num_multiprocessors", lambda device, num=multiprocessors: num)
        buffers = few if width <= places.TOKENS else many
        for num in (width - 5, width):
            out = torch.full((num, outputs), torch.nan)
            buffers.step.zero_()
            buffers.step[0] = num
            launching.Launcher({}, 0, width // 8, buffers, overlaps=False).store(linear, x_MK[:num], out)
            found[num, multiprocessors] = out
        if buffers is few:
            plan = launching.plan_of(linear, width // 8, 2)
            plans.add((plan.parts, plan.channels, plan.several, plan.holds))
        else:
            assert launching.many_plan_of(linear, width // 8, multiprocessors).channels == (
                2 if multiprocessors == 2 else 1
            )
    assert relative_error(found[128, 2], x_MK.float() @ weight_OI.float().T) < 1e-5
    assert all(torch.equal(some, found[128, 2][:num]) for (num, _), some in found.items())
    assert {channels for _, channels, _, _ in plans} == {1, 2} and any(holds for *_, holds in plans) == (shared > 3000)


@pytest.mark.parametrize(
    ("name", "kind"), [("heads of 64", "bf16"), ("heads of 64", "fp8"), ("heads of 64", "int4"), (MANY, "bf16")]
)
def test_a_prompt_has_the_same_bits_in_one_step_and_in_many(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two rows, whose keys are in two blocks and in one, behind one that has a text already."""
    as_on_a_gpu(monkeypatch)
    spec = tiny_spec(**SHAPES[name] | {"vocab_size": 112})
    weights = tiny_weights(spec)
    decoder = Decoder.from_weights(spec, weights if kind == "bf16" else quantized_weights(spec, weights, kind, 32))
    whole, cut = (CpuEngine(decoder, max_batch=3, max_length=320) for _ in range(2))
    ids, counts, starts = tiny_ids(2, 250, seed=3), [250, 31], [17, 0]
    for engine in (whole, cut):
        engine.step(tiny_ids(1, 17, seed=1), int32([0]), torch.arange(0), first_row=1)
    assert whole._block_tokens(counts, 2, has_branches=False) == places.MANY_TOKENS
    out = whole.step(ids, int32(starts), torch.tensor([249, 250 + 30]), count_B=int32(counts), first_row=1)
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for at in range(0, count, 60):
            tokens = ids[b : b + 1, at : min(at + 60, count)]
            last = cut.step(tokens, int32([start + at]), torch.tensor([tokens.shape[1] - 1]), first_row=1 + b)
        assert torch.equal(out.logits_RV[b], last.logits_RV[0]), b
        for mine, theirs in ((whole.cache.keys, cut.cache.keys), (whole.cache.values, cut.cache.values)):
            assert torch.equal(mine[:, 1 + b, :, : start + count], theirs[:, 1 + b, :, : start + count]), b
            assert mine[:, 1 + b, :, start + count :].isnan().all()


def test_what_is_no_prompt_is_cut_into_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree, many logits, many rows, or a score."""
    as_on_a_gpu(monkeypatch)
    engine = CpuEngine(tiny_decoder(), max_batch=1, max_length=64)
    few, many = places.TOKENS, places.MANY_TOKENS
    assert engine._block_tokens([100], 1, has_branches=False) == many
    assert engine._block_tokens([64], 1, has_branches=False) == few
    assert engine._block_tokens([100], 1, has_branches=True) == few
    assert engine._block_tokens([100], 9, has_branches=False) == few
    assert engine._block_tokens([10] * 9, 1, has_branches=False) == few
    engine._scorer = Scorer(torch.zeros(3), torch.zeros(()), False)
    assert engine._block_tokens([100], 1, has_branches=False) == few
    assert engine._block_tokens([100], 0, has_branches=False) == many


def test_a_step_takes_as_long_as_the_blocks_that_have_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    engine = CpuEngine(tiny_decoder(), max_batch=1, max_length=64)
    assert isinstance(engine, BlockEngine)
    found = {tokens: engine.blocks(tokens) for tokens in (1, 8, 9, 33, 64, 65, 128, 150)}
    assert found == {
        1: [8], 8: [8], 9: [16], 33: [64], 64: [64], 65: [64, 8], 128: [64, 64], 150: [64, 64, 32],
    }  # fmt: skip


def test_logits_are_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    decoder = tiny_decoder(**SHAPES["heads of 64"])
    for parameter in decoder.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)
    expected = run(target_engine(decoder, precision="fp32", max_batch=1, max_length=320), tiny_ids(1, 40), [0])
    found = CpuEngine(decoder, max_batch=1, max_length=320).logits(tiny_ids(1, 40), [0])
    assert relative_error(found, expected.logits_RV) < 2e-2


@pytest.mark.parametrize("kind", ["conditioned", "standalone"])
@pytest.mark.parametrize("shape", [TreeShape(4, 1, 1), TreeShape(3, 5, 3)], ids=["chain", "bushy"])
def test_trees_that_grow_are_those_of_steps(shape: TreeShape, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two of three rows, whose texts go on by different numbers of tokens."""
    as_on_a_gpu(monkeypatch)
    draft: Draft = random_draft(tiny_decoder(hidden_size=96), kind)  # type: ignore[arg-type]
    torch.manual_seed(3)
    is_conditioned = kind == "conditioned"
    scorer = Scorer(torch.randn(96 + 3) / 4, torch.tensor(0.1), True) if is_conditioned else None
    grower, stepper = (
        CpuEngine(draft.decoder, max_batch=3, max_length=320, draft=draft, scorer=scorer) for _ in range(2)
    )
    starts, counts = [3, 17, 40], [2, 0, 1]
    for engine in (grower, stepper):
        for b, start in enumerate(starts):
            given = torch.randn(1, start, 96, generator=torch.Generator().manual_seed(b)) if is_conditioned else None
            engine.step(tiny_ids(1, start, seed=b), int32([0]), torch.arange(0), given, first_row=b)
    features = torch.randn(3, 2, 96) if is_conditioned else None
    corrections = ((0.2, 0.9), (-0.3, 1.1), (0.1, 1.0))
    args = (tiny_ids(3, 2, seed=9), int32(starts), int32(counts), features, shape, corrections)
    found, expected = grower.grow(*args), grow_by_stepping(stepper, *args)
    for mine, theirs, count in zip(found, expected, counts, strict=True):
        assert (mine is None) == (theirs is None) == (count == 0)
        if mine is not None and theirs is not None:
            assert mine.tokens.tolist() == theirs.tokens.tolist() and mine.parents.tolist() == theirs.parents.tolist()
            assert np.allclose(mine.shares, theirs.shares, atol=1e-5)
            assert np.allclose(mine.risks, theirs.risks, atol=1e-5)


def test_the_compiler_fuses_no_product_with_a_sum(tmp_path: Path) -> None:
    """Or two copies of the same lines could round differently."""
    cuobjdump = next(
        iter(Path(sys.prefix).glob("lib/python3*/site-packages/triton/backends/nvidia/bin/cuobjdump")), None
    )
    if (tool := shutil.which("cuobjdump") or cuobjdump) is None:
        pytest.skip("there is no cuobjdump")
    source = 'extern "C" __global__ void f(float *x) { x[0] = x[1] * x[2] + x[3]; x[4] = fmaf(x[5], x[6], x[7]); }'
    (tmp_path / "f.cubin").write_bytes(compile_source(source, "9.0", {}))
    code = subprocess.run([tool, "-sass", tmp_path / "f.cubin"], capture_output=True, check=True, text=True).stdout
    assert code.count("FMUL") == 1 and code.count("FADD") == 1 and code.count("FFMA") == 1
