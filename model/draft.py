"""The draft model: what it is made of, how it starts from its target, how it is stored.

Two kinds. *Standalone*: a small decoder with the target's vocabulary. *Conditioned* (EAGLE-3, Li et al. 2025,
arXiv:2503.01840): one decoder layer over the embedding of a token joined with the target's features of the token
before it, or with the draft's own hidden state where the target has not been yet.

A draft has the hidden size of its target and shares its embedding and LM head rows, so neither is stored again.

Shapes: M tokens of the step, H hidden, F features = H, V head rows of the draft (the most frequent tokens).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ssv.model.checkpoint import CheckpointError, DecoderSpec, read_safetensors
from ssv.model.decoder import Attend, Decoder, replace_quantized
from ssv.model.quantized import SCALES, is_quantized
from ssv.support.errors import UserError
from ssv.support.files import save_whole
from ssv.support.json_text import parse_json

DraftKind = Literal["conditioned", "standalone"]


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """Shape of a draft.

    Attributes:
        decoder: spec of the draft's layers (its vocabulary is the target's).
        feature_layers: target layers that a conditioned draft sees; empty for a standalone one.
        head_size: number of tokens the LM head covers.
    """

    kind: DraftKind
    decoder: DecoderSpec
    feature_layers: tuple[int, ...]
    head_size: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "decoder": self.decoder.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DraftSpec:
        try:
            if data["kind"] not in ("conditioned", "standalone"):
                raise CheckpointError(f"draft kind {data['kind']!r} is unknown; known: conditioned, standalone")
            if unknown := sorted(data.keys() - {"kind", "decoder", "feature_layers", "head_size"}):
                raise CheckpointError(f"draft spec has an unknown field {unknown[0]!r}")
            layers, head_size = list(data["feature_layers"]), data["head_size"]
            if layers != sorted(set(layers)) or any(type(x) is not int or x < 0 for x in layers):
                raise CheckpointError(f"draft feature_layers {layers} must be different layer numbers, ascending")
            if bool(layers) != (data["kind"] == "conditioned"):
                raise CheckpointError(f"draft of kind {data['kind']} with feature_layers {layers}")
            decoder = DecoderSpec.from_dict(data["decoder"])
            if type(head_size) is not int or not 0 < head_size <= decoder.vocab_size:
                raise CheckpointError(f"draft head_size {head_size!r} must lie between 1 and {decoder.vocab_size}")
            return cls(kind=data["kind"], decoder=decoder, feature_layers=tuple(layers), head_size=head_size)
        except KeyError as error:
            raise CheckpointError(f"draft spec lacks {error.args[0]}") from error
        except (AttributeError, TypeError) as error:
            raise CheckpointError(f"draft spec is malformed ({error})") from error


def draft_spec(target: DecoderSpec, kind: DraftKind, layers: tuple[int, ...], head_size: int | None) -> DraftSpec:
    """Spec of a draft for a target.

    Args:
        layers: conditioned: target layers whose hidden states it sees; standalone: target layers it is made of.
        head_size: LM head rows, None for the whole vocabulary.

    Raises:
        UserError: layers outside the target, or a head larger than its vocabulary.
    """
    if not layers or not all(0 <= layer < target.num_layers for layer in layers):
        raise UserError(
            f"layers {list(layers)}", f"name at least one of the target's layers 0 to {target.num_layers - 1}"
        )
    head_size = head_size or target.vocab_size
    if head_size > target.vocab_size:
        raise UserError(f"head_size {head_size} exceeds the target's vocab_size {target.vocab_size}")
    conditioned = kind == "conditioned"
    return DraftSpec(
        kind=kind,
        decoder=replace(target, num_layers=1 if conditioned else len(layers), tie_embeddings=False),
        feature_layers=tuple(sorted(layers)) if conditioned else (),
        head_size=head_size,
    )


class FeatureTap(nn.Module):
    """The target's features for a conditioned draft: hidden states after chosen layers, joined and projected.

    The projection is trained with the draft but runs with the target, so that target features and the draft's own
    hidden state have one width F, and rows of both kinds share a draft step.
    """

    def __init__(self, layers: tuple[int, ...], target_hidden: int, num_features: int) -> None:
        super().__init__()
        self.layers = layers
        self.project = nn.Linear(len(layers) * target_hidden, num_features, bias=False)


class Draft(nn.Module):
    """A draft network.

    Attributes:
        token_ids: int64 [V], the vocabulary id of each LM head row, most frequent first.
        tap: the feature projection that runs with the target; None for a standalone draft.
    """

    token_ids: Tensor

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.spec = spec
        hidden, eps = spec.decoder.hidden_size, spec.decoder.rms_norm_eps
        self.decoder = Decoder(spec.decoder, head_size=spec.head_size)
        # On the CPU whatever the default device is: on "meta" arange imports sympy, half a second.
        self.register_buffer("token_ids", torch.arange(spec.head_size, device="cpu"))
        self.tap: FeatureTap | None = None
        if spec.kind == "conditioned":
            self.tap = FeatureTap(spec.feature_layers, hidden, hidden)
            self.embed_norm = nn.RMSNorm(hidden, eps)
            self.feature_norm = nn.RMSNorm(hidden, eps)
            self.join = nn.Linear(2 * hidden, hidden, bias=False)

    def run_layers(self, input_ids_M: Tensor, features_MF: Tensor | None, position_M: Tensor, attend: Attend) -> Tensor:
        """Hidden states [M, H] before the final norm; they are also the features of the next token drafted."""
        dtype = self.decoder.norm.weight.dtype  # in training the shared embedding is bf16, the draft fp32
        x_MH = self.decoder.embed(input_ids_M).to(dtype)
        if features_MF is not None:
            x_MH = self.join_features(x_MH, features_MF.to(dtype))
        return self.decoder.run_layers(x_MH, position_M, attend)[0]

    @property
    def conditioned(self) -> bool:
        return self.spec.kind == "conditioned"

    def join_features(self, x_MH: Tensor, features_MF: Tensor) -> Tensor:
        """What goes into the first layer of a conditioned draft."""
        # A residual on the features, so that an untrained join leaves the target's own last layer at work.
        return features_MF + self.join(torch.cat((self.embed_norm(x_MH), self.feature_norm(features_MF)), dim=-1))

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Logits over `token_ids`, [R, V]."""
        return self.decoder.logits(hidden_RH)

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything but what is shared with the target."""
        return {name: value for name, value in self.state_dict().items() if name not in _SHARED}

    def share_target(self, target: Decoder, token_ids: Tensor) -> None:
        """Takes the target's embedding and the LM head rows of `token_ids`, frozen."""
        self.token_ids = token_ids
        self.decoder.embed.weight = nn.Parameter(target.embed.weight, requires_grad=False)
        self.decoder.lm_head.weight = nn.Parameter(target.head_rows(token_ids), requires_grad=False)


_SHARED = ("decoder.embed.weight", "decoder.lm_head.weight")


def start_from_target(spec: DraftSpec, target: Decoder, layers: tuple[int, ...], token_ids: Tensor) -> Draft:
    """An untrained draft whose layers are copies of the target's.

    A conditioned draft starts as the target's last layer on the highest tapped features: its join begins at zero and
    its tap passes the last of the tapped layers through. Training then fits the join
    (`ssv.builder.training.distill.fit_start`).
    """
    draft = Draft(spec).to(target.embed.weight.device)
    conditioned = draft.tap is not None
    for mine, source in zip(
        draft.decoder.layers, (target.spec.num_layers - 1,) if conditioned else layers, strict=True
    ):
        mine.load_state_dict(target.layers[source].state_dict())
    draft.decoder.norm.load_state_dict(target.norm.state_dict())
    if draft.tap is not None:
        nn.init.zeros_(draft.join.weight)
        nn.init.zeros_(draft.tap.project.weight)
        hidden = spec.decoder.hidden_size
        draft.tap.project.weight.data[:, -hidden:] = torch.eye(hidden)
    draft.share_target(target, token_ids)
    return draft


def save_draft(draft: Draft, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes one safetensors file; its metadata carries the spec."""
    state = {
        name: value.to(dtype if value.is_floating_point() else torch.int32)
        for name, value in draft.trainable_state().items()
    }
    write_draft(draft.spec, state, path)


def write_draft(spec: DraftSpec, state: dict[str, Tensor], path: Path) -> None:
    """Writes a draft's tensors as they are."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_whole(state, path, metadata={"ssv_draft": json.dumps(spec.to_dict(), sort_keys=True)})


def load_draft(path: Path, target: Decoder, dtype: torch.dtype | None = torch.float32) -> Draft:
    """Reads a draft, quantized or not, and joins it to its target.

    Args:
        dtype: of what is not quantized; None for the types that the file has.

    Raises:
        CheckpointError: damaged file, weights that do not fit the spec, or a draft made for another target.
    """
    spec, state = _read_draft(path)
    for field in ("vocab_size", "hidden_size"):
        mine, theirs = getattr(spec.decoder, field), getattr(target.spec, field)
        if mine != theirs:
            raise CheckpointError(
                f"draft {field} {mine} != target {field} {theirs}", "distill the draft from this target"
            )
    if max(spec.feature_layers, default=0) >= target.spec.num_layers:
        raise CheckpointError(f"draft taps layer {max(spec.feature_layers)}, the target has {target.spec.num_layers}")
    with torch.device("meta"):
        draft = Draft(spec)
    expected = {name: value.shape for name, value in draft.trainable_state().items()}
    linears = [
        name for name, part in draft.named_modules() if isinstance(part, nn.Linear) and is_quantized(state, name)
    ]
    quantized = {f"{name}.{kind}" for name in linears for kind in ("weight", *SCALES)}
    expected = {name: shape for name, shape in expected.items() if name not in quantized}
    found = {name: value.shape for name, value in state.items() if name not in quantized}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CheckpointError(f"{path}: weight {wrong[0]} is missing, unknown or misshapen")
    replace_quantized(draft, {name: (name,) for name in linears}, state, dtype)
    token_ids = _checked_token_ids(spec, state.pop("token_ids"), path)
    # Copies, as in `state_from_weights`.
    plain = {name: value.to(dtype or value.dtype, copy=True) for name, value in state.items() if name not in quantized}
    draft.load_state_dict(plain, assign=True, strict=False)
    draft.share_target(target, token_ids)
    return draft.requires_grad_(False)


@dataclass(frozen=True, slots=True)
class DraftHead:
    """What is to be known of a draft beside a compiled engine of it.

    Attributes:
        token_ids: int64 [V], the vocabulary id of each LM head row.
    """

    spec: DraftSpec
    token_ids: Tensor


def load_draft_head(path: Path) -> DraftHead:
    """Reads what an engine's draft covers, without its target.

    Raises:
        CheckpointError: damaged file, or not a draft.
    """
    spec, state = _read_draft(path)
    if "token_ids" not in state or state["token_ids"].shape != (spec.head_size,):
        raise CheckpointError(f"{path}: weight token_ids is missing or misshapen")
    return DraftHead(spec, _checked_token_ids(spec, state["token_ids"], path))


def _read_draft(path: Path) -> tuple[DraftSpec, dict[str, Tensor]]:
    state = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "ssv_draft" not in metadata:
        raise CheckpointError(f"{path} is not a draft", "build one with `ssv-build distill`")
    try:
        facts = parse_json(metadata["ssv_draft"])
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata is not JSON ({error})") from error
    return DraftSpec.from_dict(facts), state


def _checked_token_ids(spec: DraftSpec, token_ids: Tensor, path: Path) -> Tensor:
    token_ids = token_ids.long()
    if token_ids.min() < 0 or token_ids.max() >= spec.decoder.vocab_size:
        raise CheckpointError(f"{path}: token_ids outside the vocabulary of {spec.decoder.vocab_size}")
    if len(token_ids.unique()) != len(token_ids):
        raise CheckpointError(f"{path}: token_ids name a token twice")
    return token_ids
