"""Medusa's heads (Cai et al. 2024, arXiv:2401.10774): several next tokens at once, each guessed from the target's last
hidden state.

Head d (from 0) guesses the token d + 2 places behind the one whose hidden state it is given: the token between them is
the target's own choice. A head is a stack of ResBlocks, x + SiLU(linear(x)), over the normed hidden state, and an LM
head. Heads that we train share the target's LM head rows of the most frequent tokens, so that these are not stored;
published heads have LM heads of their own.

Shapes: R rows, H hidden, D heads, V LM head rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ssv.model.checkpoint import CheckpointError, DecoderSpec, Weights, check_shapes, read_safetensors, refuse_pickle
from ssv.model.decoder import Decoder
from ssv.support.files import save_whole
from ssv.support.json_text import parse_json


@dataclass(frozen=True, slots=True)
class HeadsSpec:
    """Shape of heads.

    Attributes:
        num_heads: D.
        num_layers: ResBlocks of each head.
        hidden_size, vocab_size: the target's.
        head_size: tokens that the LM heads cover.
        own_lm_heads: whether each head has an LM head of its own; otherwise all share the target's rows.
        rms_norm_eps: of the target's final norm.
    """

    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    head_size: int
    own_lm_heads: bool
    rms_norm_eps: float

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON can have it, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HeadsSpec:
        """Raises CheckpointError for a field that is unknown, missing or out of range."""
        try:
            spec = cls(**data)
        except TypeError as error:
            raise CheckpointError(f"spec of heads is malformed ({error})") from error
        for name in ("num_heads", "num_layers", "hidden_size", "vocab_size", "head_size"):
            value = getattr(spec, name)
            if type(value) is not int or value < 1:
                raise CheckpointError(f"heads: {name} {value!r} must be a number from 1 on")
        if spec.head_size > spec.vocab_size:
            raise CheckpointError(f"heads: head_size {spec.head_size} exceeds vocab_size {spec.vocab_size}")
        if type(spec.own_lm_heads) is not bool or type(spec.rms_norm_eps) is not float or not spec.rms_norm_eps > 0:
            raise CheckpointError("heads: own_lm_heads must be true or false, and rms_norm_eps a number above 0")
        return spec


def heads_spec(target: DecoderSpec, num_heads: int, num_layers: int, head_size: int | None) -> HeadsSpec:
    """Spec of heads that share a target's LM head.

    Args:
        head_size: tokens that it covers, None for the whole vocabulary.

    Raises:
        CheckpointError: a head larger than the target's vocabulary.
    """
    shape: dict[str, Any] = {"num_heads": num_heads, "num_layers": num_layers, "own_lm_heads": False}
    return HeadsSpec.from_dict({**shape, "head_size": head_size or target.vocab_size, **_facts_of(target)})


def _facts_of(target: DecoderSpec) -> dict[str, Any]:
    return {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "rms_norm_eps": float(target.rms_norm_eps),
    }


class Heads(nn.Module):
    """The heads as a network.

    Attributes:
        token_ids: int64 [V], the vocabulary id of each LM head row.
        norm: a copy of the target's final norm.
        lm_heads: one for each head, or one that all of them share.
    """

    token_ids: Tensor

    def __init__(self, spec: HeadsSpec) -> None:
        super().__init__()
        self.spec = spec
        hidden = spec.hidden_size
        # On the CPU whatever the default device is, as a draft's.
        self.register_buffer("token_ids", torch.arange(spec.head_size, device="cpu"))
        self.norm = nn.RMSNorm(hidden, spec.rms_norm_eps)
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(spec.num_layers)) for _ in range(spec.num_heads)
        )
        num_lm_heads = spec.num_heads if spec.own_lm_heads else 1
        self.lm_heads = nn.ModuleList(nn.Linear(hidden, spec.head_size, bias=False) for _ in range(num_lm_heads))

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Logits of every head, [R, D, V], over `token_ids`.

        Args:
            hidden_RH: the target's hidden states before its final norm.
        """
        normed_RH = self.norm(hidden_RH)
        return torch.stack([self.head_logits(head, normed_RH) for head in range(self.spec.num_heads)], dim=1)

    def head_logits(self, head: int, normed_RH: Tensor) -> Tensor:
        """Logits of one head, [R, V]; hidden states after the final norm."""
        x_RH = normed_RH
        for layer in self.blocks[head]:  # type: ignore[attr-defined]  # a ModuleList
            x_RH = x_RH + F.silu(layer(x_RH))
        logits_RV: Tensor = self.lm_heads[head if self.spec.own_lm_heads else 0](x_RH)
        return logits_RV

    def own_state(self) -> dict[str, Tensor]:
        """Everything but what is the target's."""
        shared = ("norm.",) if self.spec.own_lm_heads else ("norm.", "lm_heads.")
        return {name: value for name, value in self.state_dict().items() if not name.startswith(shared)}

    def share_target(self, target: Decoder, token_ids: Tensor) -> None:
        """Takes the target's final norm and, without LM heads of its own, its LM head's rows of `token_ids`, frozen."""
        self.share(target.norm.weight, None if self.spec.own_lm_heads else target.head_rows(token_ids), token_ids)

    def share(self, norm_H: Tensor, rows_VH: Tensor | None, token_ids: Tensor) -> None:
        """The same, of the weights of the norm and of the rows."""
        self.token_ids = token_ids
        self.norm.weight = nn.Parameter(norm_H.clone(), requires_grad=False)
        if rows_VH is not None:
            self.lm_heads[0].weight = nn.Parameter(rows_VH, requires_grad=False)


def start_heads(spec: HeadsSpec, target: Decoder, token_ids: Tensor) -> Heads:
    """Untrained heads: their ResBlocks begin at zero, as in the paper, so that each guesses as the target does."""
    heads = Heads(spec).to(target.embed.weight.device)
    for parameter in heads.blocks.parameters():
        nn.init.zeros_(parameter)
    heads.share_target(target, token_ids)
    return heads


def save_heads(heads: Heads, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes one safetensors file; its metadata carries the spec."""
    state = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else torch.int32).contiguous().clone()
        for name, value in heads.own_state().items()
    }
    save_whole(state, path, metadata={"ssv_heads": json.dumps(heads.spec.to_dict(), sort_keys=True)})


@dataclass(frozen=True, slots=True)
class HeadsFile:
    """A file of heads that has been read and checked. Its tensors are mapped: what nobody uses is not in memory.

    Attributes:
        token_ids_V: int64.
        state: ResBlocks and, of published heads, LM heads.
    """

    spec: HeadsSpec
    token_ids_V: Tensor
    state: Weights

    @property
    def num_numbers(self) -> int:
        """How many numbers the heads have that are made of it, their LM heads included."""
        shared = 0 if self.spec.own_lm_heads else self.spec.head_size * self.spec.hidden_size
        return shared + sum(value.numel() for value in self.state.values())

    def of(self, target: Decoder, *, holds_embedding: bool = False) -> HeadsParts:
        """Beside what the heads share with their target, without holding the rest of it.

        Args:
            holds_embedding: whether the target's embedding stays where it is anyway, as that of an engine on a CPU
                does: if it is the LM head too, its rows are copied when they are needed.
        """
        norm_H, head = target.norm.weight.clone(), target.lm_head
        if self.spec.own_lm_heads:
            return HeadsParts(self, norm_H)
        is_tied = isinstance(head, nn.Linear) and head.weight.data_ptr() == target.embed.weight.data_ptr()
        if is_tied and holds_embedding:
            return HeadsParts(self, norm_H, target.embed.weight, self.token_ids_V)
        return HeadsParts(self, norm_H, target.head_rows(self.token_ids_V), torch.arange(self.spec.head_size))


@dataclass(frozen=True, slots=True)
class HeadsParts:
    """All that heads are made of, for whoever may never need them.

    Attributes:
        norm_H: weight of the target's final norm.
        lm_head_UH, rows_V: rows of the target's, in its embedding's type, and which of them the heads' LM head has;
            None for heads with LM heads of their own.
    """

    file: HeadsFile
    norm_H: Tensor
    lm_head_UH: Tensor | None = None
    rows_V: Tensor | None = None

    def make(self, dtype: torch.dtype | None = torch.float32) -> Heads:
        """The heads.

        Args:
            dtype: None for the types that the file has.
        """
        with torch.device("meta"):
            heads = Heads(self.file.spec)
        # Copies: a file that is mapped stays mapped as long as a part of it is used.
        copies = {name: value.to(dtype or value.dtype, copy=True) for name, value in self.file.state.items()}
        heads.load_state_dict(copies, assign=True, strict=False)
        rows_VH = self.lm_head_UH[self.rows_V] if self.lm_head_UH is not None else None
        heads.share(self.norm_H, rows_VH, self.file.token_ids_V)
        return heads.requires_grad_(False)


def load_heads(path: Path, target: Decoder, dtype: torch.dtype | None = torch.float32) -> Heads:
    """Reads heads and joins them to their target.

    Args:
        dtype: None for the types that the file has.

    Raises:
        CheckpointError: see `read_heads`.
    """
    return read_heads(path, target.spec).of(target).make(dtype)


def read_heads(path: Path, target: DecoderSpec) -> HeadsFile:
    """Reads and checks heads, ours or published ones (see `from_published`).

    Raises:
        CheckpointError: a pickle, a damaged file, no heads, weights that do not fit the spec, or heads made for another
            target.
    """
    refuse_pickle(path)
    state = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        facts = (file.metadata() or {}).get("ssv_heads")
    if facts is None:
        published = from_published(state, path)
        vocab_size = target.vocab_size if "token_ids" in published.state else published.num_rows
        if published.num_rows > vocab_size:
            raise CheckpointError(f"{path}: {published.num_rows} LM head rows exceed the vocabulary of {vocab_size}")
        shape = {**_facts_of(target), "hidden_size": published.hidden_size, "vocab_size": vocab_size}
        spec = HeadsSpec(
            published.num_heads, published.num_layers, head_size=published.num_rows, own_lm_heads=True, **shape
        )
        state = {"token_ids": torch.arange(spec.head_size), **published.state}
    else:
        try:
            spec = HeadsSpec.from_dict(parse_json(facts))
        except ValueError as error:
            raise CheckpointError(f"{path}: its metadata cannot be read ({error})") from error
    for field in ("vocab_size", "hidden_size"):
        mine, theirs = getattr(spec, field), getattr(target, field)
        if mine != theirs:
            raise CheckpointError(
                f"heads' {field} {mine} != target {field} {theirs}",
                "distill heads from this target (`ssv-build distill --kind medusa`)",
            )
    if spec.num_heads * spec.num_layers > len(state):
        raise CheckpointError(f"{path}: {spec.num_heads} heads of {spec.num_layers} ResBlocks are not all there")
    with torch.device("meta"):
        heads = Heads(spec)
    check_shapes({name: tuple(value.shape) for name, value in heads.own_state().items()}, state, path)
    token_ids = state.pop("token_ids").long()
    if token_ids.min() < 0 or token_ids.max() >= spec.vocab_size:
        raise CheckpointError(f"{path}: token_ids outside the vocabulary of {spec.vocab_size}")
    if len(token_ids.unique()) != len(token_ids):
        raise CheckpointError(f"{path}: token_ids name a token twice")
    return HeadsFile(spec, token_ids, state)


# --- published heads ------------------------------------------------------------------------------------------------

_PREFIX = re.compile(r"^medusa_heads?\.")
_LAYER = (
    re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)"),  # the authors' (FasterDecoding/Medusa)
    re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)"),  # vLLM's
)
_LM_HEAD = (re.compile(r"(\d+)\.\d+\.weight"), re.compile(r"lm_heads\.(\d+)\.weight"))


@dataclass(frozen=True, slots=True)
class PublishedHeads:
    """What a published file holds, under our names.

    Attributes:
        state: `token_ids` only where the file names the tokens of its LM head rows.
        num_rows: of each LM head.
    """

    state: Weights
    num_heads: int
    num_layers: int
    hidden_size: int
    num_rows: int


def from_published(state: Mapping[str, Tensor], path: Path) -> PublishedHeads:
    """Heads in either layout that others publish.

    The authors' has `{head}.{layer}.linear.weight`, `.bias` and `{head}.{layers}.weight` for the LM head. vLLM's has
    `blocks.{head}.layers.{layer}.weight`, `lm_heads.{head}.weight` and, with a cut vocabulary, `token_map`.

    Args:
        path: for messages.

    Raises:
        CheckpointError: another layout, or tensors that are missing, unknown or misshapen.
    """
    found: Weights = {}
    for full, tensor in state.items():
        name = _PREFIX.sub("", full)
        if name == "token_map":
            found["token_ids"] = tensor
        elif match := _LAYER[0].fullmatch(name) or _LAYER[1].fullmatch(name):
            found["blocks.{}.{}.{}".format(*match.groups())] = tensor
        elif match := _LM_HEAD[0].fullmatch(name) or _LM_HEAD[1].fullmatch(name):
            found[f"lm_heads.{match[1]}.weight"] = tensor
        else:
            raise CheckpointError(f"{path} holds {full}, which no known layout of Medusa's heads has")
    first, lm_head = found.get("blocks.0.0.weight"), found.get("lm_heads.0.weight")
    if first is None or lm_head is None or first.dim() != 2 or lm_head.dim() != 2:
        raise CheckpointError(f"{path} holds no Medusa heads: a first head with a ResBlock and an LM head is missing")
    weights = [name for name in found if name.startswith("blocks.") and name.endswith(".weight")]
    numbers = [tuple(map(int, name.split(".")[1:3])) for name in weights]
    num_heads, num_layers = (1 + max(each) for each in zip(*numbers, strict=True))
    hidden = first.shape[0]
    if (token_ids := found.get("token_ids")) is not None:
        for name, tensor in found.items():
            if name.startswith("lm_heads.") and len(tensor) > len(token_ids):
                if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < len(tensor):
                    raise CheckpointError(f"{path}: token_map names tokens that {name} has no row for")
                found[name] = tensor[token_ids.long()]
    for name in weights:  # vLLM's have no bias as a rule
        found.setdefault(name.removesuffix("weight") + "bias", first.new_zeros(hidden))
    return PublishedHeads(found, num_heads, num_layers, hidden, len(found["lm_heads.0.weight"]))
