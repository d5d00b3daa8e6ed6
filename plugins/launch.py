"""The ops by Triton kernels: signatures, results and errors of `reference.py`, without waiting for the device.

Block sizes and shares are what was fastest on an H200, those of `choose` on an H100 (`benchmarks/kernels.py`).

Shapes: see `contract.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import triton
from torch import Tensor

from ssv.plugins import kernels
from ssv.plugins.contract import NUM_CONFIDENCE, Score, check_choose, check_score, check_sparse_gather

BLOCKS, LANES, WARPS = 4, 256, 8
"""Shape of a program that reads logits: loads that each lane has under way, lanes, and warps."""

SCORE_LANES, SCORE_WARPS = 32, 1
"""The same of `score` where programs share a row: one of a single warp joins its lanes without a barrier."""

SCORE_PROGRAMS, SCORE_TILES = 12, 8
"""Programs of `score` for each multiprocessor, if there are tiles enough; and the most tiles for each program."""

CHOOSE_BLOCK, CHOOSE_WARPS, CHOOSE_PROGRAMS = 512, 4, 16
"""Logits that a program of `choose` takes at a time, its warps, and programs for each multiprocessor."""


def score(hidden_RH: Tensor, logits_RV: Tensor, weight_F: Tensor, bias_1: Tensor) -> Score:
    """See `reference.score`."""
    check_score(hidden_RH, logits_RV, weight_F, bias_1)
    rows, vocab = logits_RV.shape
    hidden, device = hidden_RH.shape[1], logits_RV.device
    token_R = torch.empty(rows, dtype=torch.int32, device=device)
    prob_R, entropy_R, margin_R, reject_R = torch.empty(4, rows, dtype=torch.float32, device=device).unbind()
    splits = _score_splits(rows, vocab, logits_RV.dtype, device)
    uses_hidden = len(weight_F) > NUM_CONFIDENCE
    if rows:
        kernels.score_kernel[(rows, splits)](
            hidden_RH, logits_RV, weight_F, bias_1, token_R, prob_R, entropy_R, margin_R, reject_R,
            torch.empty(rows * splits * kernels.PARTIAL.value, device=device) if splits > 1 else None,
            _arrivals(rows, device) if splits > 1 else None,
            **score_constants(hidden, vocab, logits_RV.dtype, uses_hidden, splits, SCORE_LANES), num_warps=SCORE_WARPS,
        )  # fmt: skip
    return Score(token_R, prob_R, entropy_R, margin_R, reject_R)


def sparse_gather(hidden_MH: Tensor, row_R: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.sparse_gather`."""
    check_sparse_gather(hidden_MH, row_R, weight_H, eps)
    rows, hidden = len(row_R), hidden_MH.shape[1]
    gathered_RH = torch.empty(rows, hidden, dtype=hidden_MH.dtype, device=hidden_MH.device)
    normed_RH = torch.empty(rows, hidden, dtype=weight_H.dtype, device=hidden_MH.device)
    if rows:
        kernels.sparse_gather_kernel[(rows,)](
            hidden_MH, row_R, weight_H, len(hidden_MH), gathered_RH, normed_RH,
            **gather_constants(hidden, eps), num_warps=row_warps(hidden),
        )  # fmt: skip
    return gathered_RH, normed_RH


def choose(x_RV: Tensor, seed_R: Tensor, position_R: Tensor, token_V: Tensor | None = None) -> Tensor:
    """See `reference.choose`."""
    check_choose(x_RV, seed_R, position_R, token_V)
    rows, vocab = x_RV.shape
    device = x_RV.device
    index_R = torch.empty(rows, dtype=torch.int32, device=device)
    block = min(CHOOSE_BLOCK, triton.next_power_of_2(vocab))
    blocks = triton.cdiv(vocab, block)
    # As many programs as fill the GPU; a row that is shared has at least one block for each.
    wanted = triton.cdiv(CHOOSE_PROGRAMS * _num_multiprocessors(device), max(rows, 1))
    splits = min(triton.next_power_of_2(wanted), triton.next_power_of_2(blocks))
    if rows:
        kernels.choose_kernel[(rows, splits)](
            x_RV, seed_R, position_R, token_V, index_R,
            torch.empty(rows * splits * 2, dtype=torch.float64, device=device), _arrivals(rows, device),
            VOCAB=vocab, BLOCK_V=block, SHARE=triton.cdiv(blocks, splits), SPLITS=splits, num_warps=CHOOSE_WARPS,
        )  # fmt: skip
    return index_R


# --- what kernels are specialised to, here and ahead of time --------------------------------------------------------


def score_constants(
    hidden: int, vocab: int, dtype: torch.dtype, uses_hidden: bool, splits: int, lanes: int
) -> dict[str, int]:
    """Compile-time constants of `score_kernel`."""
    block = triton.next_power_of_2(triton.cdiv(hidden, splits))
    sizes = {"HIDDEN": hidden, "USES_HIDDEN": uses_hidden, "BLOCK_H": block, "SPLITS": splits}
    return {**sizes, **_tile_constants(vocab, dtype, lanes)}


def gather_constants(hidden: int, eps: float) -> dict[str, float]:
    """Compile-time constants of `sparse_gather_kernel`."""
    return {"HIDDEN": hidden, "EPS": eps, "BLOCK_H": triton.next_power_of_2(hidden)}


def row_warps(hidden: int) -> int:
    """Warps for a program that holds a row: 32 elements a thread, and no fewer than four."""
    return min(max(triton.next_power_of_2(hidden) // 1024, 4), 16)


def _tile_constants(vocab: int, dtype: torch.dtype, lanes: int) -> dict[str, int]:
    """A piece is 16 bytes; a row that is shorter than a tile has a smaller one."""
    piece = 16 // dtype.itemsize
    blocks = min(BLOCKS, triton.next_power_of_2(triton.cdiv(vocab, lanes * piece)))
    return {"VOCAB": vocab, "BLOCKS": blocks, "LANES": lanes, "PIECE": piece}


def _num_tiles(vocab: int, dtype: torch.dtype, lanes: int) -> int:
    sizes = _tile_constants(vocab, dtype, lanes)
    return triton.cdiv(vocab, sizes["BLOCKS"] * lanes * sizes["PIECE"])


def _score_splits(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Programs that share a row of `score`."""
    tiles = _num_tiles(vocab, dtype, SCORE_LANES)
    wanted = max(
        triton.cdiv(SCORE_PROGRAMS * _num_multiprocessors(device), max(rows, 1)), triton.cdiv(tiles, SCORE_TILES)
    )
    return min(triton.next_power_of_2(wanted), triton.next_power_of_2(tiles))


@cache
def _num_multiprocessors(device: torch.device) -> int:
    # Triton's interpreter runs on the CPU: few programs, so that it is fast, and more than one, so that it shares rows.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


_NUM_CAPTURED, _CAPTURED_SIZE = 1 << 20, 1 << 10
_CAPTURED: dict[torch.device, Iterator[Tensor]] = {}
_ARRIVALS: dict[tuple[torch.device, int], Tensor] = {}


def _arrivals(num: int, device: torch.device) -> Tensor:
    """Counters that are 0, and that the kernel which uses them sets back.

    They are this stream's alone, as kernels of two streams may run at once. A CUDA graph may be replayed beside
    anything,
    so every captured call has its own: from a store that was cleared before the capture, while there are any, as
    clearing them in the graph costs 1 us each time.
    """
    if device.type != "cuda":
        return torch.zeros(num, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        own = next(_CAPTURED[device], None) if device in _CAPTURED and num <= _CAPTURED_SIZE else None
        return own if own is not None else torch.zeros(num, dtype=torch.int32, device=device)
    if device not in _CAPTURED:
        _CAPTURED[device] = iter(torch.zeros(_NUM_CAPTURED, dtype=torch.int32, device=device).split(_CAPTURED_SIZE))
        torch.cuda.synchronize(device)  # once: graphs on any stream will use them
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    held = _ARRIVALS.get(key)
    if held is None or len(held) < num:
        held = _ARRIVALS[key] = torch.zeros(max(num, 1024), dtype=torch.int32, device=device)
    return held
