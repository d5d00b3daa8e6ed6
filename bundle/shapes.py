"""The sizes that an engine is built for: its limits, and the optimization profiles that follow from them.

The builder gives them to TensorRT and the runtime chooses a profile for each step, so both read them here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ssv.bundle.tensorrt_api import EngineBuildError, Flavor


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine is built for.

    Attributes:
        max_batch: rows of a step.
        max_length: S, tokens that a row of the cache holds.
        max_pending: most tokens verified with the one before them, which sets the widest verification.
        prefill_chunk: most tokens of a row in any step.
    """

    max_batch: int
    max_length: int
    max_pending: int
    prefill_chunk: int

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_pending"):
            if getattr(self, name) < 1:
                raise EngineBuildError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.max_pending + 1 < self.prefill_chunk <= self.max_length:
            raise EngineBuildError(
                f"prefill_chunk {self.prefill_chunk} must be more than max_pending + 1 = {self.max_pending + 1} and at "
                f"most max_length {self.max_length}",
                "choose other limits",
            )


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step: rows, tokens of each, gathered rows, and positions of the cache that are looked at."""

    batch: int
    tokens: int
    gathered: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes that one optimization profile covers, and those it is tuned for."""

    name: str
    smallest: StepShape
    usual: StepShape
    largest: StepShape


def profiles(limits: Limits, flavor: Flavor) -> tuple[Profile, ...]:
    """Decoding, verification and prefill, the narrowest first: a step takes the first that covers it.

    TensorRT chooses kernels for what is usual in each. TensorRT for RTX makes kernels for the very shapes that it meets
    when it runs (its documentation, "Working with Dynamic Shapes"), and each profile costs it 10 s and 30 MB with 30
    layers: there verification and prefill share one.
    """
    batch, width, chunk, length = limits.max_batch, limits.max_pending + 1, limits.prefill_chunk, limits.max_length
    one = StepShape(1, 1, 1, 1)

    def profile(name: str, usual: tuple[int, int, int], largest: tuple[int, int, int]) -> Profile:
        return Profile(name, one, StepShape(*usual, min(1024, length)), StepShape(*largest, length))

    decode = profile("decode", (batch, 1, batch), (batch, 1, batch))
    if flavor == "tensorrt_rtx":
        return decode, profile("verify and prefill", (batch, width, batch * width), (batch, chunk, batch * width))
    return (
        decode,
        profile("verify", (batch, width, batch * width), (batch, width, batch * width)),
        profile("prefill", (1, chunk, 1), (batch, chunk, batch * width)),
    )
