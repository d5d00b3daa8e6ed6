"""EAGLE-3 heads as others publish them, on weights at random, and what they compute by a plain reimplementation.

Written after cnets.py of SafeAILab/EAGLE and `Eagle3DraftModel` of vllm-project/speculators, on lists of tokens,
without a cache and without anything of ours. Beside it is what asks our networks and engines the same.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import random_weight, relative_error, tiny_decoder, tiny_ids, whole_window
from torch import Tensor

from ssv.model.decoder import Decoder
from ssv.model.draft import Draft, load_draft, write_draft
from ssv.model.eagle3 import read_eagle3
from ssv.runtime.engines.contract import Engine, StepOutput

Drafted = list[tuple[Tensor, int]]
"""Logits and token of each token drafted."""

TEXT = tiny_ids(9).tolist()
DEPTH = 3
OWN_EMBEDDING = torch.randn(112, 64, generator=torch.Generator().manual_seed(21))
FORMS: dict[str, dict[str, Any]] = {
    "as in the paper": {},
    "norm before residual": {"norm_before_residual": True},
    "norm of each tap": {"tap_norm": "fc_norm"},
    "one norm of all taps": {"tap_norm": "norm_before_fc"},
    "normed output": {"norm_output": True},
    "EAGLE 3.1": {"tap_norm": "fc_norm", "norm_output": True, "norm_before_residual": True},
    "own embedding": {"embedding": OWN_EMBEDDING},
    "the target's LM head": {"own_lm_head": False, "rows": 112},
    "whole vocabulary": {"rows": 112},
    "biases": {"attention_bias": True},
    "two layers": {"num_layers": 2},
    "another width": {"target_hidden": 96, "embedding": OWN_EMBEDDING},
}
HEADS, KV_HEADS, DIM, INNER, ROWS = 4, 2, 16, 96, 40
LAYER = {
    "model_type": "llama",
    "hidden_act": "silu",
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "rms_norm_eps": 1e-2,
    "rope_theta": 5000.0,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}


@dataclass
class Published:
    """A head: its config.json and tensors, and what the reimplementation has to know beside them.

    Attributes:
        runs: how many of the target's layers each tapped hidden state has been through.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    runs: tuple[int, ...] = (2, 4, 5)
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / "model.safetensors")
        return folder

    @property
    def token_ids(self) -> list[int]:
        d2t = self.tensors.get("d2t")
        return list(range(112)) if d2t is None else [row + int(offset) for row, offset in enumerate(d2t)]


def published(
    layout: str,
    *,
    hidden: int = 64,
    target_hidden: int = 64,
    vocab_size: int = 112,
    rows: int = ROWS,
    num_layers: int = 1,
    num_taps: int = 3,
    family: str = "llama",
    attention_bias: bool = False,
    norm_before_residual: bool = False,
    tap_norm: str | None = None,
    norm_output: bool = False,
    embedding: Tensor | None = None,
    own_lm_head: bool = True,
    seed: int = 11,
) -> Published:
    """A head in the layout `eagle3` (its authors') or `speculators`."""
    torch.manual_seed(seed)
    q, kv = HEADS * DIM, KV_HEADS * DIM
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, num_taps * target_hidden), "norm.weight": (hidden,)}
    if tap_norm == "fc_norm":
        shapes |= {f"fc_norm.{i}.weight": (target_hidden,) for i in range(num_taps)}
    if tap_norm == "norm_before_fc":
        shapes["input_norm.weight"] = (num_taps * target_hidden,)
    for layer in range(num_layers):
        at = "midlayer." if layout == "eagle3" and layer == 0 else f"layers.{layer}."
        seen = 2 * hidden if layer == 0 else hidden
        shapes |= {
            f"{at}self_attn.q_proj.weight": (q, seen),
            f"{at}self_attn.k_proj.weight": (kv, seen),
            f"{at}self_attn.v_proj.weight": (kv, seen),
            f"{at}self_attn.o_proj.weight": (hidden, q),
            f"{at}mlp.gate_proj.weight": (INNER, hidden),
            f"{at}mlp.up_proj.weight": (INNER, hidden),
            f"{at}mlp.down_proj.weight": (hidden, INNER),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
        if layer == 0:
            shapes[f"{at}hidden_norm.weight"] = (hidden,)
        if attention_bias:
            sizes = {"q": q, "k": kv, "v": kv, "o": hidden}
            shapes |= {f"{at}self_attn.{part}_proj.bias": (size,) for part, size in sizes.items()}
        if family == "qwen3":
            shapes |= {f"{at}self_attn.{part}_norm.weight": (DIM,) for part in "qk"}
    if own_lm_head:
        shapes["lm_head.weight"] = (rows, hidden)
    tensors = {name: random_weight(name, shape) for name, shape in shapes.items()}
    if embedding is not None:
        tensors["embed_tokens.weight"] = embedding
    if rows < vocab_size:
        kept = torch.randperm(vocab_size)[:rows].sort().values
        tensors["d2t"] = kept - torch.arange(rows)
        tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, kept, True)
    layer_config = LAYER | {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": num_layers,
        "vocab_size": vocab_size,
        "attention_bias": attention_bias,
    }
    options = {
        "draft_vocab_size": rows,
        "norm_output": norm_output,
        "fc_norm": tap_norm == "fc_norm",
        "norm_before_fc": tap_norm == "norm_before_fc",
    }
    if target_hidden != hidden:
        options["target_hidden_size"] = target_hidden
    if layout == "eagle3":
        config = layer_config | {"architectures": ["LlamaForCausalLMEagle3"]} | options
        if norm_before_residual:
            config["norm_before_residual"] = True
    else:
        config = {
            "speculators_model_type": "eagle3",
            "transformer_layer_config": layer_config,
            "norm_before_residual": norm_before_residual,
            **options,
        }
    known = {"norm_before_residual": norm_before_residual, "tap_norm": tap_norm, "norm_output": norm_output}
    return Published(config, tensors, options=known)


# --- by hand --------------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean() + LAYER["rms_norm_eps"]) * weight


def turned(x: Tensor, position: int) -> Tensor:
    """A head's vector turned by the angles of a position, pairs half a head apart."""
    out, half = x.clone(), DIM // 2
    for pair in range(half):
        angle = position / LAYER["rope_theta"] ** (2 * pair / DIM)
        cos, sin = math.cos(angle), math.sin(angle)
        out[pair] = x[pair] * cos - x[pair + half] * sin
        out[pair + half] = x[pair + half] * cos + x[pair] * sin
    return out


class ByHand:
    """A head over a text: entry i joins token i + 1 with what the target, or the head itself, says of token i."""

    def __init__(self, head: Published, embedding: Tensor, lm_head: Tensor | None = None) -> None:
        self.head, self.options = head, head.options
        self.weights = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in head.tensors.items()}
        self.embedding = self.weights.get("embed_tokens.weight", embedding)
        self.lm_head = self.weights.get("lm_head.weight", lm_head)
        self.num_layers = 1 + max(int(name.split(".")[1]) for name in self.weights if name.startswith("layers."))

    def features(self, tapped: list[Tensor]) -> Tensor:
        """Of one token, from its tapped hidden states."""
        if self.options["tap_norm"] == "fc_norm":
            tapped = [norm(x, self.weights[f"fc_norm.{i}.weight"]) for i, x in enumerate(tapped)]
        joined = torch.cat(tapped)
        if self.options["tap_norm"] == "norm_before_fc":
            joined = norm(joined, self.weights["input_norm.weight"])
        return self.weights["fc.weight"] @ joined

    def hidden(self, tokens: list[int], features: list[Tensor]) -> Tensor:
        """Of the last entry, what its logits and the next entry are made of."""
        residual, seen = [], []
        for token, feature in zip(tokens, features, strict=True):
            embedded = norm(self.embedding[token], self.weights["layers.0.input_layernorm.weight"])
            normed = norm(feature, self.weights["layers.0.hidden_norm.weight"])
            seen.append(torch.cat((embedded, normed)))
            residual.append(normed if self.options["norm_before_residual"] else feature)
        for layer in range(self.num_layers):
            at = f"layers.{layer}."
            if layer:
                seen = [norm(x, self.weights[f"{at}input_layernorm.weight"]) for x in residual]
            residual = [x + y for x, y in zip(residual, self.attention(at, seen), strict=True)]
            residual = [x + self.mlp(at, x) for x in residual]
        return norm(residual[-1], self.weights["norm.weight"]) if self.options["norm_output"] else residual[-1]

    def attention(self, at: str, seen: list[Tensor]) -> list[Tensor]:
        def product(name: str, x: Tensor) -> Tensor:
            bias = self.weights.get(f"{at}self_attn.{name}_proj.bias", 0.0)
            return self.weights[f"{at}self_attn.{name}_proj.weight"] @ x + bias

        q, k, v = ([product(name, x).view(-1, DIM) for x in seen] for name in "qkv")
        for name, each in (("q", q), ("k", k)):
            weight = self.weights.get(f"{at}self_attn.{name}_norm.weight")
            for position, heads in enumerate(each):
                normed = heads if weight is None else torch.stack([norm(x, weight) for x in heads])
                each[position] = torch.stack([turned(x, position) for x in normed])
        out = []
        for position in range(len(seen)):
            attended = []
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                scores = torch.stack([q[position][head] @ k[i][group] / DIM**0.5 for i in range(position + 1)])
                attended.append(sum(p * v[i][group] for i, p in enumerate(scores.softmax(0))))
            out.append(product("o", torch.cat(attended)))
        return out

    def mlp(self, at: str, x: Tensor) -> Tensor:
        x = norm(x, self.weights[f"{at}post_attention_layernorm.weight"])
        gate, up = (self.weights[f"{at}mlp.{name}_proj.weight"] @ x for name in ("gate", "up"))
        return self.weights[f"{at}mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head @ (hidden if self.options["norm_output"] else norm(hidden, self.weights["norm.weight"]))

    def chain(self, text: list[int], states: list[list[Tensor]], depth: int) -> list[tuple[Tensor, int]]:
        """Logits and token of each of `depth` drafted tokens.

        Args:
            states: see `states_of`.
        """
        features = [self.features([after[run] for run in self.head.runs]) for after in states]
        tokens, drafted = text[1:], []
        features = features[: len(tokens)]
        for _ in range(depth):
            hidden = self.hidden(tokens, features)
            logits = self.logits(hidden)
            drafted.append((logits, self.head.token_ids[int(logits.argmax())]))
            tokens, features = [*tokens, drafted[-1][1]], [*features, hidden]
        return drafted


# --- the same of ours -----------------------------------------------------------------------------------------------


@cache
def target_for(options: str) -> Decoder:
    """A target of the width that a form of `FORMS` is for."""
    width = FORMS[options].get("target_hidden", 64)
    return tiny_decoder(num_layers=8, hidden_size=width, intermediate_size=64)


def loaded(head: Published, target: Decoder, folder: Path) -> Draft:
    """The head as a bundle's draft."""
    found = read_eagle3(head.write(folder / "head"), target)
    write_draft(found.spec, found.state, folder / "draft.safetensors")
    return load_draft(folder / "draft.safetensors", target)


def states_of(target: Decoder) -> list[list[Tensor]]:
    """Of each token of the text, its hidden state after 0, 1, 2, ... of the target's layers."""
    ids_BT = torch.tensor([TEXT])
    _, _, after = whole_window(target, ids_BT, tuple(range(target.spec.num_layers)))
    assert after is not None
    embedded = target.embed(ids_BT[0])
    return [[embedded[t], *after[0, t].split(target.spec.hidden_size)] for t in range(len(TEXT))]


def drafted_by_hand(head: Published, target: Decoder) -> Drafted:
    """What the reimplementation drafts after the text."""
    return ByHand(head, target.embed.weight, target.lm_head.weight).chain(TEXT, states_of(target), DEPTH)


@torch.no_grad()
def drafted_by_engines(target: Engine, draft: Engine) -> Drafted:
    """What engines draft after the text, which the draft is given in two parts."""
    none, last = torch.empty(0, dtype=torch.long), torch.tensor([0])
    seen = target.step(torch.tensor([TEXT]), torch.tensor([0], dtype=torch.int32), none, features_out=True)
    features_BTF = seen.features_BTF
    assert features_BTF is not None

    def step(tokens: list[int], start: int, features: Tensor, rows: Tensor) -> StepOutput:
        return draft.step(torch.tensor([tokens]), torch.tensor([start], dtype=torch.int32), rows, features)

    step(TEXT[1:3], 0, features_BTF[:, :2], none)
    out = step(TEXT[3:], 2, features_BTF[:, 2 : len(TEXT) - 1], torch.tensor([len(TEXT) - 4]))
    found: Drafted = []
    for depth in range(DEPTH):
        row = int(out.logits_RV[0].argmax())
        token = row if draft.token_ids_V is None else int(draft.token_ids_V[row])
        found.append((out.logits_RV[0], token))
        out = step([token], len(TEXT) - 1 + depth, out.hidden_RH[:, None], last)
    return found


def assert_same(found: Drafted, expected: Drafted, most: float) -> None:
    assert [token for _, token in found] == [token for _, token in expected]
    for (logits, _), (wanted, _) in zip(found, expected, strict=True):
        assert relative_error(logits, wanted) < most
