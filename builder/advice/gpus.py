"""GPUs as their makers describe them: what a step on shapes alone is reckoned by."""

from __future__ import annotations

from dataclasses import dataclass

from ssv.support.errors import UserError


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published figures of a GPU.

    Attributes:
        gb_per_s: memory bandwidth, 1e9 bytes per second.
        bf16_tflops, fp8_tflops: of dense products, with sums in fp32; None where it has no such units.
        gb: memory, 1e9 bytes.
    """

    gb_per_s: float
    bf16_tflops: float
    fp8_tflops: float | None
    gb: float


# NVIDIA's data sheets. Where one gives products of sparse matrices, half of that is dense.
GPUS = {
    # NVIDIA A100 Tensor Core GPU data sheet (2021): 312 TFLOPS, 1,555 GB/s and 2,039 GB/s.
    "A100-40GB": Gpu(1555, 312, None, 40),
    "A100-80GB": Gpu(2039, 312, None, 80),
    # NVIDIA H100 Tensor Core GPU data sheet: SXM 1,979 TFLOPS BF16 and 3,958 FP8 with sparsity; PCIe 1,513 and 3,026.
    "H100-SXM": Gpu(3350, 989.5, 1979, 80),
    "H100-PCIe": Gpu(2000, 756.5, 1513, 80),
    # NVIDIA H200 Tensor Core GPU data sheet: the H100's units, 4.8 TB/s, 141 GB.
    "H200": Gpu(4800, 989.5, 1979, 141),
    # NVIDIA L4 Tensor Core GPU data sheet: 242 TFLOPS BF16 and 485 FP8 with sparsity.
    "L4": Gpu(300, 121, 242.5, 24),
    # NVIDIA L40S data sheet: 362.05 TFLOPS BF16 and 733 FP8, dense.
    "L40S": Gpu(864, 362.05, 733, 48),
    # NVIDIA A10 Tensor Core GPU data sheet: 125 TFLOPS BF16, dense.
    "A10": Gpu(600, 125, None, 24),
    # NVIDIA Ada GPU architecture white paper, appendix A: 165.2 TFLOPS BF16 and 330.3 FP8, dense, sums in fp32.
    "RTX-4090": Gpu(1008, 165.2, 330.3, 24),
    # NVIDIA RTX Blackwell GPU architecture white paper, appendix A: 209.5 TFLOPS BF16 and 419 FP8, dense, sums in fp32.
    "RTX-5090": Gpu(1792, 209.5, 419, 32),
}


def gpu_named(name: str) -> Gpu:
    """Figures of a GPU, by a name of `GPUS` in upper or lower case.

    Raises:
        UserError: it is not known.
    """
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        raise UserError(f"--gpu {name!r} is unknown", f"choose one of: {', '.join(GPUS)}")
    return found
