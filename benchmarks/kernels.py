"""What the kernels cost on a GPU: time, bytes moved, share of the measured copy bandwidth, and the same in eager
PyTorch operations.

Every time is the median over replays of a CUDA graph that runs the op on one set of buffers after the other, together
several times as large as the L2 cache, divided by their number: gaps between launches are in it, Python's are not.

    python benchmarks/kernels.py --out benchmarks/records/kernels.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ssv.plugins import launch, reference
from ssv.support.environment import versions, write_record

L2_SHARE = 4
"""The buffers that are rotated through are together so many times as large as the L2 cache."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--replays", type=int, default=100)
    parser.add_argument("--out", type=Path, help="record to write")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this measures kernels on a GPU, and there is none", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    bench = Bench(args.replays)
    figures: dict[str, Any] = {"copy_gb_per_s": round(bench.copy_bandwidth / 1e9), "ops": []}
    for rows in (1, 8, 64, 512):
        figures["ops"].append(score_figures(bench, rows, args.vocab, args.hidden))
    for batch, tokens in ((1, 9), (8, 9), (256, 8)):
        figures["ops"].append(gather_figures(bench, batch, tokens, args.hidden))
    for rows in (1, 9, 72, 576):
        for kept in (1.0, 0.0005):
            figures["ops"].append(choose_figures(bench, rows, args.vocab, kept))
    for op in figures["ops"]:
        print(op, file=sys.stderr)
    write_record(figures, args.out, versions("torch", "triton"), "cuda")
    return 0


def score_figures(bench: Bench, rows: int, vocab: int, hidden: int) -> dict[str, Any]:
    """`score` of bf16 rows; "eager" is the definition in PyTorch operations."""
    weight, bias = torch.randn(hidden + 3, device="cuda") / 64, torch.randn(1, device="cuda")

    def buffers() -> tuple[Tensor, ...]:
        return _bf16(rows, hidden), _bf16(rows, vocab)

    us = bench.time(lambda h, x: launch.score(h, x, weight, bias), buffers)
    num_bytes = rows * (vocab + hidden) * 2
    return {
        "op": "score",
        "shape": f"{rows} x {vocab}",
        **bench.figures(us, num_bytes),
        "read_kernel_us": (read := bench.time(lambda h, x: read_once(x), buffers)),
        "times_read_kernel": round(us / read, 2),
        "eager_us": (eager := bench.time(lambda h, x: reference.score(h, x, weight, bias), buffers)),
        "speedup_over_eager": round(eager / us, 1),
    }


def gather_figures(bench: Bench, batch: int, tokens: int, hidden: int) -> dict[str, Any]:
    """`sparse_gather` of bf16 states of which each sequence's bonus row alone is judged.

    Bytes are those of the judged rows: read once, written as they are and normed.
    """
    weight = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    rows = torch.arange(tokens - 1, batch * tokens, tokens, dtype=torch.int32, device="cuda")

    def buffers() -> tuple[Tensor, ...]:
        return (_bf16(batch * tokens, hidden),)

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        gathered = x[rows]
        return gathered, F.rms_norm(gathered, (hidden,), weight, 1e-5)

    us = bench.time(lambda x: launch.sparse_gather(x, rows, weight, 1e-5), buffers)
    return {
        "op": "sparse_gather",
        "shape": f"{batch} of {batch * tokens} x {hidden}",
        **bench.figures(us, 3 * batch * hidden * 2),
        "eager_us": (eager_us := bench.time(eager, buffers)),
        "speedup_over_eager": round(eager_us / us, 1),
    }


def choose_figures(bench: Bench, rows: int, vocab: int, kept: float) -> dict[str, Any]:
    """`choose` among all tokens, and among a share of them, the others being -inf as top-k or top-p leaves them."""
    seed, position = torch.arange(rows, device="cuda"), torch.arange(rows, device="cuda")

    def buffers() -> tuple[Tensor, ...]:
        x = torch.randn(rows, vocab, device="cuda")
        return (x.masked_fill_(torch.rand_like(x) >= kept, -torch.inf),)

    us = bench.time(lambda x: launch.choose(x, seed, position), buffers)
    return {
        "op": "choose",
        "shape": f"{rows} x {vocab}, {kept:.2%} kept",
        **bench.figures(us, rows * vocab * 4),
        "eager_us": (eager := bench.time(lambda x: reference.choose(x, seed, position), buffers)),
        "speedup_over_eager": round(eager / us, 1),
    }


class Bench:
    """Times ops on the current GPU.

    Attributes:
        copy_bandwidth: bytes read and written per second by a copy of 1 GiB.
    """

    def __init__(self, replays: int) -> None:
        self._replays = replays
        self._l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
        source, dest = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda").unbind()
        times = [_elapsed_us(lambda: dest.copy_(source)) for _ in range(20)]
        self.copy_bandwidth = 2 * source.numel() / (statistics.median(times) * 1e-6)

    def time(self, op: Callable[..., object], buffers: Callable[[], Sequence[Tensor]]) -> float:
        """Microseconds that an op takes on its buffers."""
        first = buffers()
        size = sum(x.numel() * x.element_size() for x in first)
        num = min(max(-(-L2_SHARE * self._l2_bytes // size), 4), 256)
        sets = [first, *(buffers() for _ in range(num - 1))]
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for each in sets[:3]:
                op(*each)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for each in sets:
                op(*each)
        with torch.cuda.stream(stream):
            graph.replay()
            times = [_elapsed_us(graph.replay) for _ in range(self._replays)]
        return round(statistics.median(times) / num, 2)

    def figures(self, us: float, num_bytes: int) -> dict[str, Any]:
        at_bandwidth = num_bytes / self.copy_bandwidth * 1e6
        return {
            "us": us,
            "mb": round(num_bytes / 1e6, 2),
            "us_at_copy_bandwidth": round(at_bandwidth, 2),
            "share_of_copy_bandwidth": round(at_bandwidth / us, 3),
        }


@triton.jit
def _read_kernel(x, out, num, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < num, other=0.0)
    tl.store(out + tl.program_id(0), tl.max(values.to(tl.float32), axis=0))


def read_once(x: Tensor) -> Tensor:
    """The least that reads a tensor: the largest value of each block."""
    block = 16384
    out = torch.empty(triton.cdiv(x.numel(), block), device=x.device)
    _read_kernel[(len(out),)](x, out, x.numel(), BLOCK=block, num_warps=16)
    return out


def _bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _elapsed_us(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


if __name__ == "__main__":
    sys.exit(main())
