"""Decoder layers, join and scorer on the CPU in int8: weights per output channel, activations per row.

The products are torch's own (FBGEMM), with exact integer accumulation; what lies between them is fused in `_cpu.c`.
Per-row activation scales keep rows independent: verifying eight tokens gives bit for bit what decoding them one by one
gives.

Activations have 7 bits, because FBGEMM's AVX2 kernels add pairs of products in 16 bits. `smoothed_parts` wins back most
of what that costs in quality.

Shapes: M tokens of the step (of all its B rows), L layers, H hidden, I intermediate, N query heads, K key/value heads,
G = N / K, D head dim, P rotated pairs (D / 2), S slots of a cache row, R gathered rows, V vocab, F features of the
scorer.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ssv.model.decoder import Decoder, Layer
from ssv.model.draft import Draft
from ssv.model.scorer import Scorer
from ssv.runtime.engines.contract import Branches, EngineError

_LEVELS = 63.0
_ROWS = 512


if importlib.util.find_spec("ssv.runtime.engines._cpu") is not None:
    from ssv.runtime.engines import _cpu
else:  # installed where there was no C compiler; one that is there and does not load is an error
    _cpu = None  # type: ignore[assignment]


class Int8Linear(nn.Module):
    """A linear layer in int8. `forward` is the whole of it on fp32 rows; the fused layers call `product`."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, input_factor_I: Tensor | None = None) -> None:
        super().__init__()
        self.bias_O, self.input_factor_I = bias_O, input_factor_I
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            raise EngineError("precision int8 needs torch with FBGEMM (x86-64)", "use bf16 or fp32 on this machine")
        values, scale = _int8_values(weight_OI)
        engine = torch.backends.quantized.engine
        with warnings.catch_warnings():
            # torch moves quantized tensors to torchao, which has no kernel for a CPU without AVX-512.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
            quantized = torch._make_per_channel_quantized_tensor(values, scale, torch.zeros_like(scale).long(), 0)
        torch.backends.quantized.engine = "fbgemm"
        try:
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        finally:
            torch.backends.quantized.engine = engine
        self.product = _product(self._packed)

    def forward(self, x_MI: Tensor) -> Tensor:
        scaled_MI, scale_M1 = quantize_rows(x_MI, self.input_factor_I)
        y_MO = self.product(scaled_MI).mul_(scale_M1)
        return y_MO if self.bias_O is None else y_MO.add_(self.bias_O)


def _product(packed: torch.ScriptObject) -> Callable[[Tensor], Tensor]:
    """The product for rows scaled to -63..63 (see `quantize_rows`), [M, O] fp32, still scaled, without bias."""
    overload = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    # The operator under it, where torch shows it: resolving and checking a call in Python took a tenth of a decode
    # step.
    op = getattr(overload, "_op", overload)
    return lambda scaled_MI: op(scaled_MI, 1.0, 64, packed)


@torch.no_grad()
def _int8_values(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of any floating type in int8, and the scale of each output channel, fp64 [O]."""
    values_OI, scale_O1 = torch.empty(weight_OI.shape, dtype=torch.int8), torch.empty(len(weight_OI), 1)
    # A few rows at a time: in fp32 they stay in the processor's cache.
    for weight, values, scale in zip(*(x.split(_ROWS) for x in (weight_OI, values_OI, scale_O1)), strict=True):
        fp32 = weight.float()
        scale.copy_(int8_scale(fp32))
        values.copy_((fp32 / scale).round_())
    return values_OI, scale_O1[:, 0].double()


def int8_scale(weight_OI: Tensor) -> Tensor:
    """Scale of each output channel, [O, 1]."""
    # Without the copy that abs() is.
    largest_O1 = torch.maximum(weight_OI.amax(dim=1, keepdim=True), -weight_OI.amin(dim=1, keepdim=True))
    return largest_O1.clamp(min=1e-12) / 127


def quantize_rows(x_MI: Tensor, factor_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows, times a factor of each column, scaled to magnitudes of at most 63, and the scales that undo it, [M, 1]."""
    if _cpu is not None:
        x_MI, scaled_MI, scale_M1 = x_MI.contiguous(), torch.empty(x_MI.shape), torch.empty(len(x_MI), 1)
        _cpu.scale(
            x_MI.data_ptr(), _address(factor_I), scaled_MI.data_ptr(), scale_M1.data_ptr(), *x_MI.shape
        )  # fmt: skip
        return scaled_MI, scale_M1
    if factor_I is not None:
        x_MI = x_MI * factor_I
    scale_M1 = x_MI.abs().amax(dim=-1, keepdim=True) / _LEVELS
    return x_MI / scale_M1.clamp(min=1e-30), scale_M1


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _int8(module: nn.Module) -> Int8Linear:
    assert isinstance(module, Int8Linear)
    return module


class _FusedLayer:
    """What one layer's stages need: packed products, and addresses of its small tensors (kept alive by `layer`)."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        parts = [_int8(part) for part in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        self.qkv, self.o, self.gate_up, self.down = (part.product for part in parts)
        self.down_bias_H = parts[3].bias_O
        self.qkv_bias, self.o_bias, self.gate_up_bias, self.down_bias = (_address(part.bias_O) for part in parts)
        self.attn_norm = _address(layer.attn_norm.weight) if layer.attn_norm is not None else 0
        self.mlp_norm = _address(layer.mlp_norm.weight)
        self.q_norm = _address(layer.q_norm.weight) if layer.q_norm is not None else 0
        self.k_norm = _address(layer.k_norm.weight) if layer.k_norm is not None else 0


class _Scratch:
    """Buffers for steps of up to so many tokens (a step of fewer uses their first rows), and the rope angles of all
    positions."""

    def __init__(self, decoder: Decoder, num_tokens: int, max_length: int) -> None:
        spec = decoder.spec
        self.normed_MH = torch.empty(num_tokens, spec.hidden_size)
        self.queries_MN = torch.empty(num_tokens, spec.num_heads * spec.head_dim)
        self.attended_MN = torch.empty(num_tokens, spec.num_heads * spec.head_dim)
        self.gated_MI = torch.empty(num_tokens, spec.intermediate_size)
        self.scale_M = torch.empty(num_tokens)
        self.product_scale_M = torch.empty(num_tokens)
        # Room for each thread.
        self.weights_TGS = torch.empty(_most_stage_threads(), spec.num_heads // spec.num_kv_heads, max_length)
        rotate = decoder.rotation(torch.arange(max_length), torch.float32)
        self.cos_SP, self.sin_SP = rotate.cos[:, 0].contiguous(), rotate.sin[:, 0].contiguous()


class Places:
    """Where the tokens of a step lie in the cache and what they see, as the compiled stages read it."""

    def __init__(self, first_slot_B: Tensor, count_B: Tensor, branches: Branches | None, kept_M: Tensor | None) -> None:
        """Args:
        first_slot_B, count_B: int32.
        branches: None for chains.
        kept_M: which of the step's [B * T] tokens are no padding; None where all are.
        """
        self.num_rows = len(first_slot_B)
        self._held = [first_slot_B.contiguous(), count_B.contiguous()]
        depth = 0
        if branches is not None:
            path_MD = branches.path_BTD.flatten(0, 1)
            self._held += [
                branches.prefix_B.contiguous(),
                (path_MD if kept_M is None else path_MD[kept_M]).contiguous(),
            ]
            depth = path_MD.shape[1]
        addresses = [tensor.data_ptr() for tensor in self._held]
        first_slot, counts, prefix, path = (*addresses, *[0] * (4 - len(addresses)))
        self.args = (first_slot, counts, prefix, path, depth)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A product whose rows are still to be multiplied with their scales.

    Attributes:
        product_MH: fp32, [M, H] or as wide as another layer's outputs.
        scale_M: fp32.
    """

    product_MH: Tensor
    scale_M: Tensor


@cache
def _openmp() -> tuple[int, int, int] | None:
    """GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the OpenMP runtime that torch has loaded; None if it
    is not known."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    loaded = {line.split()[-1] for line in lines if "libgomp" in line}
    if len(loaded) != 1:  # torch built with another OpenMP, or two of them: none is surely torch's
        return None
    library = ctypes.CDLL(loaded.pop())
    functions = (library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads)
    fork, number, num = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return fork, number, num


@cache
def _most_stage_threads() -> int:
    """Threads that scratch has room for. It is decided once: scratch outlives changes of torch's number of threads."""
    return max(os.cpu_count() or 1, torch.get_num_threads()) if _openmp() is not None else 1


def share_stages(threads: int) -> None:
    """Has the compiled stages share their rows between so many of torch's threads."""
    if _cpu is not None and (functions := _openmp()) is not None:
        _cpu.use_threads(*functions, min(threads, _most_stage_threads()))


class FusedInt8Layers:
    """The layers of a decoder whose linear layers are `Int8Linear`, over a KV cache in fp32.

    Computes what `Decoder.run_layers` computes with those modules, in a tenth of the calls.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.layers = [_FusedLayer(layer) for layer in decoder.blocks()]
        self._scratch = _Scratch(decoder, 16, 1024)
        share_stages(torch.get_num_threads())

    @staticmethod
    def available() -> bool:
        """Whether the compiled stages were installed."""
        return _cpu is not None

    def run_layers(
        self,
        x_MH: Tensor,
        places: Places,
        keys_LBKSD: Tensor,
        values_LBKSD: Tensor,
        tapped_layers: tuple[int, ...] = (),
        joined: Scaled | None = None,
        first_qkv: Scaled | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Decoder.run_layers`, over rows of a cache.

        Args:
            x_MH: fp32, contiguous; overwritten. The tokens of one row after those of the other, without padding.
            places: of the tokens, and what they see.
            keys_LBKSD, values_LBKSD: fp32, the step's rows of the cache, each layer's contiguous.
            joined: what is still to be added to `x_MH` (see `FusedJoin`).
            first_qkv: the first layer's product of query, key and value, where that does not see the norm of `x_MH`.
        """
        spec, max_length, num_tokens = self.decoder.spec, keys_LBKSD.shape[3], x_MH.shape[0]
        if num_tokens > len(self._scratch.scale_M) or max_length > self._scratch.weights_TGS.shape[2]:
            self._scratch = _Scratch(self.decoder, num_tokens, max_length)
        s = self._scratch
        normed, queries, attended, gated = (
            x[:num_tokens] for x in (s.normed_MH, s.queries_MN, s.attended_MN, s.gated_MI)
        )
        scale, product_scale = s.scale_M.data_ptr(), s.product_scale_M.data_ptr()
        shape = (places.num_rows, spec.num_heads, spec.num_kv_heads, spec.head_dim, max_length)
        cos, sin, weights = s.cos_SP.data_ptr(), s.sin_SP.data_ptr(), s.weights_TGS.data_ptr()
        # Addresses of a layer's cache by arithmetic: slicing the tensors costs more than a stage does.
        keys, values = keys_LBKSD.data_ptr(), values_LBKSD.data_ptr()
        layer_bytes = keys_LBKSD.stride(0) * keys_LBKSD.element_size()
        eps, x = spec.rms_norm_eps, x_MH.data_ptr()
        normed_at, queries_at, attended_at, gated_at = (t.data_ptr() for t in (normed, queries, attended, gated))
        # Of the MLP before (or of the join), not yet added to x.
        product: Tensor | None = None
        added_scale, bias = product_scale, 0
        if joined is not None:
            product, added_scale = joined.product_MH, joined.scale_M.data_ptr()
        tapped: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            if index == 0 and first_qkv is not None:
                qkv, qkv_scale = first_qkv.product_MH, first_qkv.scale_M.data_ptr()
            else:
                _cpu.add_norm(
                    eps, x, _address(product), added_scale, bias, layer.attn_norm,
                    normed_at, scale, num_tokens, spec.hidden_size,
                )  # fmt: skip
                if index - 1 in tapped_layers:  # only now is that layer's last product added
                    tapped.append(x_MH.clone())
                qkv, qkv_scale = layer.qkv(normed), scale
            offset = index * layer_bytes
            _cpu.attend(
                eps, qkv.data_ptr(), qkv_scale, layer.qkv_bias, layer.q_norm, layer.k_norm, cos, sin,
                queries_at, keys + offset, values + offset, *places.args, weights, attended_at, product_scale, *shape,
            )  # fmt: skip
            product, added_scale = layer.o(attended), product_scale
            _cpu.add_norm(
                eps, x, product.data_ptr(), product_scale, layer.o_bias, layer.mlp_norm,
                normed_at, scale, num_tokens, spec.hidden_size,
            )  # fmt: skip
            gate_up = layer.gate_up(normed)
            _cpu.gated(
                gate_up.data_ptr(), scale, layer.gate_up_bias, gated_at, product_scale,
                num_tokens, spec.intermediate_size,
            )  # fmt: skip
            product = layer.down(gated)
            bias = layer.down_bias
        assert product is not None
        x_MH.addcmul_(product, s.product_scale_M[:num_tokens, None])
        if self.layers[-1].down_bias_H is not None:
            x_MH.add_(self.layers[-1].down_bias_H)
        if len(self.layers) - 1 in tapped_layers:
            tapped.append(x_MH.clone())
        return x_MH, torch.cat(tapped, dim=-1) if tapped else None

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """As `Decoder.logits`."""
        rows = hidden_RH.shape[0]
        hidden_RH = hidden_RH.contiguous()
        normed_RH, scale_R = torch.empty_like(hidden_RH), torch.empty(rows, 1)
        weight = self.decoder.norm.weight
        _cpu.add_norm(
            self.decoder.spec.rms_norm_eps, hidden_RH.data_ptr(), 0, 0, 0, weight.data_ptr(),
            normed_RH.data_ptr(), scale_R.data_ptr(), rows, hidden_RH.shape[1],
        )  # fmt: skip
        return _int8(self.decoder.lm_head).product(normed_RH).mul_(scale_R)


class FusedJoin:
    """The join of a conditioned draft whose linear layer is `Int8Linear`: what `Draft.join_features` computes, or with
    EAGLE-3's the first layer's query, key and value."""

    def __init__(self, draft: Draft) -> None:
        self.draft, self._product = draft, _int8(draft.get_submodule(draft.join_name)).product

    def __call__(self, embedded_MH: Tensor, features_MH: Tensor) -> Scaled:
        """The product over the normed embedding and the normed features; both fp32 and contiguous."""
        rows, hidden = embedded_MH.shape
        joined, scale_M = torch.empty(rows, 2 * hidden), torch.empty(rows)
        _cpu.join(
            self.draft.spec.decoder.rms_norm_eps, embedded_MH.data_ptr(), features_MH.data_ptr(),
            self.draft.embed_norm.weight.data_ptr(), self.draft.feature_norm.weight.data_ptr(),
            joined.data_ptr(), scale_M.data_ptr(), rows, hidden,
        )  # fmt: skip
        return Scaled(self._product(joined), scale_M)


class FusedScorer:
    """What `Scorer` computes, in one pass over the logits after their maximum is known."""

    def __init__(self, scorer: Scorer) -> None:
        self._weight_F, self._bias = scorer.weight_F.contiguous(), float(scorer.bias)
        self._uses_hidden = scorer.uses_hidden

    def __call__(self, hidden_RH: Tensor, logits_RV: Tensor) -> Tensor:
        """Both fp32; reject probabilities, fp32 [R]."""
        hidden_RH, logits_RV = hidden_RH.contiguous(), logits_RV.contiguous()
        rows, vocab = logits_RV.shape
        out_R = torch.empty(rows)
        _cpu.score(
            self._bias, hidden_RH.data_ptr(), logits_RV.data_ptr(), self._weight_F.data_ptr(), out_R.data_ptr(),
            rows, hidden_RH.shape[1] if self._uses_hidden else 0, vocab,
        )  # fmt: skip
        return out_R
