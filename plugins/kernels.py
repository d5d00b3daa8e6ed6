"""The ops as Triton kernels: device code only.

Arguments stand in the order in which TensorRT launches a kernel: input pointers, int32 scalars, output pointers. Scratch memory and
constants follow; without scratch (SPLITS = 1) a kernel needs nothing but its arguments, and that is what is compiled ahead of time.

A program reads its share of a row a tile at a time. A lane of it has a piece of each block of the tile: as many logits as one load of 16 bytes
holds. What is found in a lane's pieces is joined to what the lane knows; lanes are joined at the end, then the programs of a row by the one
that comes last. So nothing waits inside the loop, and one exponential is taken of each logit.

Rows are contiguous. Offsets of rows are int64: 16,384 rows of 262,144 exceed int32.

Shapes: see `contract.py`; U blocks of a tile, L lanes, C logits of a piece, S programs that share a row.

May import: nothing else of ssv.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The same numbers as in `reference.py`; compiled code takes globals as constants.
_MIN_BELOW = tl.constexpr(-1e4)
_MIN_REST = tl.constexpr(1e-7)
_DRAW_BITS = tl.constexpr(38)
_UNIFORM_BITS = tl.constexpr(24)
_KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)
_LOG2E = tl.constexpr(1.4426950408889634)
_PARTIAL = tl.constexpr(8)
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
    """Grid (R, SPLITS + 1), the last program of a row for the hidden state; with SPLITS = 1 it is (R,)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    logits += row * VOCAB
    token += row
    prob += row
    entropy += row
    margin += row
    reject_prob += row
    # Asked for early, so that the program that comes last does not wait for them.
    confidence = weight + (HIDDEN if USES_HIDDEN else 0)
    of_rest = tl.load(confidence)
    of_entropy = tl.load(confidence + 1)
    of_margin = tl.load(confidence + 2)
    linear = tl.load(bias)
    TILE: tl.constexpr = BLOCKS * LANES * PIECE
    SHARE: tl.constexpr = (VOCAB + SPLITS * TILE - 1) // (SPLITS * TILE)
    if SPLITS == 1:
        if USES_HIDDEN:
            linear += _hidden_score(hidden + row * HIDDEN, weight, HIDDEN, BLOCK_H)
        found = _scored_share(logits, 0, SHARE, VOCAB, BLOCKS, LANES, PIECE)
        _store_score(found, linear, of_rest, of_entropy, of_margin, token, prob, entropy, margin, reject_prob)
    else:
        own = partial + (row * (SPLITS + 1) + split) * _PARTIAL
        if split == SPLITS:
            if USES_HIDDEN:
                linear += _hidden_score(hidden + row * HIDDEN, weight, HIDDEN, BLOCK_H)
            tl.store(own, linear)
        else:
            found = _scored_share(logits, split * SHARE, SHARE, VOCAB, BLOCKS, LANES, PIECE)
            tl.store(own, found[0])
            tl.store(own + 1, found[1].to(tl.float32))  # exact: below 2^24
            tl.store(own + 2, found[2])
            tl.store(own + 3, found[3])
            tl.store(own + 4, found[4])
        if _arrive(arrived + row, SPLITS + 1):
            first = partial + row * (SPLITS + 1) * _PARTIAL
            at = first + tl.arange(0, SPLITS) * _PARTIAL
            # From L2: other multiprocessors wrote it.
            top_S = tl.load(at, cache_modifier=".cg")
            index_S = tl.load(at + 1, cache_modifier=".cg").to(tl.int32)
            second_S = tl.load(at + 2, cache_modifier=".cg")
            rest_S = tl.load(at + 3, cache_modifier=".cg")
            weighted_S = tl.load(at + 4, cache_modifier=".cg")
            linear = tl.load(first + SPLITS * _PARTIAL, cache_modifier=".cg")
            # Near the largest of a share is nothing but itself.
            one_S = tl.full((SPLITS,), 1.0, tl.float32)
            found = _joined(top_S, index_S, second_S, rest_S, weighted_S, one_S, one_S - 1)
            _store_score(found, linear, of_rest, of_entropy, of_margin, token, prob, entropy, margin, reject_prob)


@triton.jit
def gather_norm_kernel(
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
    """Grid (R,)."""
    r = tl.program_id(0).to(tl.int64)
    source = tl.load(row + r).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    is_known = (source >= 0) & (source < num_rows)
    x = tl.load(hidden + source * HIDDEN + column, mask=(column < HIDDEN) & is_known, other=0.0)
    tl.store(gathered + r * HIDDEN + column, x, mask=column < HIDDEN)
    _store_normed(x, weight, normed + r * HIDDEN, column, HIDDEN, EPS)


@triton.jit
def sparse_gather_kernel(
    hidden,
    zone,
    length,
    weight,
    batch,
    tokens,
    normed,
    judged_row,
    start,
    HIDDEN: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Grid (B * T,), a program for each row of the step. It counts the judged rows before its own: that is its place."""
    m = tl.program_id(0)
    b = m // tokens
    is_first = m == b * tokens
    is_judged = _is_judged(zone, length, m, tokens, True)
    if is_judged | is_first | (m == batch * tokens - 1):
        column = tl.arange(0, BLOCK_H)
        # Asked for before it is needed: it comes while the others are counted.
        x = tl.load(hidden + m.to(tl.int64) * HIDDEN + column, mask=(column < HIDDEN) & is_judged, other=0.0)
        before = 0
        for first in range(0, m, BLOCK_M):
            others = first + tl.arange(0, BLOCK_M)
            before += tl.sum(_is_judged(zone, length, others, tokens, others < m).to(tl.int32), axis=0)
        if is_first:
            tl.store(start + b, before)
        if m == batch * tokens - 1:
            tl.store(start + batch, before + is_judged.to(tl.int32))
        if is_judged:
            tl.store(judged_row + before, m)
            _store_normed(x, weight, normed + tl.cast(before, tl.int64) * HIDDEN, column, HIDDEN, EPS)


@triton.jit
def verify_greedy_kernel(
    logits,
    row,
    start,
    drafted,
    tokens,
    num_kept,
    next_token,
    partial,
    arrived,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    PIECE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Grid (B, SPLITS, T): a program reads its share of one row of a sequence. With SPLITS = 1 the grid is (B,): a program reads a sequence's
    rows one after the other, and stops at the first rejection."""
    b = tl.program_id(0)
    begin = tl.load(start + b)
    end = tl.load(start + b + 1)
    TILE: tl.constexpr = BLOCKS * LANES * PIECE
    SHARE: tl.constexpr = (VOCAB + SPLITS * TILE - 1) // (SPLITS * TILE)
    if SPLITS == 1:
        kept = 0
        chosen = -1
        r = begin
        while r < end:
            k = tl.load(row + r) - b * tokens
            _, best = _largest_of_share(logits + r.to(tl.int64) * VOCAB, 0, SHARE, VOCAB, BLOCKS, LANES, PIECE)
            is_last = r == end - 1
            wanted = tl.load(drafted + b * (tokens - 1) + k, mask=~is_last, other=-1)
            r += 1
            if is_last | (best != wanted):
                kept = k
                chosen = best
                r = end
        tl.store(num_kept + b, kept)
        tl.store(next_token + b, chosen)
    else:
        split = tl.program_id(1)
        r = begin + tl.program_id(2)
        if r < end:
            line = logits + r.to(tl.int64) * VOCAB
            top, best = _largest_of_share(line, split * SHARE, SHARE, VOCAB, BLOCKS, LANES, PIECE)
            own = partial + (r * SPLITS + split) * 2
            tl.store(own, top)
            tl.store(own + 1, best.to(tl.float32))  # exact: below 2^24
        # All programs of a sequence come here, so that one without rows has its verdict too.
        if _arrive(arrived + b, SPLITS * tokens):
            j = tl.arange(0, BLOCK_J)
            is_row = j < end - begin
            at = partial + ((begin + j[:, None]) * SPLITS + tl.arange(0, SPLITS)[None, :]) * 2
            top_JS = tl.load(at, mask=is_row[:, None], other=0.0, cache_modifier=".cg")
            token_JS = tl.load(at + 1, mask=is_row[:, None], other=0.0, cache_modifier=".cg").to(tl.int32)
            top_J = tl.max(top_JS, axis=1)
            token_J = tl.min(tl.where(top_JS == top_J[:, None], token_JS, VOCAB - 1), axis=1)
            k_J = tl.load(row + begin + j, mask=is_row, other=0) - b * tokens
            is_last = j == end - begin - 1
            wanted_J = tl.load(drafted + b * (tokens - 1) + k_J, mask=is_row & ~is_last, other=-1)
            stops = is_last | (is_row & (token_J != wanted_J))
            at_stop = j == tl.min(tl.where(stops, j, BLOCK_J), axis=0)
            tl.store(num_kept + b, tl.sum(tl.where(at_stop, k_J, 0), axis=0))
            tl.store(next_token + b, tl.max(tl.where(at_stop, token_J, -1), axis=0))


@triton.jit
def verify_sampled_kernel(
    target_prob,
    draft_prob,
    row,
    start,
    drafted,
    accept_uniform,
    next_uniform,
    tokens,
    num_kept,
    next_token,
    partial,
    arrived,
    VOCAB: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Grid (B, SPLITS). Single probabilities up to the first rejection, then one row of each distribution, shared by the programs: sums of
    its blocks first, and the one block in which the running sum passes the threshold again."""
    b = tl.program_id(0)
    split = tl.program_id(1)
    begin = tl.load(start + b)
    num_judged = tl.load(start + b + 1) - begin
    j = tl.arange(0, BLOCK_J)
    k = tl.load(row + begin + j, mask=j < num_judged, other=0) - b * tokens
    is_token = j < num_judged - 1
    drafted_row = b.to(tl.int64) * (tokens - 1) + k
    x = tl.load(drafted + drafted_row, mask=is_token, other=0)
    p = tl.load(target_prob + (begin + j).to(tl.int64) * VOCAB + x, mask=is_token, other=0.0)
    q = tl.load(draft_prob + drafted_row * VOCAB + x, mask=is_token, other=0.0)
    u = tl.load(accept_uniform + drafted_row, mask=is_token, other=0.0)
    at = tl.min(tl.where(is_token & (u * q >= p), j, num_judged - 1), axis=0)
    k_at = tl.sum(tl.where((j == at) & (j < num_judged), k, 0), axis=0)
    subtracts = at < num_judged - 1
    p_row = target_prob + (begin + at).to(tl.int64) * VOCAB
    q_row = draft_prob + (b.to(tl.int64) * (tokens - 1) + k_at) * VOCAB

    SHARE: tl.constexpr = BLOCKS // SPLITS
    s = tl.arange(0, BLOCKS)
    # A sequence without rows has no distribution either: nothing of it is read.
    sums = _block_sums(p_row, q_row, subtracts, split * SHARE, SHARE, num_judged > 0, VOCAB, BLOCK_V, BLOCKS)
    is_finishing = True
    if SPLITS > 1:
        own = (s >= split * SHARE) & (s < (split + 1) * SHARE)
        tl.store(partial + b * BLOCKS + s, sums, mask=own)
        is_finishing = _arrive(arrived + b, SPLITS)
        sums = tl.load(partial + b * BLOCKS + s, mask=is_finishing, other=0, cache_modifier=".cg")
    if is_finishing:
        total = tl.sum(sums, axis=0)
        if subtracts & (total == 0):
            subtracts = False
            sums = _block_sums(p_row, q_row, subtracts, 0, BLOCKS, True, VOCAB, BLOCK_V, BLOCKS)
            total = tl.sum(sums, axis=0)
        steps = (tl.load(next_uniform + b) * 2.0**_UNIFORM_BITS).to(tl.int64)
        threshold = (tl.minimum(steps, 2**_UNIFORM_BITS - 1) * total) >> _UNIFORM_BITS
        block = tl.min(tl.where(tl.cumsum(sums, axis=0) > threshold, s, BLOCKS - 1), axis=0)
        threshold -= tl.sum(tl.where(s < block, sums, 0), axis=0)
        column = block * BLOCK_V + tl.arange(0, BLOCK_V)
        units = _units(p_row, q_row, subtracts, column, (column < VOCAB) & (total > 0))
        chosen = tl.min(tl.where(tl.cumsum(units, axis=0) > threshold, column, VOCAB), axis=0)
        tl.store(num_kept + b, k_at)
        tl.store(next_token + b, tl.where(total > 0, chosen, -1))


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
    """Of tiles `first_tile` to `first_tile + SHARE` of a row: the largest logit, its index, and the second largest; with e = exp(x - largest) over
    all logits but that one, the sums of e and of e * (x - largest)."""
    lane = tl.arange(0, LANES)
    block = tl.arange(0, BLOCKS)
    offset = (block[:, None, None] * LANES + lane[None, :, None]) * PIECE + tl.arange(0, PIECE)[None, None, :]
    TILE: tl.constexpr = BLOCKS * LANES * PIECE
    top = tl.full((LANES,), -float("inf"), tl.float32)
    piece = first_tile * BLOCKS * LANES + lane
    second = top
    rest = tl.zeros((LANES,), tl.float32)
    weighted = rest
    own = rest
    own_weighted = rest
    x_next = tl.load(logits + first_tile * TILE + offset, mask=first_tile * TILE + offset < VOCAB, other=-float("inf"))
    for tile in range(first_tile, first_tile + SHARE):
        x = x_next.to(tl.float32)
        # The next tile is asked for before this one is worked on.
        column = (tile + 1) * TILE + offset
        x_next = tl.load(logits + column, mask=(column < VOCAB) & (tile + 1 < first_tile + SHARE), other=-float("inf"))
        top_UL = tl.max(x, axis=2)
        top2 = tl.max(top_UL, axis=0)
        block2 = tl.min(tl.where(top_UL == top2[None, :], block[:, None], BLOCKS - 1), axis=0)
        below = _below(x, top2[None, :, None])
        e = tl.exp2(below * _LOG2E)
        own2 = tl.sum(tl.sum(e, axis=2), axis=0)
        own_weighted2 = tl.sum(tl.sum(e * below, axis=2), axis=0)
        # The lane's largest is in this tile or in one before: all that is not in its tile belongs to the rest.
        is_new = top2 > top
        largest = tl.maximum(top, top2)
        below = _below(tl.minimum(top, top2), largest)
        e = tl.exp2(below * _LOG2E)
        lost = tl.where(is_new, rest + own, own2)
        lost_weighted = tl.where(is_new, weighted + own_weighted, own_weighted2)
        rest = tl.where(is_new, 0.0, rest) + e * lost
        weighted = tl.where(is_new, 0.0, weighted) + e * (lost_weighted + below * lost)
        second = tl.maximum(second, tl.minimum(top, top2))
        own = tl.where(is_new, own2, own)
        own_weighted = tl.where(is_new, own_weighted2, own_weighted)
        piece = tl.where(is_new, (tile * BLOCKS + block2) * LANES + lane, piece)
        top = largest
    top, piece, second, rest, weighted = _joined(top, piece, second, rest, weighted, own, own_weighted)
    # What one lane has read of one tile is read once more: with the largest logit in its sum, what is small beside it would be lost.
    piece_U = (piece // (BLOCKS * LANES) * BLOCKS + block) * LANES + piece % LANES
    column = piece_U[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    x = tl.load(logits + column, mask=column < VOCAB, other=-float("inf")).to(tl.float32)
    index = tl.min(tl.min(tl.where(x == top, column, VOCAB - 1), axis=1), axis=0)
    is_other = column != index
    below = _below(x, top)
    e = tl.where(is_other, tl.exp2(below * _LOG2E), 0.0)
    rest += tl.sum(tl.sum(e, axis=1), axis=0)
    weighted += tl.sum(tl.sum(e * below, axis=1), axis=0)
    second = tl.maximum(second, tl.max(tl.max(tl.where(is_other, x, -float("inf")), axis=1), axis=0))
    return top, index, second, rest, weighted


@triton.jit
def _joined(top, place, second, rest, weighted, own, own_weighted):
    """Parts of a row as one, without what is near its largest logit.

    A part is: its largest logit; the place of that; a bound from below on its second largest; and with e = exp(x - largest), sums of e and of e *
    (x - largest) over what is far from that place, and over what is near it (`own`). Of equals the first in the row counts as the larger.
    """
    largest = tl.max(top, axis=0)
    first = tl.min(tl.where(top == largest, place, 2**31 - 1), axis=0)
    is_first = place == first
    below = _below(top, largest)
    e = tl.exp2(below * _LOG2E)
    rest += tl.where(is_first, 0.0, own)
    weighted += tl.where(is_first, 0.0, own_weighted)
    second = tl.max(tl.where(is_first, second, top), axis=0)
    return largest, first, second, tl.sum(e * rest, axis=0), tl.sum(e * (weighted + below * rest), axis=0)


@triton.jit
def _store_score(found, linear, of_rest, of_entropy, of_margin, token, prob, entropy, margin, reject_prob):
    """Writes the results of a row of which everything has been found."""
    top = found[0]
    # A row without a distribution.
    others = tl.where(tl.abs(top) < float("inf"), found[3], float("nan"))
    total = 1.0 + others
    mean = tl.log(total) - found[4] / total
    gap = tl.where(others == others, -tl.maximum(found[2] - top, _MIN_BELOW), float("nan"))
    rest = tl.log(tl.maximum(others / total, _MIN_REST, propagate_nan=_KEEP_NAN))
    linear += of_rest * rest + of_entropy * mean + of_margin * gap
    tl.store(token, found[1])
    tl.store(prob, 1.0 / total)
    tl.store(entropy, mean)
    tl.store(margin, gap)
    tl.store(reject_prob, 1.0 / (1.0 + tl.exp(-linear)))


@triton.jit
def _largest_of_share(
    logits,
    first_tile,
    SHARE: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The largest logit of tiles `first_tile` to `first_tile + SHARE` of a row, and the first index of it."""
    lane = tl.arange(0, LANES)
    block = tl.arange(0, BLOCKS)
    in_piece = tl.arange(0, PIECE)
    offset = (block[:, None, None] * LANES + lane[None, :, None]) * PIECE + in_piece[None, None, :]
    top = tl.full((LANES,), -float("inf"), tl.float32)
    piece = first_tile * BLOCKS * LANES + lane
    for tile in range(first_tile, first_tile + SHARE):
        column = tile * (BLOCKS * LANES * PIECE) + offset
        x = tl.load(logits + column, mask=column < VOCAB, other=-float("inf"))
        top_UL = tl.max(x, axis=2).to(tl.float32)
        top2 = tl.max(top_UL, axis=0)
        block2 = tl.min(tl.where(top_UL == top2[None, :], block[:, None], BLOCKS - 1), axis=0)
        piece = tl.where(top2 > top, (tile * BLOCKS + block2) * LANES + lane, piece)
        top = tl.maximum(top, top2)
    largest = tl.max(top, axis=0)
    piece = tl.min(tl.where(top == largest, piece, 2**31 - 1), axis=0)
    column = piece * PIECE + in_piece
    x = tl.load(logits + column, mask=column < VOCAB, other=-float("inf")).to(tl.float32)
    return largest, tl.min(tl.where(x == largest, column, VOCAB - 1), axis=0)


@triton.jit
def _below(x, top):
    """x - top, at least _MIN_BELOW; what has nothing above -inf is that far below anything."""
    return tl.maximum(x - tl.where(top == -float("inf"), 0.0, top), _MIN_BELOW, propagate_nan=_KEEP_NAN)


@triton.jit
def _arrive(counter, expected):
    """Whether this program is the last of `expected` to come here; it sets the counter back for the next launch."""
    tl.debug_barrier()  # all threads' stores come before the counter
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == expected - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def _hidden_score(hidden, weight, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr):
    column = tl.arange(0, BLOCK_H)
    h = tl.load(hidden + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < HIDDEN, other=0.0)
    return tl.sum(h * w, axis=0) / tl.sqrt(tl.sum(h * h, axis=0) / HIDDEN + 1e-6)


@triton.jit
def _store_normed(x, weight, normed, column, HIDDEN: tl.constexpr, EPS: tl.constexpr):
    x = x.to(tl.float32)
    w = tl.load(weight + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / HIDDEN + EPS)
    tl.store(normed + column, (x * scale * w).to(normed.dtype.element_ty), mask=column < HIDDEN)


@triton.jit
def _is_judged(zone, length, m, tokens, mask):
    b = m // tokens
    t = m - b * tokens
    last = tl.load(length + b, mask=mask, other=0) - 1
    is_gray = tl.load(zone + m, mask=mask, other=0) != 0
    return (t < last) & is_gray | (t == last)


@triton.jit
def _units(p_row, q_row, subtracts, column, mask):
    """Probabilities, or what one exceeds the other by, in units of 2^-_DRAW_BITS."""
    weight = tl.load(p_row + column, mask=mask, other=0.0)
    weight -= tl.load(q_row + column, mask=mask & subtracts, other=0.0)
    return (tl.where(weight > 0, weight, 0.0) * 2.0**_DRAW_BITS).to(tl.int64)


@triton.jit
def _block_sums(
    p_row,
    q_row,
    subtracts,
    first_block,
    SHARE: tl.constexpr,
    mask,
    VOCAB: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Sums of the units of blocks `first_block` to `first_block + SHARE`, each at its block's place."""
    s = tl.arange(0, BLOCKS)
    sums = tl.zeros((BLOCKS,), tl.int64)
    for i in range(0, SHARE):
        column = (first_block + i) * BLOCK_V + tl.arange(0, BLOCK_V)
        in_block = tl.sum(_units(p_row, q_row, subtracts, column, (column < VOCAB) & mask), axis=0)
        sums = tl.where(s == first_block + i, in_block, sums)
    return sums
