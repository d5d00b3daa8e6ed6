"""A decoder on the CPU whose linear layers have quantized weights: its layers, join and LM head as one call a step.

What is computed is what `Decoder` and `Draft` compute with those layers (`ssv.runtime.engines.linear`), in `_cpu.c`.
Rows stay independent: verifying eight tokens gives bit for bit what decoding them one by one gives.

Shapes: M tokens of the step (of all its B rows), L layers, H hidden, I intermediate, N query heads, K key/value heads,
G = N / K, D head dim, P rotated pairs (D / 2), S slots of a cache row, R gathered rows, V vocab, F features of the
scorer, X features that are tapped.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from ssv.model.decoder import Decoder, Layer
from ssv.model.draft import Draft
from ssv.model.scorer import Scorer
from ssv.runtime.engines.contract import Branches
from ssv.runtime.engines.linear import PackedLinear, Rows

if importlib.util.find_spec("ssv.runtime.engines._cpu") is not None:
    from ssv.runtime.engines import _cpu
else:  # installed where there was no C compiler; one that is there and does not load is an error
    _cpu = None  # type: ignore[assignment]


_TOGETHER = 8
"""Queries that share a read of keys and values: `TOGETHER` of _cpu.c."""


class _Layer(ctypes.Structure):
    """`Layer` of _cpu.c."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("qkv", "o", "gate_up", "down", "attn_norm", "q_norm", "k_norm", "mlp_norm")
    )


class _Step(ctypes.Structure):
    """`Step` of _cpu.c."""

    _fields_ = (
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden", "inner", "heads", "kv_heads", "dim")),
        *((name, ctypes.c_void_p) for name in ("layers", "cosine", "sine")),
        *((name, ctypes.c_void_p) for name in ("join", "embed_norm", "feature_norm", "embedded", "features")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("layer_size", "length", "batch")),
        *((name, ctypes.c_void_p) for name in ("first_slot", "counts", "prefix", "path")),
        ("depth", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("tapped_layers", ctypes.c_void_p),
        ("num_tapped", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("tapped", "head", "head_norm", "gathered")),
        ("num_gathered", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("values_room", "scale_room", "offset_room", "sum_room")),
        *((name, ctypes.c_void_p) for name in ("product", "queries", "attended", "own")),
        ("own_size", ctypes.c_int64),
    )


def _struct_of(linear: torch.nn.Module) -> int:
    assert isinstance(linear, PackedLinear)
    return ctypes.addressof(linear.struct)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _layer_struct(layer: Layer) -> _Layer:
    norms = (layer.attn_norm, layer.q_norm, layer.k_norm, layer.mlp_norm)
    return _Layer(
        *(_struct_of(part) for part in (layer.qkv, layer.o, layer.gate_up, layer.down)),
        *(_address(None if norm is None else norm.weight) for norm in norms),
    )


class Places:
    """Where the tokens of a step lie in the cache and what they see, as `_cpu.c` reads it."""

    def __init__(self, first_slot_B: Tensor, count_B: Tensor, branches: Branches | None, kept_M: Tensor | None) -> None:
        """Works out what the layers of a step have in common.

        Args:
            first_slot_B, count_B: int32.
            branches: None for chains.
            kept_M: which of the step's [B * T] tokens are no padding; None where all are.
        """
        self.first_slot_B, self.count_B = first_slot_B.contiguous(), count_B.contiguous()
        self.prefix_B: Tensor | None = None
        self.path_MD: Tensor | None = None
        if branches is not None:
            path_MD = branches.path_BTD.flatten(0, 1)
            self.prefix_B = branches.prefix_B.contiguous()
            self.path_MD = (path_MD if kept_M is None else path_MD[kept_M]).contiguous()


class FusedLayers:
    """The layers and the LM head of a decoder whose linear layers are `PackedLinear`, over a KV cache in fp32; and the
    join, if it is a conditioned draft's."""

    def __init__(self, decoder: Decoder, draft: Draft | None = None) -> None:
        self.decoder = decoder
        spec = decoder.spec
        layers = [_layer_struct(layer) for layer in decoder.blocks()]
        self._layers = (_Layer * len(layers))(*layers)
        self._step = _Step(
            eps=spec.rms_norm_eps,
            num_layers=spec.num_layers,
            hidden=spec.hidden_size,
            inner=spec.intermediate_size,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            dim=spec.head_dim,
            layers=ctypes.addressof(self._layers),
            head=_struct_of(decoder.lm_head),
            head_norm=_address(decoder.norm.weight),
        )
        if draft is not None and draft.conditioned:
            if draft.spec.eagle3 is None:
                self._step.join = _struct_of(draft.join)
            self._step.embed_norm = _address(draft.embed_norm.weight)
            self._step.feature_norm = _address(draft.feature_norm.weight)
        assert isinstance(decoder.lm_head, PackedLinear)
        self._vocab = decoder.lm_head.outputs
        self._num_tokens = self._max_length = 0
        share_work(torch.get_num_threads())

    @staticmethod
    def available() -> bool:
        """Whether the compiled stages were installed."""
        return _cpu is not None

    def run(
        self,
        x_MH: Tensor,
        places: Places,
        keys_LBKSD: Tensor,
        values_LBKSD: Tensor,
        gather_rows_R: Tensor,
        tapped_layers: tuple[int, ...] = (),
        joins: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs all layers, in place, and the LM head.

        Args:
            x_MH: fp32, contiguous; becomes the hidden states after the last layer. The tokens of one row after those of
                the other, without padding.
            places: of the tokens, and what they see.
            keys_LBKSD, values_LBKSD: fp32, the step's rows of the cache, each layer's contiguous.
            gather_rows_R: int64, of x_MH.
            tapped_layers: as for `Decoder.run_layers`.
            joins: a conditioned draft's embedded tokens and features, both fp32 [M, H] and contiguous.

        Returns:
            Logits of the gathered rows, [R, V], and the tapped layers' outputs joined, [M, X], or None.
        """
        num_tokens, num_gathered, length = len(x_MH), len(gather_rows_R), keys_LBKSD.shape[3]
        self._make_room(max(num_tokens, num_gathered), length)
        gather_rows_R = gather_rows_R.contiguous()
        logits_RV = torch.empty(num_gathered, self._vocab)
        tapped_MX = torch.empty(num_tokens, len(tapped_layers) * x_MH.shape[1]) if tapped_layers else None
        tapped = (ctypes.c_int64 * len(tapped_layers))(*tapped_layers)
        step = self._step
        step.embedded, step.features = map(_address, joins or (None, None))
        step.x, step.rows = x_MH.data_ptr(), num_tokens
        step.keys, step.values, step.length = keys_LBKSD.data_ptr(), values_LBKSD.data_ptr(), length
        step.layer_size, step.batch = keys_LBKSD.stride(0), len(places.count_B)
        step.first_slot, step.counts = places.first_slot_B.data_ptr(), places.count_B.data_ptr()
        step.prefix, step.path = _address(places.prefix_B), _address(places.path_MD)
        step.depth = 0 if places.path_MD is None else places.path_MD.shape[1]
        step.tapped_layers, step.num_tapped = ctypes.addressof(tapped), len(tapped_layers)
        step.tapped = _address(tapped_MX)
        step.gathered, step.num_gathered, step.logits = gather_rows_R.data_ptr(), num_gathered, logits_RV.data_ptr()
        _cpu.run(ctypes.addressof(step))
        return logits_RV, tapped_MX

    def _make_room(self, num_tokens: int, max_length: int) -> None:
        """Buffers for steps of so many tokens, and the rope angles of all positions; kept for steps of fewer."""
        if num_tokens <= self._num_tokens and max_length <= self._max_length:
            return
        self._num_tokens = num_tokens = max(num_tokens, self._num_tokens, 16)
        self._max_length = max_length = max(max_length, self._max_length)
        spec, step = self.decoder.spec, self._step
        attended = spec.num_heads * spec.head_dim
        widest = max(2 * spec.hidden_size, attended, spec.intermediate_size)
        self._rows = Rows(num_tokens, widest)
        step.values_room, step.scale_room, step.offset_room, step.sum_room = self._rows.addresses
        own_size = max(_TOGETHER * max_length, widest)
        self._room = (
            torch.empty(num_tokens, max(attended + 2 * spec.num_kv_heads * spec.head_dim, 2 * spec.intermediate_size)),
            torch.empty(num_tokens, attended),
            torch.empty(num_tokens, attended),
            torch.empty(_most_threads(), own_size),
        )
        step.product, step.queries, step.attended, step.own = (tensor.data_ptr() for tensor in self._room)
        step.own_size = own_size
        rotate = self.decoder.rotation(torch.arange(max_length), torch.float32)
        self._angles = (rotate.cos[:, 0].contiguous(), rotate.sin[:, 0].contiguous())
        step.cosine, step.sine = (tensor.data_ptr() for tensor in self._angles)


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


# --- Threads --------------------------------------------------------------------------------------------------------


@cache
def _most_threads() -> int:
    """Threads that there is room for. It is decided once: room outlives changes of torch's number of threads."""
    return max(os.cpu_count() or 1, torch.get_num_threads())


def share_work(threads: int) -> None:
    """Has the compiled stages share their work between so many threads."""
    if _cpu is not None:
        _cpu.use_threads(min(threads, _most_threads()))
