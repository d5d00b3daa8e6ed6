"""The decoder network in PyTorch: what a `DecoderSpec` and its weights compute.

One definition serves training, the torch engine (which swaps the linear layers for quantized ones) and, as reference,
the TensorRT network. How keys and values are kept is the caller's: it passes an `Attend`.

Shapes: M tokens of the step flattened (B rows x T tokens), H hidden, I intermediate, N query heads, K key/value
heads, D head dim, P rotated pairs (D / 2), V vocab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssv.model.checkpoint import CheckpointError, DecoderSpec, Weights
from ssv.model.quantized import QuantizedLinear, is_quantized, quantized_linear


class Attend(Protocol):
    """Attention of one layer: stores what the step adds, returns what its queries see."""

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        """Attends, and returns the values, [M, N * D]."""
        ...


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos and sin of the rope angle of every token of a step, each [M, 1, P]."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x_MND: Tensor) -> Tensor:
        """Rotates pairs half a head apart (Hugging Face's convention)."""
        first, second = x_MND.chunk(2, dim=-1)
        return torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)


class Layer(nn.Module):
    """Pre-norm attention and gated MLP.

    Query, key and value are one product, gate and up another: at one token a step, time goes by the number of calls and
    the bytes of weights, not by arithmetic.

    Attributes:
        attn_norm: None where query, key and value see something else than the norm of the residual stream.
    """

    def __init__(self, spec: DecoderSpec, qkv_inputs: int | None = None) -> None:
        """Makes the modules of a layer.

        Args:
            qkv_inputs: inputs of query, key and value that the caller makes (`joined_MJ`); None for the norm of x.
        """
        super().__init__()
        self.spec = spec
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.attn_norm = nn.RMSNorm(spec.hidden_size, spec.rms_norm_eps) if qkv_inputs is None else None
        self.qkv = nn.Linear(qkv_inputs or spec.hidden_size, q + 2 * kv, bias=spec.qkv_bias)
        self.q_norm = nn.RMSNorm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else None
        self.k_norm = nn.RMSNorm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else None
        self.o = nn.Linear(q, spec.hidden_size, bias=spec.output_bias)
        self.mlp_norm = nn.RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.gate_up = nn.Linear(spec.hidden_size, 2 * spec.intermediate_size, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)

    def forward(
        self, index: int, x_MH: Tensor, rotate: Rotation, attend: Attend, joined_MJ: Tensor | None = None
    ) -> Tensor:
        return self.finish(x_MH, attend(index, *self.project(x_MH, rotate, joined_MJ)))

    def project(self, x_MH: Tensor, rotate: Rotation, joined_MJ: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [M, N, D] and keys [M, K, D], and values [M, K, D]."""
        spec = self.spec
        seen = joined_MJ if self.attn_norm is None else self.attn_norm(x_MH)
        qkv = self.qkv(seen).view(-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        v_MKD = qkv[:, spec.num_heads + spec.num_kv_heads :]
        if self.q_norm is None or self.k_norm is None:
            qk = rotate(qkv[:, : spec.num_heads + spec.num_kv_heads])
            return qk[:, : spec.num_heads], qk[:, spec.num_heads :], v_MKD
        q_MND = rotate(self.q_norm(qkv[:, : spec.num_heads]))
        k_MKD = rotate(self.k_norm(qkv[:, spec.num_heads : spec.num_heads + spec.num_kv_heads]))
        return q_MND, k_MKD, v_MKD

    def finish(self, x_MH: Tensor, attended_MX: Tensor) -> Tensor:
        """The residual stream after the layer, from what was before it and what its queries saw, [M, N * D]."""
        x_MH = x_MH + self.o(attended_MX)
        gate, up = self.gate_up(self.mlp_norm(x_MH)).chunk(2, dim=-1)
        residual_MH: Tensor = x_MH + self.down(F.silu(gate) * up)
        return residual_MH


class Decoder(nn.Module):
    """A whole decoder: embedding, layers, final norm and LM head.

    Attributes:
        lm_head: V rows; a draft may cover only the most frequent tokens (then V is smaller than the embedding's).
    """

    def __init__(self, spec: DecoderSpec, head_size: int | None = None, first_inputs: int | None = None) -> None:
        """Makes the modules of a decoder.

        Args:
            head_size: V; None for the whole vocabulary.
            first_inputs: inputs J of the first layer's query, key and value, where they are not the norm of x.
        """
        super().__init__()
        self.spec = spec
        # Its weights always come from elsewhere; filling them at random on the meta device imports half of torch, 70
        # MB.
        self.embed = nn.Embedding.from_pretrained(torch.zeros(spec.vocab_size, spec.hidden_size), freeze=False)
        self.layers = nn.ModuleList(
            Layer(spec, first_inputs if index == 0 else None) for index in range(spec.num_layers)
        )
        self.norm = nn.RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.lm_head = nn.Linear(spec.hidden_size, head_size or spec.vocab_size, bias=False)
        # Not a buffer: module.to(bfloat16) must not round it.
        self._rope_frequencies_P = spec.rope_frequencies()

    def rotation(self, position_M: Tensor, dtype: torch.dtype) -> Rotation:
        self._rope_frequencies_P = self._rope_frequencies_P.to(position_M.device)
        # Angles in fp32: bf16 cannot tell position 257 from 258.
        angle = position_M.float()[:, None] * self._rope_frequencies_P
        return Rotation(angle.cos().to(dtype)[:, None], angle.sin().to(dtype)[:, None])

    def run_layers(
        self,
        x_MH: Tensor,
        position_M: Tensor,
        attend: Attend,
        tapped_layers: tuple[int, ...] = (),
        joined_MJ: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs every layer.

        Args:
            tapped_layers: layers whose outputs are wanted too, ascending.
            joined_MJ: what the first layer's query, key and value see, of a decoder that was made with `first_inputs`.

        Returns:
            Hidden states after the last layer, [M, H], before the final norm; and the tapped layers' joined, [M, X]
            with X = H times their number, or None.
        """
        rotate = self.rotation(position_M, x_MH.dtype)
        tapped: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            x_MH = layer(index, x_MH, rotate, attend, joined_MJ if index == 0 else None)
            if index in tapped_layers:
                tapped.append(x_MH)
        return x_MH, torch.cat(tapped, dim=-1) if tapped else None

    def blocks(self) -> list[Layer]:
        """The layers, typed."""
        return cast(list[Layer], list(self.layers))

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Final norm and LM head of the gathered rows, [R, V]."""
        return self.lm_head(self.norm(hidden_RH))

    def head_rows(self, token_ids: Tensor) -> Tensor:
        """The LM head's rows of some tokens, [V, H], in the embedding's type; a quantized head's are dequantized."""
        head: nn.Linear | QuantizedLinear = self.lm_head
        weight_VH = head.dequantized() if isinstance(head, QuantizedLinear) else head.weight
        return weight_VH[token_ids].to(self.embed.weight.dtype)

    @classmethod
    def from_weights(cls, spec: DecoderSpec, weights: Weights, dtype: torch.dtype | None = torch.float32) -> Decoder:
        """The decoder with a checkpoint's weights (Hugging Face names).

        Layers that the checkpoint holds quantized become `QuantizedLinear`.

        Args:
            dtype: of what is not quantized; None for the types that the checkpoint has.

        Raises:
            CheckpointError: a quantized layer that is not supported.
        """
        with torch.device("meta"):
            decoder = cls(spec)
        replace_quantized(decoder, _sources(spec), weights, dtype)
        decoder.load_state_dict(state_from_weights(spec, weights, dtype), assign=True, strict=False)
        assert not any(tensor.is_meta for tensor in (*decoder.parameters(), *decoder.buffers()))
        return decoder.requires_grad_(False)


_FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}
_RENAMED = {
    "attn_norm": "input_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "down": "mlp.down_proj",
}


def state_from_weights(spec: DecoderSpec, weights: Weights, dtype: torch.dtype | None = torch.float32) -> Weights:
    """State dict of `Decoder` from weights under Hugging Face names, without those that are quantized."""
    # Layers are copies, also those that have the type. An embedding that keeps its type is not: a checkpoint is mapped
    # from its file, and of an embedding each step reads a few rows.
    embedding = weights["model.embed_tokens.weight"]
    if dtype is not None:
        embedding = embedding.to(dtype, copy=True)
    state = {"embed.weight": embedding, **fused_state(spec, weights, dtype)}
    if "lm_head.weight" not in state and not is_quantized(weights, "lm_head"):  # tied
        state["lm_head.weight"] = state["embed.weight"]
    return state


def fused_state(spec: DecoderSpec, weights: Weights, dtype: torch.dtype | None = None) -> Weights:
    """The state dict's part that a checkpoint has of layers, final norm and LM head, without what is quantized."""
    state = {}
    for module, sources in _sources(spec).items():
        if any(is_quantized(weights, source) for source in sources):
            continue
        for kind in ("weight", "bias"):
            found = [weights[f"{source}.{kind}"] for source in sources if f"{source}.{kind}" in weights]
            if found:
                joined = torch.cat(found)
                state[f"{module}.{kind}"] = joined.to(dtype or joined.dtype)
    return state


def hf_tensors(layer: nn.Module, parts: Sequence[tuple[str, int]]) -> Weights:
    """A module's tensors under the names of what it is made of in a checkpoint, which `hf_names` gives."""
    sizes = [size for _, size in parts]
    return {
        f"{name}.{kind}": piece
        for kind, tensor in layer.named_parameters()
        for (name, _), piece in zip(parts, tensor.split(sizes), strict=True)
    }


def replace_quantized(
    module: nn.Module, sources: Mapping[str, Sequence[str]], weights: Mapping[str, Tensor], dtype: torch.dtype | None
) -> None:
    """Puts quantized layers in place of those that a checkpoint holds quantized.

    Args:
        sources: names in the checkpoint of what each linear layer of the module is made of.
        dtype: of their biases; None for fp32.
    """
    for name, parts in sources.items():
        if not any(is_quantized(weights, part) for part in parts):
            continue
        biases = [weights[f"{part}.bias"].to(dtype or torch.float32) for part in parts if f"{part}.bias" in weights]
        layer = quantized_linear(weights, parts, torch.cat(biases) if biases else None)
        plain = module.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        expected = tuple(plain.weight.shape)
        if layer.shape != expected or (layer.bias is not None and layer.bias.shape != expected[:1]):
            raise CheckpointError(f"quantized {' + '.join(parts)} has shape {layer.shape}, expected {expected}")
        module.set_submodule(name, layer)


def hf_names(spec: DecoderSpec) -> dict[str, list[tuple[str, int]]]:
    """What each module is made of: names in a checkpoint, and the outputs that each gives."""
    shapes = spec.weight_shapes()
    shapes.setdefault("lm_head.weight", (spec.vocab_size, spec.hidden_size))
    return {
        module: [(part, shapes[f"{part}.weight"][0]) for part in parts]
        for module, parts in _sources(spec).items()
        if f"{parts[0]}.weight" in shapes
    }


def _sources(spec: DecoderSpec) -> dict[str, tuple[str, ...]]:
    """What each module is made of, in a checkpoint's names; a tied LM head is its own if the checkpoint has one."""
    sources: dict[str, tuple[str, ...]] = {"norm": ("model.norm",), "lm_head": ("lm_head",)}
    for layer in range(spec.num_layers):
        source, dest = f"model.layers.{layer}.", f"layers.{layer}."
        sources |= {dest + name: tuple(source + part for part in parts) for name, parts in _FUSED.items()}
        sources |= {dest + name: (source + part,) for name, part in _RENAMED.items()}
    return sources
