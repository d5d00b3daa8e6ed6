"""FP8 and INT4 weights on the CUDA engine: what the quantized layers are defined to compute, and the same bits for a
token in whatever company. Needs an NVIDIA GPU of compute capability 8.0 or above.

Inputs of FP8 layers are not rounded to E4M3 there, so the reference is the layers' dequantized weights.

make test-gpu
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drive import drive, flat, names
from quantized_weights import pack_int4, quantized_layer, quantized_weights
from tiny import random_draft, relative_error, tiny_decoder, tiny_ids, tiny_spec, tiny_weights
from torch import Tensor, nn
from trees import branches, int32, path_to, random_parents, run

from ssv.model.decoder import Decoder
from ssv.model.quantized import AwqLinear, Fp8Linear, QuantizedLinear
from ssv.runtime.engines.cuda import places
from ssv.runtime.engines.cuda.engine import CudaEngine
from ssv.runtime.engines.cuda.launching import Launcher
from ssv.runtime.engines.cuda.make import cuda_draft_engine, cuda_engines, why_not
from ssv.runtime.engines.cuda.weights import Buffers, Linear
from ssv.runtime.engines.torch_engine import draft_engine, target_engine

KINDS = {"bf16": 0, "fp8": 0, "int4-32": 32, "int4-64": 64, "int4-128": 128}
every_kind = pytest.mark.parametrize("kind", KINDS)
quantized_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bf16"])
MAX_LENGTH = 512
SMALL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_heads": 8, "head_dim": 32}


def layer_of(kind: str, outputs: int, inputs: int, bias_O: Tensor | None = None) -> nn.Module:
    """A layer on the GPU whose rows and groups are of different sizes."""
    torch.manual_seed(outputs + inputs)
    weight_OI = torch.randn(outputs, inputs, device="cuda") * (torch.rand(outputs, 1, device="cuda") + 0.1)
    weight_OI *= (torch.rand(outputs, inputs // 32, device="cuda") + 0.1).repeat_interleave(32, dim=1)
    return quantized_layer(weight_OI, kind.split("-")[0], KINDS[kind], bias_O)


def stored(buffers: Buffers, linear: Linear, x_MK: Tensor) -> Tensor:
    """The product as its kernel forms it."""
    out = torch.full((len(x_MK), linear.outputs), torch.nan, device="cuda")
    buffers.step.zero_()
    buffers.step[0] = len(x_MK)
    tiles = 1 if len(x_MK) <= 8 else 2 if len(x_MK) <= 16 else 4 if len(x_MK) <= 32 else 8
    stream = torch.cuda.current_stream().cuda_stream
    Launcher({}, stream, tiles, buffers, overlaps=False).store(linear, x_MK, out)
    torch.cuda.synchronize()
    return out


@every_kind
@pytest.mark.parametrize(
    "shape",
    [(16, 128), (23, 384), (48, 640), (96, 1152), (256, 4096), (64, 14336), (4096, 384), (4112, 4096), (5936, 1152)],
    ids=lambda s: f"{s[0]}x{s[1]}",
)
def test_products(kind: str, shape: tuple[int, int]) -> None:
    """Exact inputs and weights: only the order of sums in fp32 is the kernel's own."""
    outputs, inputs = shape if kind == "bf16" or kind == "fp8" else (shape[0] + shape[0] % 2, shape[1])
    bias_O = torch.randn(outputs, device="cuda")
    layer = layer_of(kind, outputs, inputs, bias_O)
    weight_OI = layer.dequantized() if isinstance(layer, QuantizedLinear) else layer.weight
    buffers = Buffers(tiny_spec(), torch.device("cuda"), MAX_LENGTH, 112, 0)
    linear = Linear(layer)
    x_MK = torch.randn(places.TOKENS, inputs, device="cuda").bfloat16()
    expected = x_MK.double() @ weight_OI.double().T + bias_O
    found = {num: stored(buffers, linear, x_MK[:num]) for num in (1, 8, 11, 32, 64)}
    # Of each channel by itself: a wrong scale or group of any row would be seen.
    error_O = (found[64] - expected).norm(dim=0) / expected.norm(dim=0)
    assert float(error_O.max()) < 2e-5, int(error_O.argmax())
    for num, some in found.items():
        assert torch.equal(some, found[64][:num]), num


def plain(decoder: Any) -> Any:
    """The same with the weights that its quantized layers stand for, factors of inputs among them."""
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                weight_OI = child.dequantized()
                if isinstance(child, AwqLinear) and child.input_factor_I is not None:
                    weight_OI = weight_OI * child.input_factor_I
                linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
                linear.weight, linear.bias = nn.Parameter(weight_OI), child.bias
                setattr(parent, name, linear)
    return decoder.requires_grad_(False)


def quantized_decoder(kind: str, **changes: Any) -> Decoder:
    spec = tiny_spec(**(SMALL | changes))
    return Decoder.from_weights(spec, quantized_weights(spec, tiny_weights(spec), kind.split("-")[0], KINDS[kind]))


def cuda(decoder: Decoder, max_batch: int = 3) -> CudaEngine:
    return CudaEngine(decoder.cuda(), max_batch=max_batch, max_length=MAX_LENGTH)


@quantized_kind
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "family": "qwen2"}])
def test_target(kind: str, changes: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"precision": "fp32", "max_batch": 3, "max_length": MAX_LENGTH}
    # What the kernels have in bf16 besides.
    decoder, reference = quantized_decoder(kind, **changes), plain(quantized_decoder(kind, **changes))
    for module in (decoder.embed, decoder.lm_head, reference.embed, reference.lm_head):
        module.weight.data = module.weight.data.bfloat16().float()
    expected, found = drive(target_engine(reference, **sizes)), drive(cuda(decoder))
    for name in names():
        assert relative_error(flat(found, name).cpu(), flat(expected, name)) < 2e-2


@every_kind
def test_a_token_has_the_same_bits_alone_in_a_chain_in_a_tree_and_beside_other_rows(kind: str) -> None:
    engine = cuda(quantized_decoder(kind) if kind != "bf16" else tiny_decoder(**SMALL), max_batch=4)
    prompt, tokens = tiny_ids(1, 250, seed=1), tiny_ids(1, 32, seed=2)
    for row in range(4):
        run(engine, prompt, [0], first_row=row)

    def bits(ids_BT: Tensor, first: list[int], **rest: Any) -> list[Tensor]:
        return [row.clone() for row in run(engine, ids_BT, first, **rest).logits_RV]

    alone = [bits(tokens[:, t : t + 1], [250 + t])[0] for t in range(32)]
    for num in (8, 32):
        chain = bits(tokens[:, :num], [250], first_row=1)
        assert all(torch.equal(a, b) for a, b in zip(chain, alone, strict=False)), num
    ids_BT = torch.cat((tiny_ids(1, 12, seed=5), tokens[:, :12], tiny_ids(2, 12, seed=6)))
    beside = bits(ids_BT, [250] * 4, count_B=int32([3, 12, 9, 12]))
    assert all(torch.equal(a, b) for a, b in zip(beside[3:15], alone, strict=False))
    parents, nodes = random_parents(40, seed=9), tiny_ids(1, 40, seed=7)
    found = bits(nodes, [250], branches=branches([250], [parents]))
    for node in (3, 17, 39):
        assert torch.equal(bits(nodes[:, path_to(parents, node)], [250], first_row=3)[-1], found[node]), node


@pytest.mark.parametrize("kind", ["fp8", "int4-64"])
def test_a_quantized_pair(kind: str) -> None:
    """Also the projection of features, whose factors no norm can take, and the join, whose factors two norms take."""
    decoder = quantized_decoder(kind, num_layers=3)
    draft = random_draft(tiny_decoder(**SMALL, num_layers=3), "conditioned")
    assert draft.tap is not None
    torch.manual_seed(4)
    for parent, name in ((draft.tap, "project"), (draft, "join"), (draft.decoder.layers[0], "down")):
        linear = getattr(parent, name)
        inputs = linear.weight.shape[1]
        if kind == "fp8":
            scale_O = linear.weight.abs().amax(dim=1) / 448
            values_OI = (linear.weight / scale_O[:, None]).to(torch.float8_e4m3fn)
            setattr(parent, name, Fp8Linear(values_OI, scale_O, torch.tensor(0.05), None))
        else:
            factor_I = torch.rand(inputs) + 0.5
            setattr(parent, name, AwqLinear(*pack_int4(linear.weight / factor_I, 64), factor_I, None))
    assert why_not(decoder, draft, "cuda") is None
    sizes: dict[str, Any] = {"max_batch": 3, "max_length": MAX_LENGTH}
    target, drafting = cuda_engines(decoder, draft, None, device="cuda", **sizes)
    found = drive(target, features_out=True), drive(drafting)
    decoder, draft = plain(decoder), plain(draft)
    expected = (
        drive(target_engine(decoder, draft=draft, precision="fp32", **sizes), features_out=True),
        drive(draft_engine(draft, precision="fp32", **sizes)),
    )
    for mine, theirs, with_features in zip(found, expected, (True, False), strict=True):
        for name in names(with_features):
            assert relative_error(flat(mine, name).cpu(), flat(theirs, name)) < 2e-2, name
    assert cuda_draft_engine(draft, None, device="cuda", **sizes).num_features


def test_groups_without_kernels_are_told_by_name() -> None:
    spec = tiny_spec()
    decoder = Decoder.from_weights(spec, quantized_weights(spec, tiny_weights(spec), "int4", 16))
    draft = random_draft(decoder, "conditioned")
    assert "layers.0.qkv has scales of 16 INT4 weights" in str(why_not(decoder, draft, "cuda"))


BIG: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_heads": 32, "num_kv_heads": 8, "head_dim": 64},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
}


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4-128"])
@pytest.mark.parametrize("shape", BIG.values(), ids=BIG)
def test_shapes_of_bigger_models(shape: dict[str, Any], kind: str) -> None:
    """One layer of each, and a vocabulary of 128,256."""
    spec = tiny_spec(**shape, num_layers=1, vocab_size=128_256)
    with torch.device("cuda"):
        weights = tiny_weights(spec)
        if kind != "bf16":
            weights = quantized_weights(spec, weights, kind.split("-")[0], KINDS[kind])
        weights = {name: w.bfloat16().float() if w.dtype == torch.float32 and w.ndim > 1 and "scale" not in name else w
                   for name, w in weights.items()}  # fmt: skip
        decoder, reference = (Decoder.from_weights(spec, weights) for _ in range(2))
    engine = cuda(decoder)
    expected = drive(
        target_engine(plain(reference), precision="fp32", device="cuda", max_batch=3, max_length=MAX_LENGTH)
    )
    found = drive(engine)
    for name in names():
        assert relative_error(flat(found, name), flat(expected, name)) < 2e-2
    ids = tiny_ids(1, 64, seed=3)
    whole = run(engine, ids, [0]).logits_RV.clone()
    for t in (0, 40, 63):
        assert torch.equal(run(engine, ids[:, t : t + 1], [t]).logits_RV[0], whole[t])
