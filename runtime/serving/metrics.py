"""The server's metrics: names, meanings, how a request's counters become them, and how they are shown.

Imports no torch.

Names of judged tokens are those that dashboards for speculative decoding already have (vLLM's); trusted tokens are not
among them.

Each process of a server counts on a board of its own (`ssv.runtime.serving.board`), all of the same keys; what is shown
is the sum. So nothing that was counted is lost with a process, and none is asked by another.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ssv.runtime.counters import Counters, GpuUse
from ssv.runtime.methods import METHODS
from ssv.runtime.serving.board import Board
from ssv.support.errors import UserError

if TYPE_CHECKING:
    from ssv.runtime.decode.generator import Load
    from ssv.runtime.request import Audit
    from ssv.runtime.serving.live_audit import Standing

COUNTERS = {
    "spec_decode_num_drafts": "Target passes that judged drafted tokens",
    "spec_decode_num_draft_tokens": "Drafted tokens that the target judged",
    "spec_decode_num_accepted_tokens": "Drafted tokens that the target judged and kept",
    "ssv_target_passes": "Target passes after the prompt's",
    "ssv_target_tokens": "Tokens that went through target passes after the prompt's",
    "ssv_tokens_verified": "Drafted tokens that the target judged",
    "ssv_tokens_trusted": "Emitted tokens that the target never judged",
    "ssv_tokens_typical": "Judged tokens that the target kept although it would have chosen others",
    "ssv_tokens_rolled_back": "Drafted tokens that were dropped",
    "ssv_tokens_emitted": "Output tokens",
    "ssv_prompt_tokens": "Prompt tokens",
    "ssv_prompt_tokens_cached": "Prompt tokens whose keys and values were there from a request before",
    "ssv_first_token_seconds": "Seconds from arrival to the first token, summed over answered requests",
    "ssv_request_seconds": "Seconds from arrival to the last token, summed over answered requests",
    "ssv_audited_requests": "Requests of lossy tiers that the target judged in full",
    "ssv_audited_tokens": "Emitted tokens of lossy tiers that the target judged in full",
    "ssv_audit_mismatches": "Audited tokens that the target would not have chosen",
}
"""Counters, one for each tier (label `tier`)."""

REASONS = ("stop", "length", "deadline", "cancelled", "error")
ANSWERED = ("stop", "length", "deadline")
REQUESTS = (
    "ssv_requests",
    "Requests that ended after they had been taken (labels: tier; reason stop, length, deadline, cancelled or error)",
)

REFUSALS = ("full", "draining", "starting")
REFUSED = ("ssv_requests_refused", "Requests that were not taken, with 503 (label reason: full, draining or starting)")

INVALID = ("ssv_requests_invalid", "Requests that could not be served as they were, with 400")

RUNNING = ("ssv_requests_running", "Requests that were taken and have not ended (label tier)")

STANDINGS = {
    "ssv_audit_evidence": "Evidence that a tier breaks its promise: 1 where nothing is known, 100 withdraws it",
    "ssv_tier_withdrawn": "1 of a tier that was withdrawn, so that premium decodes its requests, else 0",
}
"""Gauges, one for each tier; 0 of tiers that promise nothing."""

RESTARTS = ("ssv_restarts", "Processes that died and were started again (label process: tritonserver or openai)")
RESTARTED = ("tritonserver", "openai")

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "ssv_time_to_first_token_seconds": ("Seconds from arrival to the first token, of answered requests", _SECONDS),
    "ssv_time_per_output_token_seconds": (
        "Seconds a token after the first, of answered requests of two tokens or more",
        (0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0),
    ),
    "ssv_e2e_request_latency_seconds": ("Seconds from arrival to the last token, of answered requests", _SECONDS),
    "ssv_request_queue_time_seconds": ("Seconds from arrival to the prompt's turn, of answered requests", _SECONDS),
}
"""Histograms, one for each tier, with the upper bounds of their buckets."""

GAUGES = {
    "ssv_requests_decoding": "Requests in a row",
    "ssv_requests_joining": "Requests whose prompt is being run",
    "ssv_requests_waiting": "Requests that wait for a row",
    "ssv_prompt_cache_bytes": "Memory that beginnings of prompts take",
    "ssv_prompt_cache_blocks": "Blocks of prompts held",
    "ssv_engine_alive": "1 while the engines work, 0 once one has failed",
    "ssv_draining": "1 once no more requests are taken, as the server is to end",
}

GPU_GAUGES = {
    "ssv_gpu_memory_reserved_bytes": "Memory of the GPU that the engines' allocator holds",
    "ssv_gpu_memory_reserved_peak_bytes": "Memory of the GPU that the engines' allocator has held at the most",
    "ssv_gpu_memory_used_bytes": "Memory of the GPU that is not free, whoever has it",
    "ssv_gpu_graphs": "CUDA graphs that the engines have captured",
}
"""Gauges that are shown where the engines are on a GPU."""

DRAINING = "the server is shutting down: try another one"

Key = tuple[str, tuple[tuple[str, str], ...]]
"""A series: its name, and its labels by name."""


def _key(name: str, **labels: str) -> Key:
    return name, tuple(sorted(labels.items()))


def _buckets(name: str) -> list[str]:
    return [*(f"{bound:g}" for bound in HISTOGRAMS[name][1]), "+Inf"]


def _series() -> Iterator[Key]:
    for name in COUNTERS:
        yield from (_key(name, tier=tier) for tier in METHODS)
    yield from (_key(REQUESTS[0], tier=tier, reason=reason) for tier in METHODS for reason in REASONS)
    yield from (_key(REFUSED[0], reason=reason) for reason in REFUSALS)
    yield _key(INVALID[0])
    yield from (_key(RESTARTS[0], process=process) for process in RESTARTED)
    for name in (RUNNING[0], *STANDINGS):
        yield from (_key(name, tier=tier) for tier in METHODS)
    yield from (_key(name) for name in (*GAUGES, *GPU_GAUGES))
    for name in HISTOGRAMS:
        for tier in METHODS:
            yield from (_key(f"{name}_bucket", le=bound, tier=tier) for bound in _buckets(name))
            yield from (_key(f"{name}_{end}", tier=tier) for end in ("sum", "count"))


SERIES = tuple(_series())

HELP: dict[str, tuple[str, str]] = {
    **{name: (text, "counter") for name, text in (*COUNTERS.items(), REQUESTS, REFUSED, INVALID, RESTARTS)},
    **{name: (text, "gauge") for name, text in (RUNNING, *STANDINGS.items(), *GAUGES.items(), *GPU_GAUGES.items())},
    **{name: (text, "histogram") for name, (text, _) in HISTOGRAMS.items()},
}
"""Meaning and type of each family."""


BOARDS_VARIABLE = "SSV_BOARDS"


def boards_folder() -> Path | None:
    """Where the processes of this one's server count, as its environment says; None for nowhere."""
    return Path(folder) if (folder := os.environ.get(BOARDS_VARIABLE)) else None


class Metrics:
    """What one process of a server counts."""

    def __init__(self, folder: Path | None = None, process: str = "") -> None:
        """Opens the board of a process.

        Args:
            folder: of the boards of a server; None counts for this process alone.
            process: the board's name.
        """
        self._board = Board(SERIES, folder / process if folder is not None else None)

    def taken(self, tier: str) -> None:
        """A request has been taken; `finished`, `ended` or `withdrawn` has to follow."""
        self._board.add(_key(RUNNING[0], tier=tier))

    def ended(self, tier: str, reason: str) -> None:
        """Counts a request that ran and has ended."""
        self._board.add(_key(RUNNING[0], tier=tier), -1)
        self._board.add(_key(REQUESTS[0], tier=tier, reason=reason))

    def withdrawn(self, tier: str) -> None:
        """What was called a taken request is none."""
        self._board.add(_key(RUNNING[0], tier=tier), -1)

    def finished(self, tier: str, reason: str, counters: Counters) -> None:
        """A request ended with what it has."""
        is_answered = reason in ANSWERED and counters.emitted > 0
        for name, value in counts_of(counters, is_answered).items():
            self._board.add(_key(name, tier=tier), value)
        if is_answered:
            for name, seconds in times_of(counters).items():
                self._observe(name, tier, seconds)
        self.ended(tier, reason)

    def refused(self, reason: str) -> None:
        """Counts a request that was refused, such as by a full queue."""
        self._board.add(_key(REFUSED[0], reason=reason))

    def invalid(self) -> None:
        """Counts a request that asks for what cannot be."""
        self._board.add(_key(INVALID[0]))

    def restarted(self, process: str) -> None:
        """Counts that a process was started again."""
        self._board.add(_key(RESTARTS[0], process=process))

    def audited(self, audit: Audit, tier: str, tokens: int) -> None:
        """Counts an audited answer of so many tokens."""
        self._board.add(_key("ssv_audited_requests", tier=tier))
        self._board.add(_key("ssv_audited_tokens", tier=tier), tokens)
        self._board.add(_key("ssv_audit_mismatches", tier=tier), audit.strict)

    def stands(self, tier: str, standing: Standing) -> None:
        """Shows how a tier stands in the live audit."""
        self._board.set(_key("ssv_audit_evidence", tier=tier), standing.evidence)
        self._board.set(_key("ssv_tier_withdrawn", tier=tier), float(standing.is_withdrawn))

    def load(self, load: Load, alive: bool = True) -> None:
        """Shows what the engines have to do, and whether they live."""
        for name, value in gauges_of(load, alive).items():
            self._board.set(_key(name), value)

    def gpu(self, use: GpuUse) -> None:
        """Shows what the engines have on their GPU."""
        for name, value in zip(GPU_GAUGES, (use.reserved, use.peak, use.in_use, use.graphs), strict=True):
            self._board.set(_key(name), value)

    def drain(self) -> None:
        """Shows that no further requests are taken."""
        self._board.set(_key("ssv_draining"), 1)

    def died(self) -> None:
        """The process of this board is gone: what it had taken ended with an error, and nothing is left to do."""
        for tier in METHODS:
            running = self._board.get(_key(RUNNING[0], tier=tier))
            self._board.set(_key(RUNNING[0], tier=tier), 0)
            self._board.add(_key(REQUESTS[0], tier=tier, reason="error"), running)
        for name in (*GAUGES, *GPU_GAUGES):
            self._board.set(_key(name), 0)

    def _observe(self, name: str, tier: str, value: float) -> None:
        for bound in _buckets(name):
            if value <= float(bound):
                self._board.add(_key(f"{name}_bucket", le=bound, tier=tier))
        self._board.add(_key(f"{name}_sum", tier=tier), value)
        self._board.add(_key(f"{name}_count", tier=tier))


class Refusal(UserError):
    """A request that is not taken now; the message says why.

    Attributes:
        reason: one of `REFUSALS`.
    """

    def __init__(self, what: str, reason: str, cure: str = "") -> None:
        super().__init__(what, cure)
        self.reason = reason


class Admission:
    """Whether a request would be taken: told from what the other processes count, so that refusing costs next to
    nothing.
    """

    def __init__(self, folder: Path | None, max_rows: int, max_waiting: int) -> None:
        """Reads the boards of a server.

        Args:
            folder: of the boards; None lets every request through.
            max_rows, max_waiting: see `ServerConfig`.
        """
        self._reader = Reader(folder) if folder is not None else None
        self._max_rows, self._max_waiting = max_rows, max_waiting

    def check(self) -> None:
        """Refuses what there is no room for, but for one more at times: the service itself counts to the request.

        Raises:
            Refusal: saying why.
        """
        if self._reader is None:
            return
        if self._reader.get("ssv_draining"):
            raise Refusal(DRAINING, "draining")
        waiting = int(self._reader.get("ssv_requests_waiting"))
        if waiting >= self._max_waiting and self._reader.get("ssv_requests_decoding") >= self._max_rows:
            raise Refusal(f"{waiting} requests are waiting already", "full", "try again later")


class Reader:
    """The sum of what the processes of a server have counted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._boards: dict[str, Board] = {}
        self._lock = threading.Lock()

    def get(self, name: str, **labels: str) -> float:
        """A number, summed over the processes that count it."""
        return self._sum(_key(name, **labels), self._found())

    def text(self) -> str:
        """All metrics in Prometheus' text format."""
        boards, lines = self._found(), []
        has_gpu = self._sum(_key("ssv_gpu_memory_used_bytes"), boards) > 0
        for family, keys in groupby(SERIES, key=_family):
            if family in GPU_GAUGES and not has_gpu:
                continue
            text, kind = HELP[family]
            lines += [f"# HELP {family} {text}", f"# TYPE {family} {kind}"]
            for key in keys:
                labels = ",".join(f'{name}="{value}"' for name, value in key[1])
                lines.append(f"{key[0]}{f'{{{labels}}}' if labels else ''} {self._sum(key, boards):.17g}")
        return "\n".join(lines) + "\n"

    def _found(self) -> list[Board]:
        with self._lock:
            for path in self._folder.iterdir():
                if path.name not in self._boards and path.stat().st_size:
                    self._boards[path.name] = Board(SERIES, path)
            return list(self._boards.values())

    @staticmethod
    def _sum(key: Key, boards: Iterable[Board]) -> float:
        return sum(board.get(key) for board in boards)


def _family(key: Key) -> str:
    """A histogram's series have its name and an ending."""
    name = key[0]
    return name if name in HELP else name.rpartition("_")[0]


def counts_of(counters: Counters, is_answered: bool) -> Mapping[str, float]:
    """What a request that ended adds to the counters."""
    return {
        "spec_decode_num_drafts": counters.target_passes if counters.judged else 0,
        "spec_decode_num_draft_tokens": counters.judged,
        "spec_decode_num_accepted_tokens": counters.accepted,
        "ssv_target_passes": counters.target_passes,
        "ssv_target_tokens": counters.target_tokens,
        "ssv_tokens_verified": counters.judged,
        "ssv_tokens_trusted": counters.trusted,
        "ssv_tokens_typical": counters.typical,
        "ssv_tokens_rolled_back": counters.rolled_back,
        "ssv_tokens_emitted": counters.emitted,
        "ssv_prompt_tokens": counters.prompt_tokens,
        "ssv_prompt_tokens_cached": counters.cached_tokens,
        "ssv_first_token_seconds": counters.first_token_s if is_answered else 0.0,
        "ssv_request_seconds": counters.total_s if is_answered else 0.0,
    }


def times_of(counters: Counters) -> Mapping[str, float]:
    """What an answered request adds to the histograms."""
    found = {
        "ssv_time_to_first_token_seconds": counters.first_token_s,
        "ssv_e2e_request_latency_seconds": counters.total_s,
        "ssv_request_queue_time_seconds": counters.queue_s,
    }
    if counters.emitted > 1:
        rest = (counters.total_s - counters.first_token_s) / (counters.emitted - 1)
        found["ssv_time_per_output_token_seconds"] = rest
    return found


def gauges_of(load: Load, alive: bool) -> Mapping[str, float]:
    """Gauges of what there is to do, by name."""
    return {
        "ssv_requests_decoding": load.decoding,
        "ssv_requests_joining": load.joining,
        "ssv_requests_waiting": load.waiting,
        "ssv_prompt_cache_bytes": load.prompts.num_bytes,
        "ssv_prompt_cache_blocks": load.prompts.blocks,
        "ssv_engine_alive": float(alive),
    }
