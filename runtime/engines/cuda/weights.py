"""What the kernels of `ssv.plugins.cuda` read of a model, and what they hand to one another."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssv.model.decoder import Decoder, Layer
from ssv.model.draft import Draft, FeatureTap
from ssv.model.spec import DecoderSpec
from ssv.runtime.engines.contract import NOT_CORRECTED, Corrections
from ssv.runtime.engines.cuda import places
from ssv.runtime.engines.cuda.packing import PAIR, TILE, interleave, pack

KEYS = 256
"""Keys that a block of the attention kernel takes."""

MOST_CHILDREN = 16
"""Of a node, most nodes of a level that get children, and most levels."""

MOST_FOUND = 1024
"""Candidates of a row's tree: 16 levels of 4 children for 16 nodes each, or 7 of 9 for 16."""

MOST_WARPS = 16
AHEAD = 4


class Linear:
    """A packed product: its weights, and what else its kernel is launched with."""

    def __init__(self, linear: nn.Module, *, gated: bool = False) -> None:
        assert isinstance(linear, nn.Linear)
        weight: Tensor = linear.weight
        bias: Tensor | None = linear.bias
        self.outputs, inputs = weight.shape
        if gated:
            weight, bias = interleave(weight), interleave(bias) if bias is not None else None
        self.packed, self.bias_N = pack(weight), None if bias is None else bias.float().contiguous()
        self.pairs, self.tiles = inputs // PAIR, len(self.packed)
        # K alone decides how a sum is split between warps.
        self.share = -(-self.pairs // min(-(-self.pairs // AHEAD), MOST_WARPS))
        self.warps = -(-self.pairs // self.share)


class LayerWeights:
    def __init__(self, layer: Layer) -> None:
        self.qkv, self.o, self.down = Linear(layer.qkv), Linear(layer.o), Linear(layer.down)
        self.gate_up = Linear(layer.gate_up, gated=True)
        assert layer.attn_norm is not None
        self.attn_norm, self.mlp_norm = layer.attn_norm.weight.float(), layer.mlp_norm.weight.float()
        self.q_norm = layer.q_norm.weight.float() if layer.q_norm is not None else None
        self.k_norm = layer.k_norm.weight.float() if layer.k_norm is not None else None


class Weights:
    """Everything that the kernels read of a model."""

    def __init__(self, decoder: Decoder, tap: FeatureTap | None, draft: Draft | None) -> None:
        self.embed = decoder.embed.weight.to(torch.bfloat16)
        self.layers = [LayerWeights(layer) for layer in decoder.blocks()]
        self.norm, self.head = decoder.norm.weight.float(), Linear(decoder.lm_head)
        self.tap = Linear(tap.project) if tap is not None else None
        self.join = Linear(draft.join) if draft is not None else None
        if draft is not None:
            self.embed_norm, self.feature_norm = draft.embed_norm.weight.float(), draft.feature_norm.weight.float()
        positions = torch.arange(decoder.spec.max_positions, device=self.embed.device)
        rotation = decoder.rotation(positions, torch.float32)
        self.cos_SP, self.sin_SP = rotation.cos[:, 0].contiguous(), rotation.sin[:, 0].contiguous()


class Buffers:
    """What kernels hand to one another: room for `places.TOKENS` tokens."""

    def __init__(self, spec: DecoderSpec, device: torch.device, max_length: int, vocab: int, num_tapped: int) -> None:
        def room(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(places.TOKENS, width, dtype=dtype, device=device)

        hidden, bf16 = spec.hidden_size, torch.bfloat16
        heads = spec.num_heads * spec.head_dim
        self.step = torch.zeros(places.SIZE, dtype=torch.int32, device=device)
        self.x_MH, self.scaled_MH, self.squares_MH = room(hidden), room(hidden, bf16), room(hidden // TILE)
        self.joined_MH, self.features_in_MF = room(2 * hidden, bf16), room(hidden)
        self.qkv_MX = room(heads + 2 * spec.num_kv_heads * spec.head_dim)
        self.attended_MX, self.gated_MI = room(heads, bf16), room(spec.intermediate_size, bf16)
        self.tapped_MX, self.features_MF = room(num_tapped * hidden, bf16), room(hidden)
        self.hidden_RH, self.logits_RV = room(hidden), room(vocab)
        self.token_R = torch.zeros(places.TOKENS, dtype=torch.int64, device=device)
        # Of trees that grow.
        self.best_token = torch.zeros(places.TOKENS, MOST_CHILDREN, dtype=torch.int32, device=device)
        self.best_share = room(MOST_CHILDREN)
        self.corrections = torch.zeros(2, MOST_CHILDREN, 2, device=device)
        # Of rows that sample; see S_TEMPERATURE of step.cuh.
        self.settings = torch.zeros(places.TOKENS, places.SETTINGS, dtype=torch.int32, device=device)
        self.extra = torch.zeros(places.TOKENS, device=device)
        self.found = torch.zeros(places.TOKENS, MOST_FOUND, 4, dtype=torch.int32, device=device)
        self.survival, self.candidate = room(MOST_CHILDREN), room(MOST_CHILDREN, torch.int32)
        self.path = room(MOST_CHILDREN * MOST_CHILDREN, torch.int32)
        self._found_host = torch.zeros(self.found.shape, dtype=torch.int32, pin_memory=True)
        self._corrected_by: tuple[tuple[tuple[float, float], ...], ...] = ()
        self.most_blocks = -(-max_length // KEYS)
        self.partial = room(spec.num_heads * self.most_blocks * (spec.head_dim + 2))
        self.arrivals = torch.zeros(places.TOKENS, spec.num_kv_heads, dtype=torch.int32, device=device)

    def correct(self, greedy: Corrections, sampled: Corrections = NOT_CORRECTED) -> None:
        """Takes the corrections of shares by rank, of greedy rows and of those that sample."""
        if (tables := (tuple(greedy), tuple(sampled))) != self._corrected_by:
            self._corrected_by = tables
            by_rank = [[table[min(rank, len(table) - 1)] for rank in range(MOST_CHILDREN)] for table in tables]
            self.corrections.copy_(torch.tensor(by_rank))

    def sample(self, settings: NDArray[np.int32]) -> None:
        """Takes how the first rows choose."""
        self.settings[: len(settings)].copy_(torch.from_numpy(settings))

    def read_found(self, num_rows: int) -> NDArray[np.int32]:
        """Candidates of the rows that grew, once they are there."""
        self._found_host[:num_rows].copy_(self.found[:num_rows], non_blocking=True)
        torch.cuda.current_stream(self.found.device).synchronize()
        return self._found_host[:num_rows].numpy()
