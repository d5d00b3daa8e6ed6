"""Whether the tiers keep what they promise on the requests that come, and what is done where one does not.

The service judges a share of the lossy requests in full. Here each counts as a unit of evidence against its tier's
promise (`ssv.support.evidence`). Once that is strong, the tier is withdrawn: its requests are decoded by `FALLBACK`,
until the tier is calibrated anew or an operator resets it. The chance that a tier which keeps its promise is ever
withdrawn is at most `ALPHA`.

What was found outlives the process, in a file, so that neither a crash nor a restart brings a tier back. It is of one
promise: of other thresholds, another limit, calibration or precision nothing is known yet.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError

from ssv.bundle.manifest import Manifest
from ssv.runtime.request import Audit
from ssv.runtime.serving.config import ConfigError
from ssv.runtime.serving.log import log_event
from ssv.support.evidence import BETS, Evidence
from ssv.support.files import read_text, write_json
from ssv.support.strict import Strict, problems

log = logging.getLogger("ssv.server")

ALPHA = 0.01

FALLBACK = "premium"

KEEP_SECONDS = 10.0
"""Between two times that the file is written where no tier is withdrawn or reset: to wait for the disk takes as long as
some tokens. What a process that is killed has not written is lost, whatever it was, which biases nothing."""

UNCALIBRATED_MOST = 128
"""Tokens that a request weighs, at most, where no calibration says how long outputs it is of."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What a tier promises.

    Attributes:
        limit: share of emitted tokens that the target would not have chosen, at most.
        most: tokens of the outputs that it is of, at most; a longer one weighs as much.
        key: differs where anything of it does.
    """

    limit: float
    most: int
    key: str


def promises_of(manifest: Manifest, precision: str) -> dict[str, Promise]:
    """The promises of a bundle's lossy tiers.

    Args:
        precision: that they are decoded in: in another one texts differ.
    """
    calibration = manifest.calibration
    most = calibration.max_tokens if calibration is not None else UNCALIBRATED_MOST
    made_by = calibration.model_dump(mode="json") if calibration is not None else None
    found = {}
    for name, tier in manifest.tiers.items():
        if not tier.lossless and tier.divergence is not None and 0 < tier.divergence < 1:
            document = json.dumps([tier.model_dump(mode="json"), made_by, precision], sort_keys=True)
            found[name] = Promise(tier.divergence, most, hashlib.sha256(document.encode()).hexdigest())
    return found


class TierState(Strict):
    """What is known of a tier.

    Attributes:
        promise: key of the one that it is of.
        requests, tokens, mismatches: that were judged, and what the target would not have chosen.
        capital: see `Evidence.capital_RF`.
        withdrawn: when it was, UTC; None of a tier that is in use.
    """

    promise: str
    requests: Annotated[int, Field(ge=0)] = 0
    tokens: Annotated[int, Field(ge=0)] = 0
    mismatches: Annotated[int, Field(ge=0)] = 0
    capital: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=len(BETS), max_length=len(BETS))] = (
        0.0,
    ) * len(BETS)
    withdrawn: str | None = None


class AuditState(Strict):
    """The file: what is known of each tier that was judged."""

    tiers: dict[str, TierState]


def read_state(path: Path | None) -> AuditState:
    """What a file has; of one that is not there nothing is known.

    Raises:
        ConfigError: it is none of ours.
        UserError: it cannot be read.
    """
    if path is None or not path.exists():
        return AuditState(tiers={})
    try:
        return AuditState.model_validate_json(read_text(path))
    except ValidationError as error:
        raise ConfigError(
            f"{path} is no state of audits ({problems(error, 'all')})",
            "give another file, or remove it, which forgets what was found",
        ) from error


@dataclass(frozen=True, slots=True)
class Standing:
    """How a tier stands.

    Attributes:
        evidence: against its promise; see `Evidence.value_R`.
    """

    evidence: float
    is_withdrawn: bool


class LiveAudit:
    """Promises, and what has been found of them. Threads may share it."""

    def __init__(
        self,
        promises: Mapping[str, Promise],
        path: Path | None = None,
        *,
        on_change: Callable[[str, Standing], None] = lambda tier, standing: None,
    ) -> None:
        """Goes on from what the file has of these promises.

        Args:
            promises: by tier.
            path: of the file; None keeps what is found in this process.
            on_change: called with each tier now, and after each request that was judged, and each reset.

        Raises:
            ConfigError, UserError: see `read_state`.
        """
        self._promises, self._path, self._on_change = dict(promises), path, on_change
        self._lock, self._kept_at = threading.Lock(), time.monotonic()
        known = read_state(path).tiers
        self._tiers = {
            tier: state if (state := known.get(tier)) is not None and state.promise == promise.key else _new(promise)
            for tier, promise in promises.items()
        }
        for tier, state in self._tiers.items():
            on_change(tier, self._standing(tier))
            if state.withdrawn is not None:
                self._say_withdrawn(tier)

    def method_for(self, asked: str) -> str:
        """The method that a request for a method is decoded by."""
        state = self._tiers.get(asked)
        return asked if state is None or state.withdrawn is None else FALLBACK

    def take(self, audit: Audit, tier: str, tokens: int) -> None:
        """Takes what was found of a request. They have to come in the order in which they were chosen to be judged: in
        the order in which they end, short outputs would come first.

        Args:
            tier: or another method, of which nothing is promised.
            tokens: of its output.
        """
        if tier not in self._tiers:
            return
        with self._lock:
            state = self._tiers[tier]
            evidence = self._evidence(tier)
            evidence.add(audit.strict, tokens)
            self._tiers[tier] = state.model_copy(
                update={
                    "requests": state.requests + 1,
                    "tokens": state.tokens + tokens,
                    "mismatches": state.mismatches + audit.strict,
                    "capital": tuple(evidence.capital_RF.tolist()),
                }
            )
            is_broken = state.withdrawn is None and bool(evidence.value_R >= 1 / ALPHA)
            if is_broken:
                now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                self._tiers[tier] = self._tiers[tier].model_copy(update={"withdrawn": now})
                self._say_withdrawn(tier)
            if is_broken or time.monotonic() - self._kept_at >= KEEP_SECONDS:
                self._keep()
            self._on_change(tier, self._standing(tier))

    def reset(self, tier: str) -> None:
        """Puts a tier into use again, and forgets what was found of it. A tier without a promise is left alone."""
        if tier not in self._tiers:
            log_event(log, "tier not reset", level=logging.WARNING, tier=tier, known=sorted(self._tiers))
            return
        with self._lock:
            was = self._tiers[tier]
            self._tiers[tier] = _new(self._promises[tier])
            log_event(log, "tier reset", tier=tier, withdrawn=was.withdrawn, audited_requests=was.requests)
            self._keep()
            self._on_change(tier, self._standing(tier))

    def close(self) -> None:
        """Writes what the file has not yet."""
        with self._lock:
            self._keep()

    def _evidence(self, tier: str) -> Evidence:
        promise, state = self._promises[tier], self._tiers[tier]
        evidence = Evidence(promise.limit, promise.most)
        evidence.units, evidence.capital_RF = state.requests, np.array(state.capital)
        return evidence

    def _standing(self, tier: str) -> Standing:
        return Standing(float(self._evidence(tier).value_R), self._tiers[tier].withdrawn is not None)

    def _say_withdrawn(self, tier: str) -> None:
        promise, state = self._promises[tier], self._tiers[tier]
        log_event(
            log,
            "tier withdrawn",
            level=logging.WARNING,
            tier=tier,
            since=state.withdrawn,
            decoded_by=FALLBACK,
            promised=promise.limit,
            audited_requests=state.requests,
            audited_tokens=state.tokens,
            mismatches=state.mismatches,
            cure="calibrate on prompts like those that come, or reset the tier",
        )

    def _keep(self) -> None:
        self._kept_at = time.monotonic()
        if self._path is None:
            return
        try:
            write_json(self._path, AuditState(tiers=self._tiers).model_dump(mode="json"))
        except OSError as error:  # what was found holds in this process all the same
            log_event(log, "audits are not kept", level=logging.ERROR, path=self._path, error=error)


def _new(promise: Promise) -> TierState:
    return TierState(promise=promise.key)
