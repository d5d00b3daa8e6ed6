"""The engine contract on PyTorch: CPU in fp32, bf16, int8 and int4, CUDA in fp32 and bf16.

int8 and int4 have kernels of their own on a CPU (`linear.py`, `cpu_layers.py`). On CUDA they run as bf16 with weights
rounded to the same values: for measuring their quality, not for speed. So do layers that a checkpoint holds quantized
to FP8 or INT4 (`ssv.model.quantized`), on either device and in fp32 or bf16. A target's LM head has 8 bits in int4 too.

Shapes: see `contract.py`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssv.model.decoder import Decoder
from ssv.model.draft import Draft, FeatureTap
from ssv.model.heads import Heads
from ssv.model.quantized import AwqLinear, Fp8Linear, QuantizedLinear, precision_of
from ssv.model.scorer import Scorer
from ssv.model.smoothing import Ranges, scaled_columns, smooth_join, smoothed_parts, smoothing_factor
from ssv.plugins.ops import on
from ssv.runtime.engines.contract import Branches, EngineError, StepOutput, check_step
from ssv.runtime.engines.cpu_layers import FusedLayers, FusedScorer, Places, share_work
from ssv.runtime.engines.kv_cache import CachedAttend, KVCache, visible
from ssv.runtime.engines.linear import (
    Int4Linear,
    Int8Linear,
    PackedLinear,
    int4_scales,
    int4_values,
    int8_scale,
    int8_values,
    of_each_input,
)
from ssv.runtime.threads import MAX_THREADS, ThreadCount, chosen_by_operator, default_threads
from ssv.support.precisions import TORCH_PRECISIONS, TorchPrecision


class TorchEngine:
    """A target or a draft over its own KV cache. Make one with `target_engine` or `draft_engine`."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_batch: int,
        max_length: int,
        tap: FeatureTap | None = None,
        draft: Draft | None = None,
        scorer: Scorer | None = None,
        threads: ThreadCount | None = None,
    ) -> None:
        if max_length > decoder.spec.max_positions:
            raise EngineError(f"max length {max_length} exceeds the model's {decoder.spec.max_positions} positions")
        self.max_batch, self.max_length = max_batch, max_length
        self.decoder, self.tap, self.draft = decoder, tap, draft
        self.has_scorer = scorer is not None
        self.num_features = decoder.spec.hidden_size if draft is not None and draft.conditioned else 0
        self.token_ids_V = None if draft is None else vocabulary_ids(draft.token_ids, decoder.spec.vocab_size)
        self.vocab_size = draft.spec.head_size if draft is not None else decoder.spec.vocab_size
        self.device = decoder.norm.weight.device
        packed = isinstance(decoder.lm_head, PackedLinear)
        self.dtype = decoder.norm.weight.dtype
        self.cache = KVCache(decoder.spec, max_batch, max_length, self.dtype, self.device)
        # The bits of fp32 and bf16 products depend on the number of threads, and an output must not depend on the
        # machine's other work.
        self._threads = threads if packed else None
        self.fused = FusedLayers(decoder, draft) if packed and FusedLayers.available() else None
        self._score = FusedScorer(scorer) if self.fused and scorer is not None else scorer
        if packed and self.fused is None:
            warnings.warn(
                "int8 and int4 run without their compiled stages, very slowly: install a C compiler and ssv again",
                stacklevel=3,
            )

    @torch.inference_mode()
    def step(
        self,
        input_ids_BT: Tensor,
        first_slot_B: Tensor,
        gather_rows_R: Tensor,
        features_in_BTF: Tensor | None = None,
        *,
        branches: Branches | None = None,
        count_B: Tensor | None = None,
        features_out: bool = False,
        first_row: int = 0,
    ) -> StepOutput:
        """See `Engine.step`. Slots and gathered rows are on the CPU: checking them must not wait for the device."""
        check_step(self, input_ids_BT, first_slot_B, gather_rows_R, features_in_BTF, branches, count_B, first_row)
        if features_out and self.tap is None:
            raise EngineError("features_out: this engine was made without the tap of a conditioned draft")
        if self._threads is not None:
            threads = torch.get_num_threads()
            self._threads.follow()
            if self.fused is not None:  # whose threads are not torch's
                torch.set_num_threads(threads)
        # Beside a compiled step torch has copies of some rows to make. With threads of its own for them it would keep
        # the cores that the step needs: they go on spinning for milliseconds.
        with one_thread() if self.fused is not None else nullcontext():
            return self._run(
                input_ids_BT, first_slot_B, gather_rows_R, features_in_BTF, branches, count_B, features_out, first_row
            )

    def _run(
        self,
        input_ids_BT: Tensor,
        first_slot_B: Tensor,
        gather_rows_R: Tensor,
        features_in_BTF: Tensor | None,
        branches: Branches | None,
        count_B: Tensor | None,
        features_out: bool,
        first_row: int,
    ) -> StepOutput:
        """A step that has been checked."""
        batch, tokens = input_ids_BT.shape
        rows = slice(first_row, first_row + batch)
        keys, values = self.cache.keys[:, rows], self.cache.values[:, rows]
        tap = self.tap if features_out else None
        tapped_layers = tap.layers if tap is not None else ()
        ids_M = input_ids_BT.to(self.device).flatten()
        features_MF = None if features_in_BTF is None else features_in_BTF.to(self.device, self.dtype).flatten(0, 1)
        kept_M = None
        if self.fused is not None:
            if count_B is None:
                count_B = torch.full((batch,), tokens, dtype=torch.int32)
            elif (kept_M := _without_padding(count_B, tokens)) is not None:
                ids_M = ids_M[kept_M]
                features_MF = None if features_MF is None else features_MF[kept_M]
                gather_rows_R = torch.searchsorted(kept_M, gather_rows_R)
            x_MH, joins = self._fused_input(ids_M, features_MF)
            places = Places(first_slot_B, count_B, branches, kept_M)
            logits_RV, tapped_MX = self.fused.run(x_MH, places, keys, values, gather_rows_R, tapped_layers, joins)
            hidden_RH = x_MH[gather_rows_R]
        else:
            x_MH, joined_MJ = self.decoder.embed(ids_M).to(self.dtype), None
            if self.draft is not None and features_MF is not None:
                x_MH, joined_MJ = self.draft.join_features(x_MH, features_MF)
            slot_BT = first_slot_B.to(self.device)[:, None] + torch.arange(tokens, device=self.device)
            mask_B1TS = visible(slot_BT, int(first_slot_B.max()) + tokens, branches)
            attend = CachedAttend(keys, values, slot_BT, mask_B1TS)
            position_BT = slot_BT if branches is None else branches.position_BT.to(self.device)
            hidden_MH, tapped_MX = self.decoder.run_layers(
                x_MH, position_BT.flatten(), attend, tapped_layers, joined_MJ
            )
            hidden_RH, logits_RV = self._head(hidden_MH, gather_rows_R)
        token_R, reject_prob_R = self._scored(hidden_RH, logits_RV)
        if self.draft is not None:
            hidden_RH = self.draft.carried(hidden_RH)
        features_BTF = None
        if tap is not None:
            features_MF = tap(tapped_MX)
            if kept_M is not None:
                features_MF = features_MF.new_zeros(batch * tokens, features_MF.shape[1]).index_copy_(
                    0, kept_M, features_MF
                )
            features_BTF = features_MF.view(batch, tokens, -1)
        return StepOutput(
            hidden_RH=hidden_RH,
            logits_RV=logits_RV,
            features_BTF=features_BTF,
            reject_prob_R=reject_prob_R,
            token_R=token_R,
        )

    def _head(self, hidden_MH: Tensor, gather_rows_R: Tensor) -> tuple[Tensor, Tensor]:
        """The gathered rows' hidden states and their logits: the LM head sees no others."""
        if not len(gather_rows_R):  # filling the cache needs none
            return hidden_MH[:0], hidden_MH.new_empty(0, self.vocab_size, dtype=torch.float32)
        norm, rows_R = self.decoder.norm, gather_rows_R.to(self.device, torch.int32)
        assert norm.eps is not None
        hidden_RH, normed_RH = on(self.device).sparse_gather(hidden_MH, rows_R, norm.weight, norm.eps)
        return hidden_RH, self.decoder.lm_head(normed_RH).float()

    def _scored(self, hidden_RH: Tensor, logits_RV: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Each row's argmax, if it is found on the way, and its reject probability."""
        if self._score is None:
            return None, None
        if isinstance(self._score, FusedScorer):
            return None, self._score(hidden_RH, logits_RV)
        found = self._score(hidden_RH, logits_RV)
        token_R = found.token_R.long() if self.token_ids_V is None else self.token_ids_V[found.token_R]
        return token_R, found.reject_prob_R

    def _fused_input(
        self, input_ids_M: Tensor, features_MF: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What the fused layers work on, in place, and what a conditioned draft joins."""
        embedded_MH = self.decoder.embed(input_ids_M).to(self.dtype)
        if self.draft is None or features_MF is None:
            return embedded_MH, None
        features_MF = features_MF.contiguous()
        # A copy: these are the caller's.
        x_MH = self.draft.residual(features_MF).clone(memory_format=torch.contiguous_format)
        return x_MH, (embedded_MH, features_MF)

    def move_row(self, source: int, dest: int, length: int) -> None:
        """See `Engine.move_row`."""
        self.cache.move_row(source, dest, length)

    def keep(self, row: int, start: int, slots: Sequence[int]) -> None:
        """See `Engine.keep`."""
        self.cache.keep(row, start, slots)

    def read_cache(self, row: int, start: int, stop: int) -> Tensor:
        """See `Engine.read_cache`."""
        return self.cache.read(row, start, stop)

    def write_cache(self, row: int, start: int, held: Tensor) -> None:
        """See `Engine.write_cache`."""
        self.cache.write(row, start, held)


def target_engine(
    decoder: Decoder,
    *,
    precision: TorchPrecision,
    max_batch: int,
    max_length: int,
    device: str = "cpu",
    draft: Draft | None = None,
    ranges: Ranges | None = None,
    threads: ThreadCount | None = None,
) -> TorchEngine:
    """An engine over a target.

    Args:
        decoder: in fp32, or as it is stored, which gives the same and takes less memory; left as it is.
        draft: the draft whose features the target shall return, if it is a conditioned one.
        ranges: activation ranges of the target, and of the draft's tap under "tap."; int8 smooths with them if given.
        threads: which int8 and int4 on the CPU follow from step to step; None leaves torch's number alone.

    Raises:
        EngineError: precision unknown, or not to be had on this device.
    """
    tap = draft.tap if draft is not None else None
    decoder = prepare(decoder, precision, device, lambda d: smoothed_parts(d, ranges) if ranges else ())
    if tap is not None:
        tap = _prepare_tap(tap, precision, device, ranges.get("tap.project") if ranges else None)
    return TorchEngine(decoder, max_batch=max_batch, max_length=max_length, tap=tap, threads=threads)


def draft_engine(
    draft: Draft,
    *,
    precision: TorchPrecision,
    max_batch: int,
    max_length: int,
    device: str = "cpu",
    scorer: Scorer | None = None,
    ranges: Ranges | None = None,
    threads: ThreadCount | None = None,
) -> TorchEngine:
    """An engine over a draft, with its scorer; arguments as for `target_engine`."""

    def smooth(copied: Draft) -> Iterator[nn.Module]:
        if ranges:
            if copied.conditioned:  # before the layers, of which it may be a part, are packed
                join = copied.get_submodule(copied.join_name)
                assert isinstance(join, nn.Linear)
                copied.part_norms()
                smooth_join(join, [copied.embed_norm, copied.feature_norm], ranges[copied.join_name])
            yield from smoothed_parts(copied.decoder, ranges, prefix="decoder.")

    without_tap = copy.copy(draft)
    without_tap._modules = {**draft._modules, "tap": None}  # it runs with the target
    copied = prepare(without_tap, precision, device, smooth)
    return TorchEngine(
        copied.decoder,
        max_batch=max_batch,
        max_length=max_length,
        draft=copied,
        scorer=scorer.to(device) if scorer is not None else None,
        threads=threads,
    )


class TorchHeads:
    """Heads beside a target's engine. Make them with `heads_engine`."""

    def __init__(self, heads: Heads) -> None:
        self._heads, self.num_heads = heads, heads.spec.num_heads
        self.token_ids_V = vocabulary_ids(heads.token_ids, heads.spec.vocab_size)

    @torch.inference_mode()
    def logits(self, hidden_RH: Tensor) -> Tensor:
        """See `HeadsEngine.logits`."""
        weight_H = self._heads.norm.weight
        return self._heads.logits(hidden_RH.to(weight_H.device, weight_H.dtype)).float()


def heads_engine(heads: Heads, *, precision: TorchPrecision, device: str = "cpu") -> TorchHeads:
    """Heads in the precision of their target's engine.

    Raises:
        EngineError: precision unknown, or not to be had on this device.
    """
    return TorchHeads(prepare(heads, precision, device, lambda _: ()))


_shared_count: ThreadCount | None = None


def cpu_threads(threads: int | None) -> ThreadCount | None:
    """Settles how many threads the engines of this process have on a CPU.

    Args:
        threads: so many, whatever the machine does; None to follow the cores that are free, up to torch's own number,
            unless the environment says how many (`OMP_NUM_THREADS`).

    Returns:
        What an engine has to follow; None for a fixed number. One for the process, as torch's number is.

    Raises:
        EngineError: fewer than one, too many, or no whole number.
    """
    global _shared_count
    if threads is not None:
        if not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
            raise EngineError(f"threads must be 1 to {MAX_THREADS}, got {threads!r}")
        _set_threads(threads)
    if threads is not None or chosen_by_operator():
        _shared_count = None
    elif _shared_count is None or _shared_count.current != torch.get_num_threads():  # or another number was set since
        _shared_count = ThreadCount(default_threads(torch.get_num_threads()), _set_threads)
    return _shared_count


def _set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    share_work(threads)


def _without_padding(count_B: Tensor, tokens: int) -> Tensor | None:
    """Which of the step's [B * T] tokens are no padding, int64 in their order; None where all are."""
    counts = count_B.tolist()
    if min(counts) == tokens:
        return None
    return torch.tensor([b * tokens + t for b, count in enumerate(counts) for t in range(count)], dtype=torch.long)


M = TypeVar("M", Decoder, Draft, FeatureTap, Heads)
N = TypeVar("N", bound=nn.Module)


def prepare(
    module: M,
    precision: TorchPrecision,
    device: str,
    smooth: Callable[[M], Iterable[nn.Module]],
    *,
    keeps_quantized: bool = False,
) -> M:
    """A copy in a precision on a device.

    Args:
        smooth: smooths the copy for int8, part by part: each is packed before the next one.
        keeps_quantized: leaves a quantized checkpoint's layers as they are.
    """
    if precision not in TORCH_PRECISIONS:
        raise EngineError(f"precision {precision!r} is unknown; known: {', '.join(TORCH_PRECISIONS)}")
    if (found := precision_of(module)) is not None and precision in ("int8", "int4"):
        raise EngineError(
            f"this checkpoint is quantized to {found} already, and cannot run in {precision}", "use bf16 or fp32"
        )
    # New modules over the same parameters: replacing one leaves the caller's module as it is.
    module = copy.deepcopy(module, {id(p): p for p in (*module.parameters(), *module.buffers())})
    on_cpu = _is_cpu(device)
    if not keeps_quantized:
        _replace(module, Fp8Linear, _Dequantized)
        _replace(module, AwqLinear, _Dequantized)
    if precision == "int8":
        replacement = _int8_linear if on_cpu else _rounded_int8
        with one_thread():
            for part in smooth(module):
                _replace(part, nn.Linear, replacement)
            _replace(module, nn.Linear, replacement)
    elif precision == "int4":
        # As in GGUF files: with 4 bits a target's LM head alone would cost more quality than all its layers. A draft
        # guesses as well with 4.
        head = module.lm_head if isinstance(module, Decoder) else None
        eight, four = (_int8_linear, _int4_linear) if on_cpu else (_rounded_int8, _rounded_int4)
        with one_thread():
            _replace(module, nn.Linear, lambda linear: (eight if linear is head else four)(linear))
    keeps_fp32 = precision == "fp32" or (on_cpu and precision in ("int8", "int4"))
    _convert(module, device, torch.float32 if keeps_fp32 else torch.bfloat16)
    return module


def _prepare_tap(tap: FeatureTap, precision: TorchPrecision, device: str, range_X: Tensor | None) -> FeatureTap:
    prepared = prepare(tap, precision, device, lambda _: ())
    if range_X is not None and precision == "int8" and _is_cpu(device):
        # No norm comes before the tap that could take the factor: it is applied to the features.
        weight = tap.project.weight
        factor_X = smoothing_factor(weight, range_X, "join")
        prepared._modules["project"] = Int8Linear(scaled_columns(weight, factor_X), None, input_factor_I=1 / factor_X)
    return prepared


@contextmanager
def one_thread() -> Iterator[None]:
    """Has torch use one thread: for many small operations, as beside another busy process each would wait for the
    second one; and between compiled steps, as torch's threads go on spinning for milliseconds, on the cores that the
    next step needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _is_cpu(device: str) -> bool:
    return torch.device(device).type == "cpu"


def _int8_linear(linear: nn.Linear) -> nn.Module:
    return Int8Linear(linear.weight, _fp32(linear.bias))


def _int4_linear(linear: nn.Linear) -> nn.Module:
    return Int4Linear(linear.weight, _fp32(linear.bias))


def _fp32(bias_O: Tensor | None) -> Tensor | None:
    return None if bias_O is None else bias_O.float()


def _rounded_int4(linear: nn.Linear) -> nn.Module:
    weight_OI = linear.weight.float()
    scale_OG, least_OG = int4_scales(weight_OI)
    scale_OI, least_OI = (of_each_input(x_OG, weight_OI.shape[1]) for x_OG in (scale_OG, least_OG))
    return _with_weight(linear, int4_values(weight_OI, scale_OG, least_OG).float() * scale_OI + least_OI)


def _rounded_int8(linear: nn.Linear) -> nn.Module:
    weight_OI = linear.weight.float()
    scale_O1 = int8_scale(weight_OI)
    return _with_weight(linear, int8_values(weight_OI, scale_O1).float() * scale_O1)


def _with_weight(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    linear = copy.copy(linear)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class _Dequantized(nn.Module):
    """A layer of a quantized checkpoint, with its weights dequantized once and its inputs rounded as it says: what a
    quantized engine computes, at the speed of one that is not."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self._layer = layer
        self.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x_MI: Tensor) -> Tensor:
        return F.linear(self._layer.prepare_input(x_MI), self.weight, self.bias)


def _replace(module: nn.Module, kind: type[N], replacement: Callable[[N], nn.Module]) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, replacement(child))


def _convert(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    # module.to() would write through the parameters into the caller's module.
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                # Of an embedding each step uses a few rows, which become fp32 then: it is not made larger.
                stays = isinstance(part, nn.Embedding) and parameter.dtype.itemsize <= dtype.itemsize
                converted = parameter.to(device, parameter.dtype if stays else dtype)
                part._parameters[name] = nn.Parameter(converted, requires_grad=False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer.to(device) if buffer is not None else None


def vocabulary_ids(token_ids_V: Tensor, vocab_size: int) -> Tensor | None:
    """Which token each LM head row is of; None where row i is token i, for the whole vocabulary."""
    if len(token_ids_V) != vocab_size:
        return token_ids_V
    return None if bool((token_ids_V == torch.arange(vocab_size, device=token_ids_V.device)).all()) else token_ids_V
