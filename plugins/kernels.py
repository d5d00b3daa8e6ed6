"""The ops as Triton kernels: device code only.

Arguments stand in the order in which TensorRT launches a kernel: input pointers, int32 scalars, output pointers.
Scratch memory and constants follow; without scratch (SPLITS = 1) a kernel needs nothing but its arguments, and that is
what is compiled ahead of time.

A program reads its share of a row a tile at a time. A lane of it has a piece of each block of the tile: as many logits
as one load of 16 bytes holds. What is found in a lane's pieces is joined to what the lane knows; lanes are joined at
the end, then the programs of a row by the one that comes last. So nothing waits inside the loop, and one exponential is
taken of each logit.

Exponents of `score` are to base 2 and counted from a row's, a share's or a lane's `_base`: x * log2(e) - base is one
instruction, and so is 2 to it. The base is a rounded number, but one and the same in all sums that are added, and
exponents are rounded only once.

Rows are contiguous. Offsets of rows are int64: 16,384 rows of 262,144 exceed int32.

Shapes: see `contract.py`; U blocks of a tile, L lanes, C logits of a piece, S programs that share a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssv.plugins import reference

# Compiled code takes such globals as constants.
_MIN_BELOW = tl.constexpr(reference.MIN_BELOW)
_MIN_REST = tl.constexpr(reference.MIN_REST)
_MAX_LOGIT = tl.constexpr(reference.MAX_LOGIT)
_KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1e30)
PARTIAL = tl.constexpr(8)
"""Numbers that a program of `score` leaves for the one that finishes its row."""


@triton.jit
def score_kernel(
    hidden,
    logits,
    weight,
    bias,
    token,
    prob,
    entropy,
    margin,
    reject_prob,
    partial,
    arrived,
    HIDDEN: tl.constexpr,
    VOCAB: tl.constexpr,
    USES_HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    PIECE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid (R, SPLITS): a program reads its share of the logits of a row, and of its hidden state."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    hidden += row * HIDDEN
    logits += row * VOCAB
    token += row
    prob += row
    entropy += row
    margin += row
    reject_prob += row
    # All that is not logits is asked for before them, so that nothing waits for it at the end.
    confidence = weight + (HIDDEN if USES_HIDDEN else 0)
    of_rest = tl.load(confidence)
    of_entropy = tl.load(confidence + 1)
    of_margin = tl.load(confidence + 2)
    linear = tl.load(bias)
    column = split * BLOCK_H + tl.arange(0, BLOCK_H)
    is_used = (column < HIDDEN) & USES_HIDDEN
    h = tl.load(hidden + column, mask=is_used, other=0.0)
    w = tl.load(weight + column, mask=is_used, other=0.0)
    TILE: tl.constexpr = BLOCKS * LANES * PIECE
    SHARE: tl.constexpr = (VOCAB + SPLITS * TILE - 1) // (SPLITS * TILE)
    top, index, second, rest, weighted = _scored_share(logits, split * SHARE, SHARE, VOCAB, BLOCKS, LANES, PIECE)
    h = h.to(tl.float32)
    product = tl.sum(h * w, axis=0)
    square = tl.sum(h * h, axis=0)
    if SPLITS == 1:
        linear += product / tl.sqrt(square / HIDDEN + 1e-6)
        found = (top, index, second, rest, weighted)
        _store_score(found, linear, of_rest, of_entropy, of_margin, token, prob, entropy, margin, reject_prob)
    else:
        own = partial + (row * SPLITS + split) * PARTIAL
        tl.store(own, top)
        tl.store(own + 1, index.to(tl.float32))  # exact: below 2^24
        tl.store(own + 2, second)
        tl.store(own + 3, rest)
        tl.store(own + 4, weighted)
        tl.store(own + 5, product)
        tl.store(own + 6, square)
        if _arrive(arrived + row, SPLITS):
            # From L2: other multiprocessors wrote it.
            at = partial + (row * SPLITS + tl.arange(0, SPLITS)) * PARTIAL
            top_S = tl.load(at, cache_modifier=".cg")
            index_S = tl.load(at + 1, cache_modifier=".cg").to(tl.int32)
            second_S = tl.load(at + 2, cache_modifier=".cg")
            rest_S = tl.load(at + 3, cache_modifier=".cg")
            weighted_S = tl.load(at + 4, cache_modifier=".cg")
            product = tl.sum(tl.load(at + 5, cache_modifier=".cg"), axis=0)
            square = tl.sum(tl.load(at + 6, cache_modifier=".cg"), axis=0)
            linear += product / tl.sqrt(square / HIDDEN + 1e-6)
            top = tl.max(top_S, axis=0)
            index = tl.min(tl.where(top_S == top, index_S, VOCAB - 1), axis=0)
            # The largest of the other shares belong to the rest.
            is_other = index_S != index
            exponent = _exponent(top_S, _base(top_S))
            e = tl.exp2(exponent)
            rest_S += tl.where(is_other, e, 0.0)
            weighted_S += tl.where(is_other, e * exponent, 0.0)
            rest_S, weighted_S = _rebased(rest_S, weighted_S, _base(top_S), _base(top))
            # No share's second is above its largest: that of each share may count.
            second = tl.max(tl.maximum(second_S, tl.where(is_other, top_S, -float("inf"))), axis=0)
            found = (top, index, second, tl.sum(rest_S, axis=0), tl.sum(weighted_S, axis=0))
            _store_score(found, linear, of_rest, of_entropy, of_margin, token, prob, entropy, margin, reject_prob)


@triton.jit
def sparse_gather_kernel(
    hidden,
    row,
    weight,
    num_rows,
    gathered,
    normed,
    HIDDEN: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (R,), a program for each row."""
    r = tl.program_id(0).to(tl.int64)
    source = tl.load(row + r).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    is_known = (source >= 0) & (source < num_rows)
    x = tl.load(hidden + source * HIDDEN + column, mask=(column < HIDDEN) & is_known, other=0.0)
    tl.store(gathered + r * HIDDEN + column, x, mask=column < HIDDEN)
    x = x.to(tl.float32)
    w = tl.load(weight + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / HIDDEN + EPS)
    tl.store(normed + r * HIDDEN + column, (x * scale * w).to(normed.dtype.element_ty), mask=column < HIDDEN)


@triton.jit
def choose_kernel(
    x,
    seed,
    position,
    token,
    index,
    partial,
    arrived,
    VOCAB: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SHARE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid (R, SPLITS), each program for SHARE blocks of a row.

    Most blocks have nothing that can be chosen after top-k or top-p, and cost their reading alone.
    """
    r = tl.program_id(0)
    split = tl.program_id(1)
    row = x + r.to(tl.int64) * VOCAB
    key = tl.load(seed + r)
    at = tl.load(position + r).to(tl.uint32)
    lane = tl.arange(0, BLOCK_V)
    best = tl.full((BLOCK_V,), -float("inf"), tl.float64)
    best_column = tl.zeros((BLOCK_V,), tl.int32)
    top = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    for i in range(0, SHARE):
        column = (split * SHARE + i) * BLOCK_V + lane
        x_V = tl.load(row + column, mask=column < VOCAB, other=-float("inf"))
        top = tl.maximum(top, x_V, propagate_nan=_KEEP_NAN)
        if tl.max(x_V, axis=0) > -float("inf"):
            token_V = column
            if token is not None:
                token_V = tl.load(token + column, mask=column < VOCAB, other=0).to(tl.int32)
            zero = tl.zeros((BLOCK_V,), tl.uint32)
            w0, w1, w2, w3 = tl.philox(key, (token_V >> 2).to(tl.uint32), zero + at, zero, zero)
            low = tl.where((token_V & 1) == 0, w0, w1)
            high = tl.where((token_V & 1) == 0, w2, w3)
            word = tl.where((token_V & 2) == 0, low, high)
            noise = -tl.log(-tl.log((word.to(tl.float64) + 0.5) * 2.0**-32))
            scored = x_V.to(tl.float64) + noise
            best_column = tl.where(scored > best, column, best_column)
            best = tl.maximum(best, scored)
    largest = tl.max(best, axis=0)
    found = tl.min(tl.where(best == largest, best_column, VOCAB - 1), axis=0)
    # The largest logit is a number, or -inf, only where none is NaN or infinite.
    most = tl.reduce(top, 0, _larger_or_nan)
    largest = tl.where(most < float("inf"), largest, float("nan"))
    own = partial + (r * SPLITS + split) * 2
    tl.store(own, largest)
    tl.store(own + 1, found.to(tl.float64))
    if _arrive(arrived + r, SPLITS):
        other = partial + (r * SPLITS + tl.arange(0, SPLITS)) * 2
        largest_S = tl.load(other, cache_modifier=".cg")
        column_S = tl.load(other + 1, cache_modifier=".cg").to(tl.int32)
        largest = tl.reduce(largest_S, 0, _larger_or_nan)
        found = tl.min(tl.where(largest_S == largest, column_S, VOCAB - 1), axis=0)
        tl.store(index + r, tl.where(largest > -float("inf"), found, -1))


# --- parts ----------------------------------------------------------------------------------------------------------


@triton.jit
def _scored_share(
    logits,
    first_tile,
    SHARE: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """What is found in tiles `first_tile` to `first_tile + SHARE` of a row.

    It is the largest logit, its index, and the second largest; and over all logits but the largest, the sums of
    e = 2^exponent and of e * exponent, counted from the base of the largest.
    """
    lane = tl.arange(0, LANES)
    in_piece = tl.arange(0, PIECE)
    offset = lane[:, None] * PIECE + in_piece[None, :]
    first_block = first_tile * BLOCKS
    top = tl.full((LANES,), -float("inf"), tl.float32)
    block = tl.zeros((LANES,), tl.int32) + first_block  # in which `top` is
    base = _base(top)
    total = tl.zeros((LANES,), tl.float32)
    weighted = total
    for tile in range(first_tile, first_tile + SHARE):
        # Blocks are unrolled, not a dimension: what is reduced stays within a thread, whatever the layout.
        pieces = ()
        for u in tl.static_range(BLOCKS):
            column = (tile * BLOCKS + u) * (LANES * PIECE) + offset
            pieces += (tl.load(logits + column, mask=column < VOCAB, other=-float("inf")),)
        for u in tl.static_range(BLOCKS):
            top_u = tl.max(pieces[u].to(tl.float32), axis=1)
            block = tl.where(top_u > top, tile * BLOCKS + u, block)
            top = tl.maximum(top, top_u)
        total, weighted = _rebased(total, weighted, base, _base(top))
        base = _base(top)
        for u in tl.static_range(BLOCKS):
            exponent = _exponent(pieces[u].to(tl.float32), base[:, None])
            e = tl.exp2(exponent)
            total += tl.sum(e, axis=1)
            weighted += tl.sum(e * exponent, axis=1)
    largest = tl.max(top, axis=0)
    place = block * LANES + lane
    first = tl.min(tl.where(top == largest, place, 2**31 - 1), axis=0)
    is_other = place != first
    # What the lane of the largest has read is read once more: with the largest in its sum, what is small beside it
    # would be lost.
    again = tl.arange(0, triton.next_power_of_2(SHARE * BLOCKS))
    column = ((first_block + again[:, None]) * LANES + first % LANES) * PIECE + in_piece[None, :]
    mask = (again[:, None] < SHARE * BLOCKS) & (column < VOCAB)
    x = tl.load(logits + column, mask=mask, other=-float("inf")).to(tl.float32)
    index = tl.min(tl.min(tl.where(x == largest, column, VOCAB - 1), axis=1), axis=0)
    x = tl.where(column == index, -float("inf"), x)
    exponent = _exponent(x, _base(largest))
    e = tl.exp2(exponent)
    total, weighted = _rebased(tl.where(is_other, total, 0.0), tl.where(is_other, weighted, 0.0), base, _base(largest))
    rest = tl.sum(total, axis=0) + tl.sum(tl.sum(e, axis=1), axis=0)
    weighted = tl.sum(weighted, axis=0) + tl.sum(tl.sum(e * exponent, axis=1), axis=0)
    second = tl.maximum(tl.max(tl.where(is_other, top, -float("inf")), axis=0), tl.max(tl.max(x, axis=1), axis=0))
    return largest, index, second, rest, weighted


@triton.jit
def _base(top):
    """What exponents are counted from where `top` is the largest logit."""
    return tl.maximum(top * _LOG2E, _LOWEST)


@triton.jit
def _exponent(x, base):
    """The exponent of a logit, bounded from below, so that its product with 2 to it is finite."""
    return tl.maximum(tl.fma(x, _LOG2E, -base), _MIN_BELOW, propagate_nan=_KEEP_NAN)


@triton.jit
def _rebased(total, weighted, base, new_base):
    """Sums of 2^exponent and of 2^exponent * exponent, counted from another base."""
    shift = base - new_base
    scale = tl.exp2(shift)
    return scale * total, scale * (weighted + shift * total)


@triton.jit
def _store_score(found, linear, of_rest, of_entropy, of_margin, token, prob, entropy, margin, reject_prob):
    """Writes the results of a row of which everything has been found."""
    top, index, second, rest, weighted = found
    # The base is rounded, so the largest logit's own exponent is not quite 0.
    exponent = _exponent(top, _base(top))
    rest, weighted = _rebased(rest, weighted, 0.0, exponent)
    # A row without a distribution.
    rest = tl.where(tl.abs(top) < _MAX_LOGIT, rest, float("nan"))
    total = 1.0 + rest
    mean = tl.log(total) - _LN2 * weighted / total
    gap = tl.where(rest == rest, -tl.maximum(second - top, _MIN_BELOW), float("nan"))
    log_rest = tl.log(tl.maximum(rest / total, _MIN_REST, propagate_nan=_KEEP_NAN))
    linear += of_rest * log_rest + of_entropy * mean + of_margin * gap
    tl.store(token, index)
    tl.store(prob, 1.0 / total)
    tl.store(entropy, mean)
    tl.store(margin, gap)
    tl.store(reject_prob, 1.0 / (1.0 + tl.exp(-linear)))


@triton.jit
def _arrive(counter, expected):
    """Whether this program is the last of `expected` to come here; it sets the counter back for the next launch."""
    tl.debug_barrier()  # all threads' stores come before the counter
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == expected - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=_KEEP_NAN)
