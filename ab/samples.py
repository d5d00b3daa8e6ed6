"""What one request of a comparison came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ssv.ab.answers import Answer
from ssv.ab.journal import JournalReader


@dataclass(frozen=True, slots=True)
class Sample:
    """A request, as the run's file has it.

    Attributes:
        arm, concurrency, block, repeat, prompt, seed: as planned; `prompt` is its id.
        start_s, end_s: since the run began.
        error: why there is no answer; "" if there is one.
        ttft_s: seconds to the first token, of reasoning or of the answer; None without one. `ttfo_s`: to the first of
            the answer.
        gaps: seconds between responses, and the tokens that each brought, after the first.
        score: of the text: 1 right, 0 wrong, also for a request that failed; None where answers cannot be checked.
        The others are those of `Answer`.
    """

    arm: str
    concurrency: int
    block: int
    repeat: int
    prompt: str
    seed: int
    start_s: float
    end_s: float
    error: str = ""
    ttft_s: float | None = None
    ttfo_s: float | None = None
    gaps: tuple[tuple[float, int], ...] = ()
    text: str = ""
    reasoning: str = ""
    score: float | None = None
    output_tokens: int = 0
    reasoning_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = ""
    target_passes: int | None = None
    judged: int | None = None
    accepted: int | None = None
    unverified: int | None = None
    tier: str | None = None
    lossless: bool | None = None

    @property
    def e2e_s(self) -> float:
        """Seconds from the request to the end of its answer."""
        return self.end_s - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first response's; None for an answer that came at once."""
        tokens = sum(num for _, num in self.gaps)
        return sum(seconds for seconds, _ in self.gaps) / tokens if tokens else None

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name, as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Sample:
        """Raises TypeError or ValueError: not a sample."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"unknown field {unknown[0]!r}")
        gaps = tuple((float(seconds), int(tokens)) for seconds, tokens in given.get("gaps", ()))
        return cls(**{**given, "gaps": gaps})


def answered(planned: Mapping[str, Any], answer: Answer, start_s: float, end_s: float, score: float | None) -> Sample:
    """The sample of an answer. Args: planned: the first fields of `Sample`."""
    times = [0.0, *(moment for moment, _ in answer.arrivals)]
    gaps = [
        (now - before, tokens)
        for before, now, (_, tokens) in zip(times[1:-1], times[2:], answer.arrivals[1:], strict=True)
    ]
    taken = {f.name: getattr(answer, f.name) for f in fields(answer) if f.name != "arrivals"}
    return Sample(
        **planned,
        **taken,
        start_s=start_s,
        end_s=end_s,
        ttft_s=answer.arrivals[0][0] if answer.arrivals else None,
        gaps=tuple(gaps),
        score=score,
    )


def read_samples(path: Path) -> tuple[list[Sample], int]:
    """Samples of a run's file, and the number of its lines that are none: what a crash has cut.

    Raises:
        OSError: there is no such file.
    """
    reader = JournalReader(path)
    samples, wrong = [], 0
    for record in (*reader.read(), *reader.rest()):
        try:
            samples.append(Sample.from_dict(record))
        except (TypeError, ValueError):
            wrong += 1
    return samples, reader.torn + wrong
