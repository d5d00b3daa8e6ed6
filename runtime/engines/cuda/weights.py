"""What the kernels of `ssv.plugins.cuda` read of a model, and what they hand to one another."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssv.model.decoder import Decoder, Layer
from ssv.model.draft import Draft, FeatureTap
from ssv.model.quantized import AwqLinear, QuantizedLinear
from ssv.model.spec import DecoderSpec
from ssv.runtime.engines.contract import MOST_CHILDREN, MOST_GUESSES, NOT_CORRECTED, Corrections
from ssv.runtime.engines.cuda import places
from ssv.runtime.engines.cuda.packing import PAIR, TILE, interleave, packed

KEYS = 256
"""Keys that a block of the attention kernel takes."""

FEW_TILES = 256
"""A product with fewer tiles of channels has MOST_WARPS warps a block, or a multiprocessor would have little to do; one
with more has half as many, and several blocks a multiprocessor."""

SLICES = 32
"""Of a row's logits, which blocks sift side by side for the largest."""

MOST_WARPS = 16
PAIRS_OF_A_WARP = 4


class Linear:
    """A packed product: its weights, and what else its kernel is launched with.

    Attributes:
        input_factor_K: what its inputs have to be multiplied with before; None: nothing.
    """

    def __init__(self, linear: nn.Module, *, gated: bool = False) -> None:
        assert isinstance(linear, (nn.Linear, QuantizedLinear))
        self.outputs, inputs = linear.shape if isinstance(linear, QuantizedLinear) else linear.weight.shape
        bias: Tensor | None = linear.bias
        if gated and bias is not None:
            bias = interleave(bias)
        self.bias_N = None if bias is None else bias.float().contiguous()
        self.input_factor_K = linear.input_factor_I if isinstance(linear, AwqLinear) else None
        self.packed = packed(linear, gated=gated)
        self.pairs, self.tiles = inputs // PAIR, len(self.packed.weight)
        # The layer's shape and format alone decide how a sum is split between warps, not the number of tokens.
        self.most_warps = MOST_WARPS if self.tiles < FEW_TILES else MOST_WARPS // 2
        units = -(-self.pairs // self.packed.unit)
        num_warps = min(-(-self.pairs // PAIRS_OF_A_WARP), self.most_warps)
        self.share = -(-units // num_warps) * self.packed.unit
        self.warps = -(-self.pairs // self.share)
        # Narrow weights need more pairs on the way for as many bytes, where a warp has as many.
        self.ahead = 8 if self.packed.scale is not None and self.share >= 8 else 4

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales, all of which a step reads."""
        return self.packed.weight.nbytes + (self.packed.scale.nbytes if self.packed.scale is not None else 0)

    def scaled(self, norm_K: Tensor) -> Tensor:
        """The weights of the norm before it, with what its inputs have to be multiplied with."""
        return norm_K.float() if self.input_factor_K is None else norm_K.float() * self.input_factor_K


class LayerWeights:
    """A layer's packed products, and the weights of its norms with what inputs are multiplied with."""

    def __init__(self, layer: Layer) -> None:
        self.qkv, self.o, self.down = Linear(layer.qkv), Linear(layer.o), Linear(layer.down)
        self.gate_up = Linear(layer.gate_up, gated=True)
        assert layer.attn_norm is not None
        self.attn_norm = self.qkv.scaled(layer.attn_norm.weight)
        self.mlp_norm = self.gate_up.scaled(layer.mlp_norm.weight)
        self.q_norm = layer.q_norm.weight.float() if layer.q_norm is not None else None
        self.k_norm = layer.k_norm.weight.float() if layer.k_norm is not None else None

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales, all of which a step reads."""
        return sum(linear.nbytes for linear in (self.qkv, self.o, self.gate_up, self.down))


class Weights:
    """Everything that the kernels read of a model."""

    def __init__(self, decoder: Decoder, tap: FeatureTap | None, draft: Draft | None) -> None:
        self.embed = decoder.embed.weight.to(torch.bfloat16)
        self.layers = [LayerWeights(layer) for layer in decoder.blocks()]
        self.head = Linear(decoder.lm_head)
        self.norm = self.head.scaled(decoder.norm.weight)
        self.tap = Linear(_without_factor(tap.project)) if tap is not None else None
        self.join = Linear(draft.join) if draft is not None and draft.conditioned else None
        if draft is not None and self.join is not None:
            norms = torch.cat((draft.embed_norm.weight, draft.feature_norm.weight))
            self.embed_norm, self.feature_norm = self.join.scaled(norms).chunk(2)
        self.nbytes = sum(part.nbytes for part in (*self.layers, self.head, self.join) if part is not None)
        """Bytes of weights and scales that a step with logits and without features reads."""
        positions = torch.arange(decoder.spec.max_positions, device=self.embed.device)
        rotation = decoder.rotation(positions, torch.float32)
        self.cos_SP, self.sin_SP = rotation.cos[:, 0].contiguous(), rotation.sin[:, 0].contiguous()


def _without_factor(linear: nn.Module) -> nn.Module:
    """A layer whose inputs nothing before it could multiply: in bf16 if they have a factor."""
    if not isinstance(linear, AwqLinear) or linear.input_factor_I is None:
        return linear
    weight_NK = (linear.dequantized() * linear.input_factor_I).to(torch.bfloat16)
    plain = nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=False, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight_NK, requires_grad=False), linear.bias  # type: ignore[assignment]
    return plain


class Buffers:
    """What kernels hand to one another: room for some tokens, of which `places.TOKENS` may get logits and have trees
    behind them."""

    def __init__(
        self,
        spec: DecoderSpec,
        device: torch.device,
        max_length: int,
        vocab: int,
        num_tapped: int,
        most_tokens: int = places.TOKENS,
    ) -> None:
        def room(width: int, dtype: torch.dtype = torch.float32, tokens: int = places.TOKENS) -> Tensor:
            return torch.zeros(tokens, width, dtype=dtype, device=device)

        def of_all(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return room(width, dtype, most_tokens)

        hidden, bf16 = spec.hidden_size, torch.bfloat16
        heads = spec.num_heads * spec.head_dim
        self.step = torch.zeros(places.size(most_tokens), dtype=torch.int32, device=device)
        self.x_MH, self.scaled_MH, self.squares_MH = of_all(hidden), of_all(hidden, bf16), of_all(hidden // TILE)
        self.joined_MH, self.features_in_MF = of_all(2 * hidden, bf16), of_all(hidden)
        self.qkv_MX = of_all(heads + 2 * spec.num_kv_heads * spec.head_dim)
        self.attended_MX, self.gated_MI = of_all(heads, bf16), of_all(spec.intermediate_size, bf16)
        self.tapped_MX, self.features_MF = of_all(num_tapped * hidden, bf16), of_all(hidden)
        self.hidden_RH, self.logits_RV = room(hidden), room(vocab)
        self.token_R = torch.zeros(places.TOKENS, dtype=torch.int64, device=device)
        # Of trees that grow.
        self.sifted_value, self.sifted_sums = room(MOST_CHILDREN * SLICES), room(2 * SLICES)
        self.sifted_column = room(MOST_CHILDREN * SLICES, torch.int32)
        self.risk_R = torch.zeros(places.TOKENS, device=device)
        self.corrections = torch.zeros(2, MOST_CHILDREN, 2, device=device)
        # Of rows that sample; see S_TEMPERATURE of step.cuh.
        self.settings = torch.zeros(places.TOKENS, places.SETTINGS, dtype=torch.int32, device=device)
        self.extra = torch.zeros(places.TOKENS, device=device)
        self.found = torch.zeros(places.TOKENS, MOST_GUESSES, 4, dtype=torch.int32, device=device)
        self.survival, self.candidate = room(MOST_CHILDREN), room(MOST_CHILDREN, torch.int32)
        self.path = room(MOST_CHILDREN * MOST_CHILDREN, torch.int32)
        self._found_host = torch.zeros(self.found.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._corrected_by: tuple[tuple[tuple[float, float], ...], ...] = ()
        self.most_blocks = -(-max_length // KEYS)
        self.partial = of_all(spec.num_heads * self.most_blocks * (spec.head_dim + 2))
        self.arrivals = torch.zeros(places.TOKENS, spec.num_kv_heads, dtype=torch.int32, device=device)
        self.queries_MX = of_all(heads, bf16)

    @property
    def nbytes(self) -> int:
        """What they take of the device's memory."""
        return sum(held.nbytes for held in vars(self).values() if isinstance(held, Tensor) and not held.is_cpu)

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
