"""EAGLE-3 heads as others publish them (Li et al. 2025, arXiv:2503.01840): to a draft and back.

Two layouts, each a config.json and safetensors. In the *authors'* (SafeAILab/EAGLE; also SpecForge's, ModelOpt's,
SGLang's) config.json is a Llama's with `draft_vocab_size`, and tensors of the layer begin with `midlayer.`. In
*speculators'* (vllm-project/speculators) config.json holds a `transformer_layer_config`, and tensors begin with
`layers.0.`. Either name is read in both, as vLLM does.

    fc.weight                                  [H, X]   the product of the tapped hidden states
    fc_norm.0.weight, ... or input_norm.weight          their norms, where config.json says so
    layers.0.input_layernorm.weight            [H]      norm of the embedding
    layers.0.hidden_norm.weight                [H]      norm of the features
    layers.0.self_attn.q_proj.weight, ...      [., 2H]  and the rest of a Llama's or Qwen3's layer
    norm.weight, lm_head.weight                [H], [V, H]
    d2t                                        int64 [V]: row i is about token i + d2t[i]
    t2d                                        bool [U]: which tokens have a row
    embed_tokens.weight                        [U, H], where it is not the target's

The layouts number the target's layers differently. `eagle_aux_hidden_state_layer_ids` of speculators, as vLLM reads it,
is the number of layers that a tapped state has been through; in `eagle_config` of the authors' layout, as SGLang reads
it, it is the layer whose output is tapped. A config without either means the authors' default.

Shapes: H hidden of the head, X tapped hidden states joined, V rows of its LM head, U the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ssv.model.checkpoint import (
    FLOATS,
    PICKLES,
    CheckpointError,
    DecoderSpec,
    Weights,
    check_finite,
    check_shapes,
    hf_config,
    read_hf_config,
    read_hf_folder,
    read_safetensors,
    refuse_pickle,
    spec_from_hf_config,
)
from ssv.model.decoder import Decoder, fused_state, hf_names, hf_tensors
from ssv.model.draft import Draft, DraftSpec, Eagle3, StoredDraft, TapNorm, check_fits
from ssv.model.join_layer import with_join_as_layer
from ssv.model.quantized import QuantizedLinear
from ssv.support.errors import UserError

Layout = Literal["speculators", "eagle3"]

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TAPS = "eagle_aux_hidden_state_layer_ids"
_RENAMED = {
    "fc.weight": "tap.project.weight",
    "layers.0.input_layernorm.weight": "embed_norm.weight",
    "layers.0.hidden_norm.weight": "feature_norm.weight",
    "lm_head.weight": "decoder.lm_head.weight",
    "embed_tokens.weight": "decoder.embed.weight",
}


def is_eagle3(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors look like an EAGLE-3 head's, in either layout."""
    names = {_plain(name) for name in tensors}
    return {"fc.weight", "layers.0.hidden_norm.weight"} <= names


def read_eagle3(path: Path, target: Decoder) -> StoredDraft:
    """Reads a published head for a target.

    Args:
        path: a folder, or a safetensors file with config.json beside it.

    Raises:
        CheckpointError: a pickle, a damaged file, another kind of draft, a setting that is not supported or that two
            readers understand differently, tensors that are missing, unknown or misshapen, or a head that was made for
            another target.
    """
    config, tensors = _read(path)
    weights = {_plain(name): tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    is_speculators = "speculators_model_type" in config
    if not is_eagle3(weights):
        raise CheckpointError(
            f"{path} is no EAGLE-3 head: it lacks fc.weight or layers.0.hidden_norm.weight (midlayer.hidden_norm)"
        )
    try:
        layer = _layer_spec(config, target.spec)
        form = _form(config, layer, is_speculators)
        taps = _tapped_layers(config, weights["fc.weight"], form, target.spec.num_layers, is_speculators)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.what}", error.cure) from error
    embedding = weights.get("embed_tokens.weight")
    if embedding is not None and _is_same(embedding, target.embed.weight):
        del weights["embed_tokens.weight"]
    d2t, t2d = weights.pop("d2t", None), weights.pop("t2d", None)
    given = config.get("draft_vocab_size")
    head_size = layer.vocab_size if given is None else given
    if type(head_size) is not int or not 0 < head_size <= layer.vocab_size:
        raise CheckpointError(f"{path}: draft_vocab_size {given!r} must lie between 1 and {layer.vocab_size}")
    spec = DraftSpec(
        kind="conditioned",
        decoder=layer,
        feature_layers=taps,
        head_size=head_size,
        eagle3=form,
        own_embedding="embed_tokens.weight" in weights,
        own_lm_head="lm_head.weight" in weights,
    )
    check_fits(spec, target.spec)
    check_shapes(tensor_shapes(spec), weights, path)
    for name, weight in weights.items():
        if weight.dtype not in FLOATS:
            kind = str(weight.dtype).removeprefix("torch.")
            raise CheckpointError(f"{path}: weight {name} is {kind}, quantized", "give the original weights")
    check_finite(weights, path)
    token_ids = _token_ids(spec, d2t, t2d, path)
    return StoredDraft(spec, {"token_ids": token_ids.to(torch.int32), **_draft_state(spec, weights)})


def published(
    draft: Draft,
    layout: Layout,
    dtype: torch.dtype,
    *,
    target_layers: int,
    verifier: str,
    architecture: str,
    reader: str | None = None,
) -> tuple[dict[str, Any], Weights]:
    """config.json and tensors of a draft in a layout that others load: vLLM `speculators`, SGLang `eagle3`.

    Rows of the LM head are put in the order of their tokens, as others have them. A draft that joins token and features
    in our way has a layer more in `speculators`, which makes the join (`ssv.model.join_layer`).

    Args:
        dtype: of what is not a number of a token.
        target_layers: of the target.
        verifier, architecture: name or path of the target and its class in transformers, for who starts from the head.
        reader: who else it is for, to be named where the draft is refused.

    Raises:
        UserError: the draft computes something that the layout has no words for.
    """
    spec, form = draft.spec, draft.spec.eagle3
    if not draft.conditioned:
        raise UserError(
            "the draft stands alone, and an EAGLE-3 head sees its target's features",
            "give the model itself to the other engine",
        )
    if any(isinstance(part, QuantizedLinear) for part in draft.modules()):
        raise UserError("the draft is quantized, and the layout has no quantized tensors", "export the original draft")
    if form is None:
        if layout == "eagle3":  # its readers run a single layer
            raise UserError(
                "the draft joins token and features before its first layer, and an EAGLE-3 head does in its first "
                "layer's query, key and value",
                "distill one with `draft: {distill: {join: eagle3}}` in the recipe",
            )
        draft = with_join_as_layer(draft)
        spec, form = draft.spec, draft.spec.eagle3
    assert draft.tap is not None and form is not None
    _refuse_what_readers_lack(spec, layout, reader)
    order = draft.token_ids.argsort()
    weights: Weights = {
        theirs: draft.get_parameter(ours)
        for theirs, ours in _RENAMED.items()
        if ours != "decoder.embed.weight" or spec.own_embedding
    }
    weights["lm_head.weight"] = weights["lm_head.weight"][order]
    for name, norm in zip(_tap_norms(form, len(spec.feature_layers)), draft.tap.norms, strict=True):
        weights[name] = norm.get_parameter("weight")
    for module, parts in hf_names(spec.decoder).items():
        if module not in ("lm_head", "layers.0.attn_norm"):
            weights |= hf_tensors(draft.decoder.get_submodule(module), [(_plain(part), size) for part, size in parts])
    if spec.decoder.qkv_bias and not spec.decoder.output_bias:  # a Llama has both or neither
        weights |= {
            f"layers.{i}.self_attn.o_proj.bias": torch.zeros(spec.decoder.hidden_size)
            for i in range(spec.decoder.num_layers)
        }
    found = {name: weight.detach().to("cpu", dtype, copy=True).contiguous() for name, weight in weights.items()}
    if spec.head_size < spec.decoder.vocab_size:
        tokens = draft.token_ids[order].cpu()
        found["d2t"] = tokens - torch.arange(spec.head_size)
        found["t2d"] = torch.zeros(spec.decoder.vocab_size, dtype=torch.bool).index_fill_(0, tokens, True)
    if layout == "eagle3":
        found = {name.replace("layers.0.", "midlayer.", 1): tensor for name, tensor in found.items()}
        return _flat_config(spec, form, dtype, target_layers), found
    return _speculators_config(spec, form, dtype, verifier, architecture), found


# --- tensors --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Any], Weights]:
    refuse_pickle(path)
    if path.is_file():
        return read_hf_config(path.parent), read_safetensors(path)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        for pickled in sorted(file for file in path.iterdir() if file.suffix in PICKLES):
            refuse_pickle(pickled, str(path / "model.safetensors"))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    return read_hf_folder(path)


def _plain(name: str) -> str:
    """The name of a tensor in the layout that `tensor_shapes` has."""
    name = name.removeprefix("model.")
    return f"layers.0.{name.removeprefix('midlayer.')}" if name.startswith("midlayer.") else name


def _is_same(mine: Tensor, theirs: Tensor) -> bool:
    """Whether an embedding is the target's, but for its type."""
    return mine.shape == theirs.shape and torch.equal(mine, theirs.to("cpu", mine.dtype))


def _tap_norms(form: Eagle3, num_taps: int) -> list[str]:
    names = {"none": [], "each": [f"fc_norm.{i}.weight" for i in range(num_taps)], "joined": ["input_norm.weight"]}
    return names[form.tap_norm]


def tensor_shapes(spec: DraftSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a published head, without `d2t` and `t2d`."""
    assert spec.eagle3 is not None
    hidden, num_taps = spec.decoder.hidden_size, len(spec.feature_layers)
    num_tapped = num_taps * spec.eagle3.target_hidden_size
    shapes = {_plain(name): shape for name, shape in spec.decoder.weight_shapes().items()}
    for part in "qkv":
        name = f"layers.0.self_attn.{part}_proj.weight"
        shapes[name] = (shapes[name][0], 2 * hidden)
    shapes |= {"fc.weight": (hidden, num_tapped), "layers.0.hidden_norm.weight": (hidden,)}
    width = num_tapped if spec.eagle3.tap_norm == "joined" else spec.eagle3.target_hidden_size
    shapes |= dict.fromkeys(_tap_norms(spec.eagle3, num_taps), (width,))
    shapes.pop("embed_tokens.weight")
    shapes.pop("lm_head.weight", None)
    if spec.own_embedding:
        shapes["embed_tokens.weight"] = (spec.decoder.vocab_size, hidden)
    if spec.own_lm_head:
        shapes["lm_head.weight"] = (spec.head_size, hidden)
    return shapes


def _draft_state(spec: DraftSpec, weights: Weights) -> Weights:
    """The tensors under our names."""
    assert spec.eagle3 is not None
    renamed = dict(_RENAMED)
    for index, name in enumerate(_tap_norms(spec.eagle3, len(spec.feature_layers))):
        renamed[name] = f"tap.norms.{index}.weight"
    state = {ours: weights[theirs] for theirs, ours in renamed.items() if theirs in weights}
    others = {f"model.{name}": weight for name, weight in weights.items() if name not in renamed}
    return state | {f"decoder.{name}": weight for name, weight in fused_state(spec.decoder, others).items()}


def _token_ids(spec: DraftSpec, d2t: Tensor | None, t2d: Tensor | None, path: Path) -> Tensor:
    """Token of each LM head row, int64 [V]."""
    rows, vocab_size = torch.arange(spec.head_size), spec.decoder.vocab_size
    if d2t is None:
        if spec.head_size != vocab_size:
            raise CheckpointError(
                f"{path}: weight d2t is missing, which says what tokens its {spec.head_size} LM head rows are about"
            )
        return rows
    if tuple(d2t.shape) != (spec.head_size,) or d2t.is_floating_point() or d2t.dtype == torch.bool:
        shape, kind = tuple(d2t.shape), str(d2t.dtype).removeprefix("torch.")
        raise CheckpointError(f"{path}: weight d2t has shape {shape} of {kind}, expected ({spec.head_size},) of int64")
    token_ids = rows + d2t.long()
    if token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise CheckpointError(f"{path}: d2t names tokens outside the vocabulary of {vocab_size}")
    if len(token_ids.unique()) != len(token_ids):
        raise CheckpointError(f"{path}: d2t names a token twice")
    if t2d is not None:
        if tuple(t2d.shape) != (vocab_size,):
            raise CheckpointError(f"{path}: weight t2d has shape {tuple(t2d.shape)}, expected ({vocab_size},)")
        if int(t2d.bool().sum()) != spec.head_size or not bool(t2d.bool()[token_ids].all()):
            raise CheckpointError(f"{path}: t2d marks other tokens than d2t names: files of different heads?")
    return token_ids


# --- config.json ----------------------------------------------------------------------------------------------------


def _layer_spec(config: Mapping[str, Any], target: DecoderSpec) -> DecoderSpec:
    """Spec of the head's layers, for a target."""
    kind = config.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        raise CheckpointError(f"speculators_model_type {kind!r} is not supported, only 'eagle3'")
    layer = config.get("transformer_layer_config", {}) if "speculators_model_type" in config else config
    if not isinstance(layer, Mapping):
        raise CheckpointError(f"transformer_layer_config is {layer!r}, must be an object")
    family = layer.get("model_type", "llama")
    if family not in _ARCHITECTURES:
        raise CheckpointError(f"model_type {family!r} of its layer is not supported; supported: llama, qwen3")
    spec = spec_from_hf_config({**layer, "model_type": family, "architectures": [_ARCHITECTURES[family]]})
    # Many configs say 2048, what the head was trained on; its angles do not depend on it, and the target decides how
    # long a text can be.
    return replace(spec, max_positions=max(spec.max_positions, target.max_positions), tie_embeddings=False)


def _form(config: Mapping[str, Any], layer: DecoderSpec, is_speculators: bool) -> Eagle3:
    eagle_config = _eagle_config(config)
    if not _flag(eagle_config, "use_aux_hidden_state", True):
        raise CheckpointError("use_aux_hidden_state false: a head on the target's last hidden state is not supported")
    if is_speculators and config.get("norm_before_residual") is None:
        raise CheckpointError(
            "config.json lacks norm_before_residual, for which vLLM takes true and speculators false",
            "add what the head was trained with",
        )
    norms: dict[str, TapNorm] = {"fc_norm": "each", "norm_before_fc": "joined"}
    chosen = [name for name in norms if _flag(config, name) or _flag(eagle_config, name)]
    if len(chosen) > 1:
        raise CheckpointError("fc_norm and norm_before_fc exclude each other, and both are true")
    target_hidden_size = config.get("target_hidden_size")
    if target_hidden_size is None:
        target_hidden_size = layer.hidden_size
    return Eagle3.from_dict(
        {
            "target_hidden_size": target_hidden_size,
            "norm_before_residual": _flag(config, "norm_before_residual"),
            "tap_norm": norms[chosen[0]] if chosen else "none",
            "norm_output": _flag(config, "norm_output"),
        }
    )


def _tapped_layers(
    config: Mapping[str, Any], fc_HX: Tensor, form: Eagle3, num_layers: int, is_speculators: bool
) -> tuple[int, ...]:
    """The target's layers, from 0, whose outputs the head sees."""
    nested = _eagle_config(config).get(_TAPS)
    said = config.get(_TAPS)
    if said is not None and not is_speculators and nested is None:
        raise CheckpointError(
            f"{_TAPS} {said!r} stands at the top of config.json, where vLLM counts layers run before and SGLang names "
            "the layer itself",
            "put it into `eagle_config`, as layers whose outputs the head sees, counted from 0",
        )
    ids, shift = (said, 1) if is_speculators else (nested, 0)
    if ids is None:
        layers = [layer - 1 for layer in (2, num_layers // 2, num_layers - 3)]
        where = f"config.json lacks {_TAPS}, and its default for a target of {num_layers} layers is outputs of {layers}"
    elif isinstance(ids, list) and all(type(i) is int for i in ids):
        layers = [i - shift for i in ids]
        where = f"{_TAPS} {ids}"
    else:
        raise CheckpointError(f"{_TAPS} is {ids!r}, must be a list of layer numbers")
    if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= num_layers:
        raise CheckpointError(
            f"{where}: must be different layers of the target's {num_layers}, ascending, and not its embedding",
            "give the head that was made for this target",
        )
    num_tapped = len(layers) * form.target_hidden_size
    if fc_HX.dim() != 2 or fc_HX.shape[1] != num_tapped:
        raise CheckpointError(
            f"weight fc.weight has shape {tuple(fc_HX.shape)}, expected (hidden_size, {num_tapped}): {len(layers)} "
            f"tapped layers ({where}) of target_hidden_size {form.target_hidden_size}"
        )
    return tuple(layers)


def _eagle_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("eagle_config") or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"eagle_config is {found!r}, must be an object")
    return found


def _flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config.json has a value of the wrong type: {key} is {value!r}, must be true or false")
    return default if value is None else value


def _refuse_what_readers_lack(spec: DraftSpec, layout: Layout, reader: str | None) -> None:
    """What a layout's readers would leave out in silence, or stumble over."""
    layer, form = spec.decoder, spec.eagle3
    assert form is not None
    lacking = {
        "norms of query and key": layer.qk_norm,
        "biases of the MLP": layer.mlp_bias and layout == "eagle3",
        "biases of attention": (layer.qkv_bias or layer.output_bias) and layout == "eagle3",
        "an output bias without biases of query, key and value": layer.output_bias and not layer.qkv_bias,
        "norm_before_residual": form.norm_before_residual and layout == "eagle3",
        "norm_before_fc": form.tap_norm == "joined" and layout == "eagle3",
        "more than one layer": layer.num_layers > 1 and layout == "eagle3",
    }
    if found := [name for name, is_so in lacking.items() if is_so]:
        if reader is not None:
            raise UserError(f"the draft has {found[0]}, which is not exported for {reader}")
        reader = {"speculators": "vLLM", "eagle3": "SGLang"}[layout]
        cure = "export it as speculators, for vLLM" if layout == "eagle3" and not layer.qk_norm else ""
        raise UserError(f"the draft has {found[0]}, which {reader} does not read of layout {layout}", cure)


def _layer_config(spec: DraftSpec, dtype: torch.dtype) -> dict[str, Any]:
    """A Llama's config.json of the head's layers."""
    layer = replace(spec.decoder, family="llama", tie_embeddings=False)
    return hf_config(layer, [], dtype) | {"attention_bias": layer.qkv_bias}


def _flat_config(spec: DraftSpec, form: Eagle3, dtype: torch.dtype, target_layers: int) -> dict[str, Any]:
    config = _layer_config(spec, dtype) | {"architectures": ["LlamaForCausalLMEagle3"]}
    del config["eos_token_id"]
    taps = list(spec.feature_layers)
    config["eagle_config"] = {"use_aux_hidden_state": True}
    if taps != [layer - 1 for layer in (2, target_layers // 2, target_layers - 3)]:  # the default of all readers
        config["eagle_config"][_TAPS] = taps
    return config | {
        "draft_vocab_size": spec.head_size,
        "target_hidden_size": form.target_hidden_size,
        "num_aux_hidden_states": len(taps),
        "fc_norm": form.tap_norm == "each",
        "norm_output": form.norm_output,
    }


def _speculators_config(
    spec: DraftSpec, form: Eagle3, dtype: torch.dtype, verifier: str, architecture: str
) -> dict[str, Any]:
    layer = _layer_config(spec, dtype)
    del layer["eos_token_id"]
    options = {"fc_norm": form.tap_norm == "each", "norm_output": form.norm_output}
    # vLLM carries `norm_before_residual` and `norm_before_fc` over into the layer's config, and reads these only there.
    layer |= options | {"num_aux_hidden_states": len(spec.feature_layers)}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": verifier, "architectures": [architecture]},
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": spec.head_size,
        "target_hidden_size": form.target_hidden_size,
        _TAPS: [i + 1 for i in spec.feature_layers],
        "norm_before_residual": form.norm_before_residual,
        "norm_before_fc": form.tap_norm == "joined",
        **options,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
