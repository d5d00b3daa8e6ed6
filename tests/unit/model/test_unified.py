"""ModelOpt's unified checkpoints: both ways to say how they are quantized, what is refused, what layers compute.

What a layer computes is defined once more here, slowly and from the formats' own definitions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_weights import quantized_weights
from safetensors.torch import save_file
from tiny import relative_error, tiny_ids, tiny_spec, tiny_weights
from torch import Tensor, nn

from ssv.model.checkpoint import CheckpointError, DecoderSpec, Weights, hf_config
from ssv.model.decoder import Decoder
from ssv.model.quantized import AwqLinear, Fp8Linear, QuantizedLinear, precision_of, quantized_linear
from ssv.model.unified import load_any, quantization_of
from ssv.runtime.engines.torch_engine import target_engine

ALGORITHMS = {"fp8": "FP8", "int4": "W4A16_AWQ"}
LAYER = "model.layers.0"
DOWN = f"{LAYER}.mlp.down_proj"
FP8_GROUP = {
    "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
    "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
    "targets": ["Linear"],
}
INT4_GROUP = {"weights": {"dynamic": False, "num_bits": 4, "type": "int", "group_size": 16}, "targets": ["Linear"]}
NVFP4_GROUP = {"weights": {"num_bits": 4, "type": "float"}, "input_activations": {"num_bits": 4, "type": "float"}}


def nested(algorithm: object, **more: object) -> dict[str, Any]:
    producer = {"name": "modelopt", "version": "0.47.0"}
    return {"producer": producer, "quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"], **more}}


def flat(**facts: object) -> dict[str, Any]:
    return {"quant_method": "modelopt", "ignore": ["lm_head"], **facts}


def write_folder(
    folder: Path, weights: Weights, facts: object, *, spec: DecoderSpec | None = None, in_config: bool = False
) -> Path:
    """A checkpoint; `facts` stand in a file of their own or in config.json."""
    folder.mkdir(exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    config = hf_config(spec or tiny_spec(), [1], torch.float32)
    if in_config:
        config["quantization_config"] = facts
    elif facts is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(facts))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tiny_quantized(precision: str, spec: DecoderSpec | None = None) -> Weights:
    spec = spec or tiny_spec()
    return quantized_weights(spec, tiny_weights(spec), precision)


def load(folder: Path, weights: Weights, precision: str, spec: DecoderSpec | None = None) -> Decoder:
    return Decoder.from_weights(*load_any(write_folder(folder, weights, nested(ALGORITHMS[precision]), spec=spec)))


# --- How it is quantized --------------------------------------------------------------------------------------------

DOCUMENTS: dict[str, tuple[Any, str]] = {
    "nested, FP8": (nested("FP8", kv_cache_quant_algo=None), "fp8"),
    "nested, INT4": (nested("W4A16_AWQ", group_size=16, has_zero_point=False, pre_quant_scale=True), "int4"),
    "flat, FP8": (flat(quant_algo="FP8", config_groups={"group_0": FP8_GROUP}), "fp8"),
    "flat, INT4": (flat(quant_algo="W4A16_AWQ", config_groups={"group_0": INT4_GROUP}), "int4"),
    "flat without algorithm, FP8": (flat(config_groups={"group_0": FP8_GROUP}), "fp8"),
    "flat without algorithm, INT4": (flat(config_groups={"group_0": INT4_GROUP, "group_1": INT4_GROUP}), "int4"),
}


@pytest.mark.parametrize("in_config", [False, True], ids=["own file", "config.json"])
@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_shape_is_understood(tmp_path: Path, document: str, in_config: bool) -> None:
    facts, precision = DOCUMENTS[document]
    weights = tiny_quantized(precision)
    folder = write_folder(tmp_path / "model", weights, facts, in_config=in_config)
    assert quantization_of(folder) == precision
    spec, loaded = load_any(folder)
    assert spec == tiny_spec()
    assert loaded.keys() == weights.keys()
    assert precision_of(Decoder.from_weights(spec, loaded)) == precision


def test_a_folder_that_is_not_quantized(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", tiny_weights(tiny_spec()), None)
    assert quantization_of(folder) is None
    assert precision_of(Decoder.from_weights(*load_any(folder))) is None


def test_what_is_no_folder_is_not_quantized(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert quantization_of(tmp_path / "model.gguf") is None
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_any(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (nested("NVFP4"), "NVFP4"),
        (nested("W4A8_AWQ"), "W4A8_AWQ"),
        (nested("MIXED_PRECISION"), "MIXED_PRECISION"),
        (flat(quant_algo="NVFP4", config_groups={"group_0": NVFP4_GROUP}), "NVFP4"),
        (flat(config_groups={"group_0": NVFP4_GROUP}), "float"),
        (flat(config_groups={"group_0": FP8_GROUP, "group_1": INT4_GROUP}), "None"),
        (flat(config_groups={"group_0": {"weights": {"num_bits": [8]}}}), "None"),
    ],
)
def test_another_algorithm_is_refused_by_name(tmp_path: Path, facts: object, name: str) -> None:
    folder = write_folder(tmp_path / "model", {}, facts)
    with pytest.raises(CheckpointError, match=f"quantized to .*{name}.*, supported are FP8 and W4A16_AWQ"):
        load_any(folder)


@pytest.mark.parametrize("in_config", [False, True], ids=["own file", "config.json"])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_another_method_is_refused_by_name(tmp_path: Path, method: str, in_config: bool) -> None:
    folder = write_folder(tmp_path / "model", {}, {"quant_method": method, "bits": 4}, in_config=in_config)
    with pytest.raises(CheckpointError, match=f"quantized by {method}, only ModelOpt's"):
        load_any(folder)


@pytest.mark.parametrize("content", ["", "{", '{"quantization": ', "\0"])
@pytest.mark.parametrize("file", ["hf_quant_config.json", "config.json"])
def test_damaged_json(tmp_path: Path, file: str, content: str) -> None:
    folder = write_folder(tmp_path / "model", {}, None)
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=f"{file} is not JSON"):
        load_any(folder)


@pytest.mark.parametrize("facts", [[1], "FP8", 3, {"quantization": ["FP8"]}, {"quantization": None}])
def test_json_that_says_nothing(tmp_path: Path, facts: object) -> None:
    folder = write_folder(tmp_path / "model", {}, facts)
    says = "its quantization is not an object" if isinstance(facts, dict) else "json is not a JSON object"
    with pytest.raises(CheckpointError, match=says):
        load_any(folder)


WEIGHTS_LIST = pytest.param(
    flat(config_groups={"group_0": {"weights": [8]}}),
    id="weights are a list",
)
GROUP_LIST = pytest.param(flat(config_groups={"group_0": []}), id="group is a list")
ALGORITHM_LIST = pytest.param(nested(["FP8"]), id="algorithm is a list")


@pytest.mark.parametrize("facts", [WEIGHTS_LIST, GROUP_LIST, ALGORITHM_LIST])
def test_values_of_a_wrong_type(tmp_path: Path, facts: object) -> None:
    with pytest.raises(CheckpointError, match=r"quantized to .*, supported are FP8 and W4A16_AWQ"):
        load_any(write_folder(tmp_path / "model", {}, facts))


# --- Weights and scales ---------------------------------------------------------------------------------------------


def test_scales_of_the_kv_cache_are_left_out(tmp_path: Path) -> None:
    weights = tiny_quantized("fp8")
    cache = {f"{LAYER}.self_attn.{n}_proj.{n}_scale": torch.tensor(0.5) for n in "kv"}
    facts = nested("FP8", kv_cache_quant_algo="FP8")
    assert load_any(write_folder(tmp_path / "model", weights | cache, facts))[1].keys() == weights.keys()


def test_only_the_kv_cache_is_quantized(tmp_path: Path) -> None:
    weights = tiny_weights(tiny_spec())
    cache = {f"{LAYER}.self_attn.{n}_proj.{n}_scale": torch.tensor(0.5) for n in "kv"}
    folder = write_folder(tmp_path / "model", weights | cache, nested(None, kv_cache_quant_algo="FP8"))
    assert quantization_of(folder) is None
    loaded = load_any(folder)[1]
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)
    folder = write_folder(tmp_path / "model", tiny_quantized("fp8"), nested(None, kv_cache_quant_algo="FP8"))
    with pytest.raises(CheckpointError, match="said not to be quantized but for its KV cache"):
        load_any(folder)


@pytest.mark.parametrize(
    ("in_config", "named"),
    [
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "quantized by compressed-tensors"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "says FP8, config.json W4A16_AWQ"),
    ],
)
def test_documents_that_contradict_each_other(tmp_path: Path, in_config: dict[str, Any], named: str) -> None:
    folder = write_folder(tmp_path / "model", tiny_quantized("fp8"), nested("FP8"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": in_config}))
    with pytest.raises(CheckpointError, match=named):
        load_any(folder)


def test_a_tied_config_with_a_plain_head_that_differs(tmp_path: Path) -> None:
    weights = tiny_quantized("fp8")
    folder = write_folder(tmp_path / "model", weights, nested("FP8"), spec=tiny_spec(tie_embeddings=True))
    spec, loaded = load_any(folder)
    assert not spec.tie_embeddings and torch.equal(loaded["lm_head.weight"], weights["lm_head.weight"])


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if name not in names}


def with_tensor(name: str, tensor: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, name: tensor}


Q, K, UP, GATE = (f"{LAYER}.{name}_proj" for name in ("self_attn.q", "self_attn.k", "mlp.up", "mlp.gate"))
REFUSED: dict[str, tuple[str, Callable[[Weights], Weights], str]] = {
    "FP8 weight_scale missing": ("fp8", without(f"{DOWN}.weight_scale"), f"{DOWN} has scales and lacks"),
    "INT4 weight_scale missing": ("int4", without(f"{DOWN}.weight_scale"), f"{DOWN} has scales and lacks"),
    "weight missing": ("fp8", without(f"{DOWN}.weight"), f"{DOWN} has scales and lacks"),
    "input_scale missing": ("fp8", without(f"{DOWN}.input_scale"), f"{DOWN}.input_scale is missing"),
    "FP8 scale of other rows": ("fp8", with_tensor(f"{DOWN}.weight_scale", torch.ones(63)), "63 values, its weight 64"),
    "INT4 scale of other rows": ("int4", with_tensor(f"{DOWN}.weight_scale", torch.ones(32, 6)), "64 x 96"),
    "INT4 scale of uneven groups": ("int4", with_tensor(f"{DOWN}.weight_scale", torch.ones(64, 5)), r"\(64, 5\)"),
    "INT4 scale of one axis": ("int4", with_tensor(f"{DOWN}.weight_scale", torch.ones(64)), r"\(64,\)"),
    "INT4 weight of other rows": (
        "int4",
        with_tensor(f"{DOWN}.weight", torch.zeros(64, 96, dtype=torch.uint8)),
        r"shape \(128, 96\), expected \(64, 96\)",
    ),
    "weight of another type": ("int4", with_tensor(f"{GATE}.weight", torch.ones(96, 64)), "float32, supported are"),
    "weight of another type than its pre_quant_scale": (
        "int4",
        with_tensor(f"{DOWN}.weight", torch.ones(64, 96)),
        rf"{DOWN}\.pre_quant_scale of shape \(96,\) does not belong to this torch.float32",
    ),
    "FP8 weight without any scale": (
        "fp8",
        without(f"{DOWN}.weight_scale", f"{DOWN}.input_scale"),
        f"{DOWN} is quantized and has no scale",
    ),
    "FP8 weight without any scale beside others": (
        "fp8",
        without(f"{K}.weight_scale", f"{K}.input_scale"),
        f"{K} is quantized and has no scale",
    ),
    "INT4 weight without any scale": ("int4", without(f"{GATE}.weight_scale"), f"{GATE} is quantized and has no scale"),
    "INT4 weight without any scale beside others": (
        "int4",
        without(f"{UP}.weight_scale"),
        f"{UP} is quantized and has no scale",
    ),
    "a layer that is not quantized behind others": (
        "fp8",
        lambda w: without(f"{K}.weight_scale", f"{K}.input_scale")(w) | {f"{K}.weight": w[f"{K}.weight"].float()},
        f"{K} is not quantized, or lacks its weight_scale, beside layers",
    ),
    "an embedding with scales": (
        "fp8",
        lambda w: (
            w
            | {
                "model.embed_tokens.weight": w["model.embed_tokens.weight"].to(torch.float8_e4m3fn),
                "model.embed_tokens.weight_scale": torch.tensor(0.5),
                "model.embed_tokens.input_scale": torch.tensor(0.5),
            }
        ),
        "model.embed_tokens is quantized, supported are projections",
    ),
    "misshapen pre_quant_scale": (
        "int4",
        with_tensor(f"{DOWN}.pre_quant_scale", torch.ones(3)),
        rf"{DOWN}\.pre_quant_scale of shape \(3,\) does not belong",
    ),
    "pre_quant_scale of FP8": (
        "fp8",
        with_tensor(f"{DOWN}.pre_quant_scale", torch.full((96,), 2.0)),
        rf"{DOWN}\.pre_quant_scale of shape \(96,\) does not belong to this torch.float8",
    ),
    "input_scale of many values": (
        "fp8",
        with_tensor(f"{DOWN}.input_scale", torch.ones(3)),
        f"{DOWN}.input_scale is missing or not one number",
    ),
    "INT4 scale of no groups": ("int4", with_tensor(f"{DOWN}.weight_scale", torch.ones(64, 0)), r"shape \(64, 0\)"),
    "another pre_quant_scale than its neighbours'": (
        "int4",
        with_tensor(f"{LAYER}.self_attn.k_proj.pre_quant_scale", torch.ones(64)),
        "q_proj and .*k_proj and .*v_proj have different pre_quant_scale",
    ),
    "scales of an unknown layer": (
        "fp8",
        with_tensor("model.layers.7.mlp.down_proj.weight_scale", torch.tensor(1.0)),
        r"layers\.7\.mlp\.down_proj has scales and lacks",
    ),
    "NaN in a scale": ("int4", with_tensor(f"{DOWN}.weight_scale", torch.full((64, 6), torch.nan)), "holds .*NaN"),
    "infinite scale": ("fp8", with_tensor(f"{DOWN}.weight_scale", torch.tensor(torch.inf)), "infinite numbers"),
    "negative scale": ("fp8", with_tensor(f"{DOWN}.weight_scale", torch.tensor(-1.0)), "holds negative"),
    "inputs over zero": ("fp8", with_tensor(f"{DOWN}.input_scale", torch.tensor(0.0)), "input_scale holds 0, negative"),
    "NaN in FP8": (
        "fp8",
        lambda w: (
            w
            | {
                f"{DOWN}.weight": w[f"{DOWN}.weight"]
                .float()
                .index_fill(0, torch.tensor(5), torch.nan)
                .to(torch.float8_e4m3fn)
            }
        ),
        f"{DOWN}.weight holds NaN",
    ),
    "int8 without a scale": (
        "fp8",
        lambda w: (
            without(f"{K}.weight_scale", f"{K}.input_scale")(w) | {f"{K}.weight": torch.ones(32, 64, dtype=torch.int8)}
        ),
        f"{K} is quantized and has no scale",
    ),
    "no layer is quantized": ("fp8", lambda _: tiny_weights(tiny_spec()), "said to be quantized to fp8, and no layer"),
    "an unknown weight": ("fp8", with_tensor(f"{DOWN}.zeros", torch.ones(1)), f"unknown weight {DOWN}.zeros"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_layer_is_named(tmp_path: Path, case: str) -> None:
    precision, change, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model", change(tiny_quantized(precision)), precision)


def test_a_layer_that_is_not_quantized_before_others_is_named(tmp_path: Path) -> None:
    weights = tiny_quantized("fp8")
    weights |= {f"{Q}.weight": weights[f"{Q}.weight"].float()}
    weights = without(f"{Q}.weight_scale", f"{Q}.input_scale")(weights)
    with pytest.raises(CheckpointError, match="is not quantized"):
        load(tmp_path / "model", weights, "fp8")


def test_layers_of_another_kind_than_their_neighbours_are_refused() -> None:
    weights = tiny_quantized("fp8") | {f"{K}.weight": tiny_quantized("int4")[f"{K}.weight"]}
    with pytest.raises(CheckpointError, match=rf"{K}\.weight_scale has shape \(\)"):
        quantized_linear(weights, [Q, K], None)


# --- What a layer stands for ----------------------------------------------------------------------------------------


def e4m3(code: int) -> float:
    """Value of a float8 E4M3 byte (arXiv:2209.05433): a sign, four bits of exponent with bias 7, three of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


POSITIVE = torch.tensor([e4m3(code) for code in range(127)])


def nearest_e4m3(x: Tensor) -> Tensor:
    """The nearest value of the format, the even one of two that are as near, the largest beyond it."""
    above = torch.searchsorted(POSITIVE, x.abs().contiguous()).clamp(max=126)
    below = (above - 1).clamp(min=0)
    to_above, to_below = (POSITIVE[above] - x.abs()).abs(), (x.abs() - POSITIVE[below]).abs()
    takes_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return x.sign() * torch.where(takes_above, POSITIVE[above], POSITIVE[below])


def int4_weight(packed: Tensor, scale: Tensor) -> Tensor:
    """Byte [p, i]: weight [2 p, i] in its low and [2 p + 1, i] in its high four bits, each from -8 to 7."""
    rows: list[list[float]] = []
    group = packed.shape[1] // scale.shape[1]
    for p, line in enumerate(packed.tolist()):
        for half in (0, 1):
            values = [byte % 16 if half == 0 else byte // 16 for byte in line]
            row_scale = scale[2 * p + half].tolist()
            rows.append([(v - 16 if v >= 8 else v) * row_scale[i // group] for i, v in enumerate(values)])
    return torch.tensor(rows)


def fp8_weight(weight: Tensor, scale: Tensor) -> Tensor:
    scales = scale.reshape(-1).tolist()
    rows = weight.view(torch.uint8).tolist()
    return torch.tensor([[e4m3(code) * scales[o % len(scales)] for code in row] for o, row in enumerate(rows)])


def dequantized(weights: Weights) -> Weights:
    """Plain weights that stand for the same model, but for the inputs of FP8."""
    out = {name: weight for name, weight in weights.items() if not name.endswith("_scale")}
    for name in [name for name in weights if name.endswith(".weight_scale")]:
        layer = name.removesuffix(".weight_scale")
        by_hand = int4_weight if weights[f"{layer}.weight"].dtype == torch.uint8 else fp8_weight
        weight = by_hand(weights[f"{layer}.weight"], weights[name])
        out[f"{layer}.weight"] = weight * weights.get(f"{layer}.pre_quant_scale", torch.ones(1))
    return out


def test_every_byte_of_int4() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    scale = torch.rand(4, 8) + 0.1
    layer = AwqLinear(packed, scale, None, None)
    assert layer.shape == (4, 128)
    assert layer.group_size == 16
    assert torch.equal(layer.dequantized(), int4_weight(packed, scale))


def test_inputs_of_int4_are_multiplied_by_their_factors() -> None:
    factor, x = torch.rand(32) + 0.5, torch.randn(3, 32)
    packed = torch.randint(0, 256, (4, 32), dtype=torch.uint8)
    scale, bias = torch.rand(8, 2), torch.randn(8)
    found = AwqLinear(packed, scale, factor, bias)(x)
    assert relative_error(found, (x * factor) @ int4_weight(packed, scale).T + bias) < 1e-6


def test_every_byte_of_fp8() -> None:
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    values = codes.view(2, 127).view(torch.float8_e4m3fn)
    scale = torch.tensor([0.3, 0.7])
    layer = Fp8Linear(values, scale, torch.tensor(1.0), None)
    assert layer.shape == (2, 127)
    assert torch.equal(layer.dequantized(), fp8_weight(values, scale))


def test_inputs_of_fp8_are_rounded_to_the_nearest_and_cut_at_the_largest() -> None:
    scale = torch.tensor(0.25)
    ties = (POSITIVE[1:] + POSITIVE[:-1]) / 2
    x = torch.cat((torch.randn(2000) * 30, ties, -ties, POSITIVE, torch.tensor([1e6, -1e6, 0.0, 464.0, 500.0]))) * scale
    layer = Fp8Linear(torch.zeros(1, len(x), dtype=torch.float8_e4m3fn), torch.ones(1), scale, None)
    assert torch.equal(layer.prepare_input(x[None])[0], nearest_e4m3(x / scale) * scale)


def down_of(decoder: Decoder) -> QuantizedLinear:
    layer: nn.Module = decoder.blocks()[0].down
    assert isinstance(layer, QuantizedLinear)
    return layer


def test_weight_scales_of_each_row(tmp_path: Path) -> None:
    weights = tiny_quantized("fp8")
    scale = torch.rand(64) + 0.5
    decoder = load(tmp_path / "model", weights | {f"{DOWN}.weight_scale": scale}, "fp8")
    expected = fp8_weight(weights[f"{DOWN}.weight"], scale)
    assert torch.equal(down_of(decoder).dequantized(), expected)


def test_layers_with_one_input_are_joined_and_keep_their_weight_scales() -> None:
    weights = tiny_quantized("fp8") | {f"{K}.input_scale": torch.tensor([0.07])}
    layer = quantized_linear(weights, [Q, K], None)
    expected = torch.cat([fp8_weight(weights[f"{x}.weight"], weights[f"{x}.weight_scale"]) for x in (Q, K)])
    assert torch.equal(layer.dequantized(), expected)
    assert isinstance(layer, Fp8Linear)
    assert float(layer.input_scale) == pytest.approx(0.07)  # with the smaller one, its neighbour's inputs were cut off


@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_scales_keep_their_type_when_the_parameters_change_theirs(tmp_path: Path, precision: str) -> None:
    spec, weights = load_any(write_folder(tmp_path / "m", tiny_quantized(precision), nested(ALGORITHMS[precision])))
    found, expected = (
        down_of(Decoder.from_weights(spec, weights, dtype)).dequantized() for dtype in (torch.float16, torch.float32)
    )
    assert torch.equal(found, expected)


# --- What a model then computes -------------------------------------------------------------------------------------


def logits(decoder: Decoder) -> Tensor:
    """Logits of a prefill and a step behind it."""
    engine = target_engine(decoder, precision="fp32", max_batch=2, max_length=32)
    steps = [((2, 9), [0, 0], range(18)), ((2, 2), [9, 7], range(4))]
    found = [
        engine.step(tiny_ids(*shape), torch.tensor(at, dtype=torch.int32), torch.tensor(rows)).logits_RV
        for shape, at, rows in steps
    ]
    return torch.cat(found)


def quantize_inputs_by_hand(decoder: Decoder, scale: float) -> None:
    def prepare(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (nearest_e4m3(args[0] / scale) * scale,)

    for layer in decoder.blocks():
        for name in ("qkv", "o", "gate_up", "down"):
            getattr(layer, name).register_forward_pre_hook(prepare)


@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": True, "output_bias": True, "mlp_bias": True}], ids=["plain", "biases"]
)
def test_an_int4_model_is_the_model_of_its_dequantized_weights(tmp_path: Path, changes: dict[str, bool]) -> None:
    spec = tiny_spec(**changes)
    weights = tiny_quantized("int4", spec)
    found = logits(load(tmp_path / "model", weights, "int4", spec))
    assert relative_error(found, logits(Decoder.from_weights(spec, dequantized(weights)))) < 1e-5


def test_an_fp8_model_is_the_model_of_its_dequantized_weights_and_inputs(tmp_path: Path) -> None:
    weights = tiny_quantized("fp8")
    found = logits(load(tmp_path / "model", weights, "fp8"))
    plain = Decoder.from_weights(tiny_spec(), dequantized(weights))
    assert relative_error(found, logits(plain)) > 1e-2
    quantize_inputs_by_hand(plain, 0.05)
    assert relative_error(found, logits(plain)) < 1e-3  # another sum's last digit may turn a tie


def test_a_tied_model_with_a_quantized_head(tmp_path: Path) -> None:
    spec = tiny_spec(tie_embeddings=True)
    untied = tiny_weights(replace(spec, tie_embeddings=False))
    weights = tiny_quantized("int4", spec)
    head = quantized_weights(spec, {"head_proj.weight": untied["lm_head.weight"]}, "int4")
    weights |= {name.replace("head_proj", "lm_head"): tensor for name, tensor in head.items()}
    found = load(tmp_path / "model", weights, "int4", spec)
    assert isinstance(found.lm_head, AwqLinear)
    plain = Decoder.from_weights(replace(spec, tie_embeddings=False), dequantized(weights))
    assert relative_error(logits(found), logits(plain)) < 1e-5
