"""The draft model: what it is made of, how it starts from its target, how it is stored.

Two kinds. *Standalone*: a small decoder with the target's vocabulary. *Conditioned* (EAGLE-3, Li et al. 2025,
arXiv:2503.01840): one decoder layer over the embedding of a token joined with the target's features of the token
before it, or with the draft's own hidden state where the target has not been yet.

A conditioned draft joins the two in one of two ways: ours, or EAGLE-3's as it is published (`Eagle3`).

A draft that is made here has the hidden size of its target and shares its embedding and LM head rows, so neither is
stored again. One that others made (`ssv.model.eagle3`, `ssv.model.standalone`) may have its own.

Shapes: M tokens of the step, H hidden of the draft, F features = H, J = 2 H, X tapped hidden states joined, V head rows
of the draft.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssv.model.checkpoint import (
    CheckpointError,
    DecoderSpec,
    check_shapes,
    read_safetensors,
    safetensors_metadata,
)
from ssv.model.decoder import Attend, Decoder, Layer, replace_quantized
from ssv.model.quantized import SCALES, is_quantized
from ssv.support.errors import UserError
from ssv.support.files import save_whole
from ssv.support.json_text import parse_json

DraftKind = Literal["conditioned", "standalone"]
DraftStorage = Literal["plain", "int8"]
TapNorm = Literal["none", "each", "joined"]


@dataclass(frozen=True, slots=True)
class Eagle3:
    """How an EAGLE-3 head computes as it is published, where a conditioned draft of ours does otherwise.

    Query, key and value of its first layer see the normed embedding and the normed features side by side, [M, J]. Ours
    adds a product of the two to the features, and its layer sees the norm of the sum.

    Attributes:
        target_hidden_size: width of each tapped hidden state.
        norm_before_residual: the first layer adds to the normed features, not to the features.
        tap_norm: what norms the tapped hidden states before their product: nothing, a norm for `each` (`fc_norm` of
            others), or one over all of them `joined` (`norm_before_fc`).
        norm_output: a hidden state is joined with the next token as the final norm makes it (EAGLE 3.1,
            arXiv:2605.09992).
    """

    target_hidden_size: int
    norm_before_residual: bool = False
    tap_norm: TapNorm = "none"
    norm_output: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Eagle3:
        """Raises CheckpointError for a field of a wrong type or value, TypeError for one that is unknown or missing."""
        found = cls(**data)
        if type(found.target_hidden_size) is not int or found.target_hidden_size < 1:
            raise CheckpointError(f"draft target_hidden_size {found.target_hidden_size!r} must be a number from 1 on")
        if found.tap_norm not in get_args(TapNorm):
            raise CheckpointError(
                f"draft tap_norm {found.tap_norm!r} is unknown; known: {', '.join(get_args(TapNorm))}"
            )
        for name in ("norm_before_residual", "norm_output"):
            _require_bool(name, getattr(found, name))
        return found


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """Shape of a draft.

    Attributes:
        decoder: spec of the draft's layers (its vocabulary is the target's).
        feature_layers: target layers that a conditioned draft sees; empty for a standalone one.
        head_size: number of tokens the LM head covers.
        eagle3: how it joins token and features, if as EAGLE-3 does.
        own_embedding, own_lm_head: whether it has these, and does not share the target's. With an embedding of its own
            and `decoder.tie_embeddings`, its LM head is rows of that.
        head_rank: of what is added to the target's LM head rows, a product of two matrices that are trained; 0 for
            nothing. Only a draft that is stored or trained has it: `load_draft` adds it up.
    """

    kind: DraftKind
    decoder: DecoderSpec
    feature_layers: tuple[int, ...]
    head_size: int
    eagle3: Eagle3 | None = None
    own_embedding: bool = False
    own_lm_head: bool = False
    head_rank: int = 0

    @property
    def ties_own(self) -> bool:
        """Whether the LM head is rows of the draft's own embedding."""
        return self.own_embedding and not self.own_lm_head and self.decoder.tie_embeddings

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON can have it, for `from_dict`."""
        facts = {**asdict(self), "decoder": self.decoder.to_dict()}
        # Not in drafts without it, so that they are what they were.
        return facts if self.head_rank else {name: value for name, value in facts.items() if name != "head_rank"}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DraftSpec:
        """Reads what `to_dict` gives.

        Raises:
            CheckpointError: a field is unknown, missing, of another type or out of range.
        """
        try:
            if data["kind"] not in ("conditioned", "standalone"):
                raise CheckpointError(f"draft kind {data['kind']!r} is unknown; known: conditioned, standalone")
            if unknown := sorted(data.keys() - {field.name for field in fields(cls)}):
                raise CheckpointError(f"draft spec has an unknown field {unknown[0]!r}")
            layers, head_size = list(data["feature_layers"]), data["head_size"]
            if layers != sorted(set(layers)) or any(type(x) is not int or x < 0 for x in layers):
                raise CheckpointError(f"draft feature_layers {layers} must be different layer numbers, ascending")
            if bool(layers) != (data["kind"] == "conditioned"):
                raise CheckpointError(f"draft of kind {data['kind']} with feature_layers {layers}")
            decoder = DecoderSpec.from_dict(data["decoder"])
            if type(head_size) is not int or not 0 < head_size <= decoder.vocab_size:
                raise CheckpointError(f"draft head_size {head_size!r} must lie between 1 and {decoder.vocab_size}")
            # Not in drafts that were stored before others' were read.
            eagle3 = None if data.get("eagle3") is None else Eagle3.from_dict(data["eagle3"])
            if eagle3 is not None and not layers:
                raise CheckpointError(f"draft of kind {data['kind']} that joins features as EAGLE-3 does")
            own = {name: data.get(name, False) for name in ("own_embedding", "own_lm_head")}
            for name, value in own.items():
                _require_bool(name, value)
            rank = data.get("head_rank", 0)
            if type(rank) is not int or not 0 <= rank <= decoder.hidden_size or (rank and any(own.values())):
                raise CheckpointError(
                    f"draft head_rank {rank!r} must lie between 0 and {decoder.hidden_size}, and is for one whose LM "
                    "head is rows of the target's"
                )
            return cls(data["kind"], decoder, tuple(layers), head_size, eagle3, **own, head_rank=rank)
        except KeyError as error:
            raise CheckpointError(f"draft spec lacks {error.args[0]}") from error
        except (AttributeError, TypeError) as error:
            raise CheckpointError(f"draft spec is malformed ({error})") from error


def _require_bool(name: str, value: object) -> None:
    if type(value) is not bool:
        raise CheckpointError(f"draft {name} {value!r} must be true or false")


def draft_spec(
    target: DecoderSpec,
    kind: DraftKind,
    layers: tuple[int, ...],
    head_size: int | None,
    *,
    eagle3: bool = False,
    num_layers: int = 1,
    head_rank: int = 0,
) -> DraftSpec:
    """Spec of a draft for a target.

    Args:
        layers: conditioned: target layers whose hidden states it sees; standalone: target layers it is made of.
        head_size: LM head rows, None for the whole vocabulary.
        eagle3: of a conditioned draft: whether it joins token and features as EAGLE-3 does, in a layer of Llama's form
            whatever the target's is, so that others load it.
        num_layers: of a conditioned draft.
        head_rank: see `DraftSpec`.

    Raises:
        UserError: layers outside the target, a head larger than its vocabulary, or a rank above its hidden size.
    """
    if not layers or not all(0 <= layer < target.num_layers for layer in layers):
        raise UserError(
            f"layers {list(layers)}", f"name at least one of the target's layers 0 to {target.num_layers - 1}"
        )
    head_size = head_size or target.vocab_size
    if head_size > target.vocab_size:
        raise UserError(f"head_size {head_size} exceeds the target's vocab_size {target.vocab_size}")
    if head_rank > target.hidden_size:
        raise UserError(f"head_rank {head_rank} exceeds the target's hidden_size {target.hidden_size}")
    conditioned = kind == "conditioned"
    decoder = replace(target, num_layers=num_layers if conditioned else len(layers), tie_embeddings=False)
    if eagle3:
        decoder = replace(
            decoder, family="llama", qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False
        )  # fmt: skip
    return DraftSpec(
        kind=kind,
        decoder=decoder,
        feature_layers=tuple(sorted(layers)) if conditioned else (),
        head_size=head_size,
        eagle3=Eagle3(target.hidden_size) if eagle3 else None,
        head_rank=head_rank,
    )


class FeatureTap(nn.Module):
    """The target's features for a conditioned draft: hidden states after chosen layers, joined and projected.

    The projection is trained with the draft but runs with the target, so that target features and the draft's own
    hidden state have one width F, and rows of both kinds share a draft step.

    Attributes:
        norms: over each of the tapped hidden states, or a single one over all of them; none at all in most drafts.
    """

    def __init__(
        self, layers: tuple[int, ...], target_hidden: int, num_features: int, norm: TapNorm = "none", eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.layers = layers
        num_tapped = len(layers) * target_hidden
        widths = {"none": [], "each": [target_hidden] * len(layers), "joined": [num_tapped]}[norm]
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps) for width in widths)
        self.project = nn.Linear(num_tapped, num_features, bias=False)

    def forward(self, tapped_MX: Tensor) -> Tensor:
        """The features, [M, F]."""
        if self.norms:
            parts = tapped_MX.chunk(len(self.norms), dim=-1)
            tapped_MX = torch.cat([norm(part) for norm, part in zip(self.norms, parts, strict=True)], dim=-1)
        features_MF: Tensor = self.project(tapped_MX)
        return features_MF


class Draft(nn.Module):
    """A draft network.

    Attributes:
        token_ids: int64 [V], the vocabulary id of each LM head row, most frequent first.
        tap: the feature projection that runs with the target; None for a standalone draft.
        residual_norm, carried_norm: see `part_norms`.
        head_in, head_out: what is added to the LM head's rows is the latter's weight times the former's; None without.
    """

    token_ids: Tensor
    head_in: nn.Linear | None
    head_out: nn.Linear | None

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.spec = spec
        hidden, eps, eagle3 = spec.decoder.hidden_size, spec.decoder.rms_norm_eps, spec.eagle3
        self.decoder = Decoder(spec.decoder, spec.head_size, first_inputs=2 * hidden if eagle3 is not None else None)
        # On the CPU whatever the default device is: on "meta" arange imports sympy, half a second.
        self.register_buffer("token_ids", torch.arange(spec.head_size, device="cpu"))
        self.tap: FeatureTap | None = None
        self.residual_norm: nn.RMSNorm | None = None
        self.carried_norm: nn.RMSNorm | None = None
        if spec.kind == "conditioned":
            if eagle3 is None:
                self.tap = FeatureTap(spec.feature_layers, hidden, hidden)
                self.join = nn.Linear(2 * hidden, hidden, bias=False)
            else:
                self.tap = FeatureTap(spec.feature_layers, eagle3.target_hidden_size, hidden, eagle3.tap_norm, eps)
            self.embed_norm = nn.RMSNorm(hidden, eps)
            self.feature_norm = nn.RMSNorm(hidden, eps)
        self.head_in = nn.Linear(hidden, spec.head_rank, bias=False) if spec.head_rank else None
        self.head_out = nn.Linear(spec.head_rank, spec.head_size, bias=False) if spec.head_rank else None

    def run_layers(self, input_ids_M: Tensor, features_MF: Tensor | None, position_M: Tensor, attend: Attend) -> Tensor:
        """Hidden states [M, H] before the final norm; `carried` makes the next token's features of them."""
        dtype = self.decoder.norm.weight.dtype  # in training the shared embedding is bf16, the draft fp32
        x_MH, joined_MJ = self.decoder.embed(input_ids_M).to(dtype), None
        if features_MF is not None:
            x_MH, joined_MJ = self.join_features(x_MH, features_MF.to(dtype))
        return self.decoder.run_layers(x_MH, position_M, attend, joined_MJ=joined_MJ)[0]

    @property
    def conditioned(self) -> bool:
        return self.spec.kind == "conditioned"

    @property
    def join_name(self) -> str:
        """Name of a conditioned draft's linear layer that sees the normed embedding and the normed features."""
        return "join" if self.spec.eagle3 is None else "decoder.layers.0.qkv"

    @property
    def norms_residual(self) -> bool:
        """Whether what `feature_norm` makes is the residual stream, too."""
        return self.spec.eagle3 is not None and self.spec.eagle3.norm_before_residual

    def join_features(self, x_MH: Tensor, features_MF: Tensor) -> tuple[Tensor, Tensor | None]:
        """What goes into the first layer of a conditioned draft: the residual stream, and what query, key and value see
        if that is not its norm."""
        joined_MJ = torch.cat((self.embed_norm(x_MH), self.feature_norm(features_MF)), dim=-1)
        if self.spec.eagle3 is None:
            # A residual on the features, so that an untrained join leaves the target's own last layer at work.
            return features_MF + self.join(joined_MJ), None
        return self.residual(features_MF), joined_MJ

    def residual(self, features_MF: Tensor) -> Tensor:
        """What the first layer of a head in EAGLE-3's form adds to."""
        return (self.residual_norm or self.feature_norm)(features_MF) if self.norms_residual else features_MF

    @property
    def carries_normed(self) -> bool:
        """Whether `carried` is the final norm."""
        return self.spec.eagle3 is not None and self.spec.eagle3.norm_output

    def carried(self, hidden_MH: Tensor) -> Tensor:
        """The features that the next token drafted is joined with, [M, F], from `run_layers`' hidden states."""
        return (self.carried_norm or self.decoder.norm)(hidden_MH) if self.carries_normed else hidden_MH

    def part_norms(self) -> None:
        """Gives a norm whose output goes two ways a copy for the second: who scales what one layer sees, as smoothing
        does, leaves the other as it is."""
        if self.norms_residual:
            self.residual_norm = copy.deepcopy(self.feature_norm)
        if self.carries_normed:
            self.carried_norm = copy.deepcopy(self.decoder.norm)

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Logits over `token_ids`, [R, V]."""
        if self.head_in is None or self.head_out is None:
            return self.decoder.logits(hidden_RH)
        normed_RH = self.decoder.norm(hidden_RH)
        added_RV: Tensor = self.head_out(self.head_in(normed_RH))
        return added_RV + self.decoder.lm_head(normed_RH)

    def merge_head(self) -> None:
        """Adds up the LM head, which is its own from then on."""
        if self.head_in is None or self.head_out is None:
            return
        rows_VH = self.decoder.lm_head.weight
        added_VH = self.head_out.weight.float() @ self.head_in.weight.float()
        self.decoder.lm_head.weight = nn.Parameter((rows_VH.float() + added_VH).to(rows_VH.dtype), requires_grad=False)
        self.head_in = self.head_out = None
        self.spec = replace(self.spec, own_lm_head=True, head_rank=0)

    def own_state(self) -> dict[str, Tensor]:
        """Everything but what is shared with the target, or is rows of the embedding."""
        kept = {"decoder.embed.weight": self.spec.own_embedding, "decoder.lm_head.weight": self.spec.own_lm_head}
        return {name: value for name, value in self.state_dict().items() if kept.get(name, True)}

    def share_target(self, target: Decoder, token_ids: Tensor) -> None:
        """Takes what is not its own, frozen: the target's embedding, and the LM head's rows of `token_ids`."""
        self.token_ids = token_ids
        decoder, spec = self.decoder, self.spec
        if not spec.own_embedding:
            decoder.embed.weight = nn.Parameter(target.embed.weight, requires_grad=False)
        if spec.ties_own:
            # A slice, not a copy: who ties its LM head covers the vocabulary from its first token on.
            decoder.lm_head.weight = nn.Parameter(decoder.embed.weight[: spec.head_size], requires_grad=False)
        elif not spec.own_lm_head:
            decoder.lm_head.weight = nn.Parameter(target.head_rows(token_ids), requires_grad=False)


def start_from_target(spec: DraftSpec, target: Decoder, layers: tuple[int, ...], token_ids: Tensor) -> Draft:
    """An untrained draft whose layers are copies of the target's.

    A conditioned draft starts as the target's last layer on the highest tapped features: its join begins at zero and
    its tap passes the last of the tapped layers through. Training then fits the join
    (`ssv.builder.training.distill.fit_start`). One that joins as EAGLE-3 does gives the embedding no weight, and leaves
    out what of the target's layer is not Llama's.
    """
    draft = Draft(spec).to(target.embed.weight.device)
    conditioned = draft.tap is not None
    last = (target.spec.num_layers - 1,) * spec.decoder.num_layers
    for index, (mine, source) in enumerate(zip(draft.decoder.blocks(), last if conditioned else layers, strict=True)):
        state = target.layers[source].state_dict()
        if spec.eagle3 is not None:
            draft.feature_norm.load_state_dict({"weight": state.pop("attn_norm.weight")})
            qkv = state["qkv.weight"]
            state["qkv.weight"] = torch.cat((torch.zeros_like(qkv), qkv), dim=1)
            state = {name: value for name, value in state.items() if name in mine.state_dict()}
        mine.load_state_dict(state)
        if conditioned and index:
            leave_out_at_first(mine)
    draft.decoder.norm.load_state_dict(target.norm.state_dict())
    if draft.tap is not None:
        if spec.eagle3 is None:
            nn.init.zeros_(draft.join.weight)
        nn.init.zeros_(draft.tap.project.weight)
        hidden = spec.decoder.hidden_size
        draft.tap.project.weight.data[:, -hidden:] = torch.eye(hidden)
    if draft.head_out is not None:
        nn.init.zeros_(draft.head_out.weight)
    draft.share_target(target, token_ids)
    return draft


def leave_out_at_first(layer: Layer) -> None:
    """Lets a layer add nothing to the residual stream until it is trained."""
    for linear in (layer.o, layer.down):
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)


@torch.no_grad()
def grow_draft(earlier: Draft, spec: DraftSpec, target: Decoder) -> Draft:
    """A draft of a larger shape that computes what an earlier one does, to be trained further.

    It may see further layers of the target, have further layers of its own and a correction of its LM head.

    Args:
        earlier: as `load_draft` reads it for training.

    Raises:
        UserError: the shapes differ in something else.
    """
    mine, theirs = spec.to_dict(), earlier.spec.to_dict()
    grown = {"head_rank", "feature_layers", "decoder"}
    differ = [name for name, value in mine.items() if name not in grown and value != theirs.get(name)]
    layers = {"num_layers": 0}
    if {**mine["decoder"], **layers} != {**theirs["decoder"], **layers}:
        differ.append("decoder")
    if earlier.spec.decoder.num_layers > spec.decoder.num_layers:
        differ.append("num_layers")
    if not set(earlier.spec.feature_layers) <= set(spec.feature_layers):
        differ.append("feature_layers")
    if earlier.spec.head_rank not in (0, spec.head_rank):
        differ.append("head_rank")
    if differ:
        raise UserError(
            f"the draft to start from has another {' and '.join(differ)} than the recipe asks for",
            "add layers, taps or a head_rank to what it has, or start from another",
        )
    draft = start_from_target(spec, target, spec.feature_layers, earlier.token_ids).to(torch.float32)
    draft.share_target(target, earlier.token_ids)
    state = {name: value for name, value in earlier.own_state().items() if name != "tap.project.weight"}
    draft.load_state_dict({name: value.to(torch.float32) for name, value in state.items()}, strict=False)
    if draft.tap is not None and earlier.tap is not None:
        width = earlier.tap.project.in_features // len(earlier.spec.feature_layers)
        draft.tap.project.weight.zero_()
        for index, layer in enumerate(earlier.spec.feature_layers):
            at = spec.feature_layers.index(layer)
            part = earlier.tap.project.weight[:, index * width : (index + 1) * width]
            draft.tap.project.weight[:, at * width : (at + 1) * width] = part
    return draft


def save_draft(
    draft: Draft, path: Path, dtype: torch.dtype = torch.bfloat16, *, storage: DraftStorage = "plain"
) -> None:
    """Writes one safetensors file; its metadata carries the spec.

    Args:
        dtype: of what is not stored as int8.
        storage: `int8` takes half the room: matrices are rounded, groups of 64 columns of a row sharing a scale. It is
            how the file is written, not how the draft computes: who reads it gets the numbers that were rounded.
    """
    state = {}
    for name, value in draft.own_state().items():
        if storage == "int8" and value.is_floating_point() and value.dim() == 2:
            state[name], state[name + _GROUP_SCALE] = _rounded(value)
        else:
            state[name] = value.to(dtype if value.is_floating_point() else torch.int32)
    write_draft(draft.spec, state, path)


_GROUP_SCALE = ".group_scale"
_GROUP = 64


def _rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as int8 [O, I], and its scales, bf16 [O, ceil(I / 64)]."""
    outputs, inputs = weight_OI.shape
    padded = F.pad(weight_OI.detach().float(), (0, -inputs % _GROUP)).view(outputs, -1, _GROUP)
    scale_OG = (padded.abs().amax(dim=-1) / 127).clamp(min=1e-12).to(torch.bfloat16)
    rounded = (padded / scale_OG.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return rounded.view(outputs, -1)[:, :inputs].contiguous(), scale_OG


def _unrounded(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A stored draft's tensors, those that were stored as int8 in fp32."""
    scales = {name: state.pop(name) for name in list(state) if name.endswith(_GROUP_SCALE)}
    for scale_name, scale_OG in scales.items():
        name = scale_name.removesuffix(_GROUP_SCALE)
        weight_OI = state.get(name)
        if weight_OI is None or weight_OI.dtype != torch.int8 or weight_OI.dim() != 2:
            raise CheckpointError(f"{path}: {scale_name} has no int8 matrix")
        expected = (weight_OI.shape[0], -(-weight_OI.shape[1] // _GROUP))
        if tuple(scale_OG.shape) != expected:
            raise CheckpointError(f"{path}: weight {scale_name} has shape {tuple(scale_OG.shape)}, expected {expected}")
        scale_OI = scale_OG.float().repeat_interleave(_GROUP, dim=1)[:, : weight_OI.shape[1]]
        state[name] = weight_OI.float() * scale_OI
    if bare := [name for name, value in state.items() if value.dtype == torch.int8]:
        raise CheckpointError(f"{path}: weight {bare[0]} is int8 and has no scales")
    return state


def write_draft(spec: DraftSpec, state: dict[str, Tensor], path: Path) -> None:
    """Writes a draft's tensors as they are."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_whole(state, path, metadata={"ssv_draft": json.dumps(spec.to_dict(), sort_keys=True)})


@dataclass(frozen=True, slots=True)
class StoredDraft:
    """A draft as it is stored, such as one that others made.

    Attributes:
        state: its tensors in the types that they have, `token_ids` among them.
    """

    spec: DraftSpec
    state: dict[str, Tensor]


def load_draft(
    path: Path, target: Decoder, dtype: torch.dtype | None = torch.float32, *, for_training: bool = False
) -> Draft:
    """Reads a draft, quantized or not, and joins it to its target.

    Args:
        dtype: of what is not quantized; None for the types that the file has.
        for_training: leaves the correction of its LM head apart from the target's rows.

    Raises:
        CheckpointError: damaged file, weights that do not fit the spec, or a draft made for another target.
    """
    spec, state = _read_draft(path)
    check_fits(spec, target.spec)
    with torch.device("meta"):
        draft = Draft(spec)
    expected = {name: tuple(value.shape) for name, value in draft.own_state().items()}
    linears = [
        name for name, part in draft.named_modules() if isinstance(part, nn.Linear) and is_quantized(state, name)
    ]
    quantized = {f"{name}.{kind}" for name in linears for kind in ("weight", *SCALES)}
    expected = {name: shape for name, shape in expected.items() if name not in quantized}
    check_shapes(expected, {name: value for name, value in state.items() if name not in quantized}, path)
    replace_quantized(draft, {name: (name,) for name in linears}, state, dtype)
    token_ids = _checked_token_ids(spec, state.pop("token_ids"), path)
    # Copies, as in `state_from_weights`.
    plain = {name: value.to(dtype or value.dtype, copy=True) for name, value in state.items() if name not in quantized}
    draft.load_state_dict(plain, assign=True, strict=False)
    draft.share_target(target, token_ids)
    if not for_training:
        draft.merge_head()
    return draft.requires_grad_(False)


def check_fits(spec: DraftSpec, target: DecoderSpec) -> None:
    """Raises CheckpointError for a draft that was made for another target."""
    mine, theirs = spec.decoder, target
    cure = "distill the draft from this target"
    if spec.eagle3 is not None or spec.own_embedding or spec.own_lm_head:
        cure = "give one that was made for this target"
    sizes = [("vocab_size", mine.vocab_size, "vocab_size", theirs.vocab_size)]
    if spec.eagle3 is not None:
        sizes.append(("target_hidden_size", spec.eagle3.target_hidden_size, "hidden_size", theirs.hidden_size))
    if not (spec.own_embedding and (spec.own_lm_head or spec.ties_own)) or (spec.feature_layers and not spec.eagle3):
        sizes.append(("hidden_size", mine.hidden_size, "hidden_size", theirs.hidden_size))
    for name, size, of_target, expected in sizes:
        if size != expected:
            raise CheckpointError(f"draft {name} {size} != target {of_target} {expected}", cure)
    if max(spec.feature_layers, default=0) >= theirs.num_layers:
        raise CheckpointError(f"draft taps layer {max(spec.feature_layers)}, the target has {theirs.num_layers}")


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


def is_ours(path: Path) -> bool:
    """Whether a file is a draft as `save_draft` writes it.

    Raises:
        CheckpointError: see `read_safetensors`.
    """
    return "ssv_draft" in safetensors_metadata(path)


def _read_draft(path: Path) -> tuple[DraftSpec, dict[str, Tensor]]:
    state, metadata = read_safetensors(path), safetensors_metadata(path)
    if "ssv_draft" not in metadata:
        raise CheckpointError(f"{path} is not a draft", "build one with `ssv-build distill`")
    try:
        facts = parse_json(metadata["ssv_draft"])
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata is not JSON ({error})") from error
    return DraftSpec.from_dict(facts), _unrounded(state, path)


def _checked_token_ids(spec: DraftSpec, token_ids: Tensor, path: Path) -> Tensor:
    token_ids = token_ids.long()
    if token_ids.min() < 0 or token_ids.max() >= spec.decoder.vocab_size:
        raise CheckpointError(f"{path}: token_ids outside the vocabulary of {spec.decoder.vocab_size}")
    if len(token_ids.unique()) != len(token_ids):
        raise CheckpointError(f"{path}: token_ids name a token twice")
    return token_ids
