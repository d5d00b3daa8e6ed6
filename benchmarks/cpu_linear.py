"""Linear layers with quantized weights on a CPU, ours and torch's: microseconds and bytes of weights a second.

As many layers as SmolLM2-135M has, one after the other, so that weights come from memory. The least of many repeats,
since whatever else the machine does only adds to it.

    python benchmarks/cpu_linear.py --out benchmarks/records/cpu_linear.json
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ssv.runtime.engines.cpu_layers import share_work
from ssv.runtime.engines.linear import Int4Linear, Int8Linear, PackedLinear, processors, use_kernels
from ssv.support.environment import versions, write_record

INPUTS, OUTPUTS = 576, 3072
"""Gate and up of SmolLM2-135M."""

Layer = Callable[[Tensor], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="1,2,4,8,16,32", help="(default: 1,2,4,8,16,32)")
    parser.add_argument("--threads", default="1,2", help="(default: 1,2)")
    parser.add_argument("--layers", type=int, default=60, help="(default: 60)")
    parser.add_argument("--repeats", type=int, default=15, help="(default: 15)")
    parser.add_argument("--out", type=Path, help="record to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    weight_OI = torch.randn(OUTPUTS, INPUTS) / INPUTS**0.5
    found = []
    with torch.inference_mode():
        for threads in map(int, args.threads.split(",")):
            torch.set_num_threads(threads)
            share_work(threads)
            for name, make in _kinds().items():
                layers = [make(weight_OI) for _ in range(args.layers)]
                for rows in map(int, args.rows.split(",")):
                    seconds = _least(layers, torch.randn(rows, INPUTS), args.repeats)
                    row = {"layer": name, "threads": threads, "rows": rows, "us": round(seconds * 1e6, 1)}
                    if rows == 1:
                        row["gb_per_s"] = round(_weight_bytes(name) / seconds / 1e9, 1)
                    print(row, file=sys.stderr, flush=True)
                    found.append(row)
                del layers
    figures = {"inputs": INPUTS, "outputs": OUTPUTS, "layers": args.layers, "least_of": args.repeats, "rows": found}
    write_record(figures, args.out, versions("torch"))
    return 0


def _kinds() -> dict[str, Callable[[Tensor], Layer]]:
    kinds: dict[str, Callable[[Tensor], Layer]] = {}
    for processor in processors():
        if processor != "any":
            kinds[f"int8 {processor}"] = lambda w, p=processor: _ours(Int8Linear, w, p)
            kinds[f"int4 {processor}"] = lambda w, p=processor: _ours(Int4Linear, w, p)
    best = processors()[0]
    kinds["int4 in small pages"] = lambda w: _in_small_pages(Int4Linear, w, best)
    return kinds | {
        "torch fbgemm int8": _fbgemm,
        "torch _weight_int8pack_mm": _int8pack,
        "torch _weight_int4pack_mm_for_cpu": _int4pack,
    }


def _weight_bytes(name: str) -> float:
    return OUTPUTS * INPUTS * (5 / 8 if "int4" in name else 1)


def _ours(kind: type[PackedLinear], weight_OI: Tensor, processor: str) -> PackedLinear:
    use_kernels(processor)
    return kind(weight_OI, None)  # type: ignore[call-arg]


def _in_small_pages(kind: type[PackedLinear], weight_OI: Tensor, processor: str) -> Layer:
    """Where the system gives huge pages to those who ask for them, as most do."""
    layer = _ours(kind, weight_OI, processor)
    layer.packed_TGX = layer.packed_TGX.clone()
    layer.struct.weights = layer.packed_TGX.data_ptr()
    return layer


def _fbgemm(weight_OI: Tensor) -> Layer:
    """What this project used before: activations of 7 bits, scaled by the caller, whose work is not counted."""
    scale_O = weight_OI.abs().amax(dim=1).double() / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_channel(weight_OI, scale_O, torch.zeros(OUTPUTS).long(), 0, torch.qint8)
    torch.backends.quantized.engine = "fbgemm"
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    return lambda x: torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1.0, 64, packed)


def _int8pack(weight_OI: Tensor) -> Layer:
    """Weights alone have 8 bits; bf16 activations."""
    scale_O = weight_OI.abs().amax(dim=1) / 127
    whole_OI, scale_O = (weight_OI / scale_O[:, None]).round().to(torch.int8), scale_O.bfloat16()
    return lambda x: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), whole_OI, scale_O)


def _int4pack(weight_OI: Tensor) -> Layer:
    """Weights alone have 4 bits, in groups of 32; bf16 activations."""
    whole_OI = torch.randint(0, 16, (OUTPUTS, INPUTS), dtype=torch.int32)  # what they are makes no difference
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole_OI, 1)
    scales_GO2 = torch.rand(INPUTS // 32, OUTPUTS, 2).bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, 32, scales_GO2)


def _least(layers: list[Layer], x_MI: Tensor, repeats: int) -> float:
    """Seconds of one layer: the least of all of them and all repeats."""
    seconds = []
    for _ in range(repeats):
        for layer in layers:
            start = time.perf_counter()
            layer(x_MI)
            seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
