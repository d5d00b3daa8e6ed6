"""Keys and values of every row, in place, addressed by slot.

Rolling a row back is moving its length, which the caller keeps: what lies beyond is never seen and gets overwritten.

Shapes: L layers, B rows, K key/value heads, S slots of a row, D head dim, T tokens of a step's rows, M tokens of a
step.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssv.model.checkpoint import DecoderSpec
from ssv.runtime.engines.contract import Branches, check_kept


class KVCache:
    """The cache of one engine.

    Attributes:
        keys, values: [L, B, K, S, D].
    """

    def __init__(
        self, spec: DecoderSpec, max_batch: int, max_length: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (2, spec.num_layers, max_batch, spec.num_kv_heads, max_length, spec.head_dim)
        # Zeros, not empty: masked positions are multiplied by zero, and zero times NaN is NaN.
        self._both = _zeros(shape, dtype, torch.device(device))
        self.keys, self.values = self._both

    @staticmethod
    def bytes_for(spec: DecoderSpec, max_batch: int, max_length: int, dtype: torch.dtype) -> int:
        """What one takes, without making it."""
        return KVCache(spec, max_batch, max_length, dtype, "meta")._both.nbytes

    def move_row(self, source: int, dest: int, length: int) -> None:
        """Copies the first `length` slots of row `source` over those of `dest`."""
        self._both[:, :, dest, :, :length] = self._both[:, :, source, :, :length]

    def keep(self, row: int, start: int, slots: Sequence[int]) -> None:
        """See `Engine.keep`."""
        check_kept(start, slots, self.keys.shape[3])
        stay = next((i for i, slot in enumerate(slots) if slot != start + i), len(slots))
        if stay == len(slots):
            return
        moved = torch.tensor(slots[stay:], device=self.keys.device)
        of_row = self._both[:, :, row]
        of_row[..., start + stay : start + len(slots), :] = of_row.index_select(3, moved)

    def read(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of slots `start` to `stop` of a row, [2, L, K, stop - start, D]."""
        return self._both[:, :, row, :, start:stop].clone(memory_format=torch.contiguous_format)

    def write(self, row: int, start: int, held_2LKMD: Tensor) -> None:
        """Puts what `read` gave into a row, from slot `start` on."""
        self._both[:, :, row, :, start : start + held_2LKMD.shape[3]] = held_2LKMD


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory, on a CPU, only where something is written: most requests are shorter than a row."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class CachedAttend:
    """Attention of one step over the cache: `ssv.model.decoder.Attend`."""

    def __init__(self, keys_LBKSD: Tensor, values_LBKSD: Tensor, slot_BT: Tensor, mask_B1TS: Tensor) -> None:
        """Attends for the tokens of one step.

        Args:
            keys_LBKSD, values_LBKSD: the step's rows of the cache.
            slot_BT: int64, of each token.
            mask_B1TS: from `visible`; S is as much of a row as can be seen at the most.
        """
        self._keys, self._values, self._mask_B1TS = keys_LBKSD, values_LBKSD, mask_B1TS
        device = slot_BT.device
        batch, tokens = slot_BT.shape
        row_M1 = torch.arange(batch, device=device).repeat_interleave(tokens)[:, None]
        heads_1K = torch.arange(keys_LBKSD.shape[2], device=device)[None]
        self._at = (row_M1, heads_1K, slot_BT.flatten()[:, None])

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        keys.index_put_(self._at, k_MKD.to(keys.dtype))
        values.index_put_(self._at, v_MKD.to(values.dtype))
        last = self._mask_B1TS.shape[3]
        return grouped_attention(
            q_MND.to(keys.dtype).flatten(1), keys[:, :, :last], values[:, :, :last], self._mask_B1TS
        )


def visible(slot_BT: Tensor, num_slots: int, branches: Branches | None = None) -> Tensor:
    """The mask of the engine contract, bool [B, 1, T, num_slots], on the device of `slot_BT`.

    Args:
        slot_BT: of each token; without branches it sees all up to its own.
    """
    column_S = torch.arange(num_slots, device=slot_BT.device)
    if branches is None:
        return (column_S <= slot_BT[:, :, None])[:, None]
    path_BTD = branches.path_BTD.to(slot_BT.device, torch.int64)
    prefix_B11 = branches.prefix_B.to(slot_BT.device)[:, None, None]
    mask_BTS = (column_S < prefix_B11).repeat(1, slot_BT.shape[1], 1)
    # Where a path ends, its own slot stands for what is missing: it is seen already.
    mask_BTS.scatter_(2, path_BTD.where(path_BTD >= 0, slot_BT[:, :, None]), True)
    return mask_BTS[:, None]


def grouped_attention(queries_MX: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor, mask_B1TS: Tensor) -> Tensor:
    """Attention of [M, N * D] queries, N query heads. The query heads of one key/value head are taken as further
    queries of it, so that the cache is never expanded.

    Returns:
        [M, N * D].
    """
    batch, kv_heads, _, dim = keys_BKSD.shape
    tokens = mask_B1TS.shape[2]
    groups = queries_MX.shape[1] // (kv_heads * dim)
    q = queries_MX.view(batch, tokens, kv_heads, groups, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    mask = mask_B1TS.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(q, keys_BKSD, values_BKSD, attn_mask=mask)
    return out.view(batch, kv_heads, groups, tokens, dim).permute(0, 3, 1, 2, 4).reshape(batch * tokens, -1)
