"""Triton kernels of training: device code, and how it is launched. Imported only where there is a GPU.

Each has its definition in PyTorch beside the code that calls it: `ssv.builder.training.corpus` (attention over a cache)
and `ssv.builder.training.head_loss` (the loss of an LM head).

Shapes: R rows of a cache, N query heads, K key/value heads, S tokens of the cache, D head dim, V LM head rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)

_MOST_GROUPS = 16
_BLOCK = 64


def can_attend(dim: int, groups: int) -> bool:
    """Whether `attend_cache` has a kernel for a head dim and a number of query heads to a key/value head."""
    return dim >= 16 and dim & (dim - 1) == 0 and groups <= _MOST_GROUPS


def attend_cache(q_RND: Tensor, keys_RKSD: Tensor, values_RKSD: Tensor, at_1: Tensor) -> Tensor:
    """Attention of one query a row over the first `at_1` + 1 tokens of a cache, [R, N * D].

    How far the cache is filled stands in memory of the device, so that a graph of this can be replayed while it fills.

    Args:
        q_RND: contiguous, of the cache's type.
        keys_RKSD, values_RKSD: contiguous.
        at_1: int64, the number of tokens before the query's own, whose key and value are in the cache too.
    """
    rows, kv_heads, length, dim = keys_RKSD.shape
    groups = q_RND.shape[1] // kv_heads
    out = q_RND.new_empty(rows, q_RND.shape[1] * dim)
    _attend_cache[(rows * kv_heads,)](
        q_RND, keys_RKSD, values_RKSD, at_1, out, length, dim**-0.5,
        GROUPS=groups, PADDED=_MOST_GROUPS, DIM=dim, BLOCK=_BLOCK, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _attend_cache(
    q,
    keys,
    values,
    at,
    out,
    length,
    scale,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R * K): a program reads the keys and values that share a head, once for all its query heads."""
    pair = tl.program_id(0).to(tl.int64)
    filled = tl.load(at) + 1
    group, column, token = tl.arange(0, PADDED), tl.arange(0, DIM), tl.arange(0, BLOCK)
    is_head = group[:, None] < GROUPS
    head = (pair * GROUPS + group)[:, None] * DIM + column[None, :]
    queries = tl.load(q + head, mask=is_head, other=0.0)
    keys += pair * length * DIM
    values += pair * length * DIM
    top = tl.full([PADDED], -1e30, dtype=tl.float32)
    total = tl.zeros([PADDED], dtype=tl.float32)
    seen = tl.zeros([PADDED, DIM], dtype=tl.float32)
    for start in range(0, filled, BLOCK):
        is_there = start + token < filled
        offset = (start + token)[:, None] * DIM + column[None, :]
        key = tl.load(keys + offset, mask=is_there[:, None], other=0.0)
        score = tl.dot(queries, tl.trans(key)) * (scale * _LOG2E)
        score = tl.where(is_there[None, :], score, -1e30)
        new_top = tl.maximum(top, tl.max(score, axis=1))
        share = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        value = tl.load(values + offset, mask=is_there[:, None], other=0.0)
        total = total * shrink + tl.sum(share, axis=1)
        seen = seen * shrink[:, None] + tl.dot(share.to(value.dtype), value)
        top = new_top
    tl.store(out + head, seen / total[:, None], mask=is_head)


def head_loss_(
    logits_RV: Tensor, label_RV: Tensor, weight_R: Tensor, loss_R: Tensor, agrees_R: Tensor, tv_share: float
) -> None:
    """See `ssv.builder.training.head_loss.head_loss_`."""
    rows, vocab = logits_RV.shape
    block = triton.next_power_of_2(vocab)
    _head_loss[(rows,)](
        logits_RV, label_RV, weight_R, loss_R, agrees_R, vocab, tv_share,
        BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip


@triton.jit
def _head_loss(logits, label, weight, loss, agrees, vocab, tv_share, BLOCK: tl.constexpr):
    """Grid (R): a program holds a row of both in registers, so that each is read once and the gradient written once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_there = column < vocab
    z = tl.load(logits + row * vocab + column, mask=is_there, other=-1e30).to(tl.float32)
    y = tl.load(label + row * vocab + column, mask=is_there, other=-1e30).to(tl.float32)
    z_top = tl.max(z, axis=0)
    y_top = tl.max(y, axis=0)
    # The first of equals, as in PyTorch.
    z_first = tl.min(tl.where(z == z_top, column, BLOCK), axis=0)
    y_first = tl.min(tl.where(y == y_top, column, BLOCK), axis=0)
    tl.store(agrees + row, (z_first == y_first).to(tl.int8))
    z -= z_top
    q = tl.exp(z)
    log_total = tl.log(tl.sum(q, axis=0))
    q = q / tl.sum(q, axis=0)
    p = tl.exp(y - y_top)
    p = p / tl.sum(p, axis=0)
    cross_entropy = log_total - tl.sum(p * tl.where(is_there, z, 0.0), axis=0)
    is_below = q < p
    variation = 1.0 - tl.sum(tl.minimum(p, q), axis=0)
    below = tl.sum(tl.where(is_below, q, 0.0), axis=0)
    w = tl.load(weight + row)
    tl.store(loss + row, w * ((1.0 - tv_share) * cross_entropy + tv_share * variation))
    gradient = (1.0 - tv_share) * (q - p) + tv_share * q * (below - tl.where(is_below, 1.0, 0.0))
    tl.store(logits + row * vocab + column, w * gradient, mask=is_there)
