"""Promises on live traffic: which tiers are withdrawn, what of it is kept, and how one comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssv.bundle.manifest import CalibrationEntry, Manifest, TierEntry
from ssv.bundle.policy import Policy
from ssv.runtime.methods import PREMIUM
from ssv.runtime.request import Audit
from ssv.runtime.serving import live_audit
from ssv.runtime.serving.config import ConfigError
from ssv.runtime.serving.live_audit import ALPHA, LiveAudit, Promise, Standing, promises_of, read_state
from ssv.support.errors import UserError

PROMISES = {"balanced": Promise(0.02, 48, "a"), "turbo": Promise(0.05, 48, "b")}
GOOD, BAD = Audit(0, 0), Audit(12, 6)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What was logged."""
    found: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(live_audit, "log_event", lambda _, event, **fields: found.append((event, fields)))
    return found


def shifted(live: LiveAudit, tier: str = "balanced") -> int:
    """How many prompts of another kind it takes."""
    count = 0
    while live.method_for(tier) == tier:
        live.take(BAD, tier, 48)
        count += 1
        assert count < 30
    return count


def test_a_tier_that_breaks_its_promise_is_withdrawn_and_no_other(events: list[tuple[str, dict[str, Any]]]) -> None:
    live = LiveAudit(PROMISES)
    for _ in range(200):
        live.take(GOOD, "balanced", 48)
        live.take(Audit(1, 1), "turbo", 48)
    assert [live.method_for(tier) for tier in ("balanced", "turbo")] == ["balanced", "turbo"] and not events
    count = shifted(live)
    assert [live.method_for(tier) for tier in ("balanced", "turbo", "suffix")] == ["premium", "turbo", "suffix"]
    ((event, fields),) = events
    assert event == "tier withdrawn" and (fields["tier"], fields["promised"]) == ("balanced", 0.02)
    assert (fields["audited_requests"], fields["mismatches"]) == (200 + count, 12 * count)
    live.take(BAD, "balanced", 48)  # one that was still running
    assert len(events) == 1


def test_what_a_tier_without_a_promise_is_found_to_do_changes_nothing() -> None:
    live = LiveAudit(PROMISES)
    for _ in range(50):
        live.take(BAD, "medusa-typical", 48)
    assert live.method_for("medusa-typical") == "medusa-typical"


def test_it_says_how_tiers_stand() -> None:
    found: list[tuple[str, Standing]] = []
    live = LiveAudit(PROMISES, on_change=lambda *change: found.append(change))
    assert found == [("balanced", Standing(1.0, False)), ("turbo", Standing(1.0, False))]
    live.take(BAD, "turbo", 48)
    assert found[-1][0] == "turbo" and 1 < found[-1][1].evidence < 1 / ALPHA
    shifted(live)
    assert found[-1][0] == "balanced" and found[-1][1].is_withdrawn and found[-1][1].evidence >= 1 / ALPHA
    live.reset("balanced")
    assert found[-1] == ("balanced", Standing(1.0, False))


def test_an_operator_resets_a_tier(tmp_path: Path, events: list[tuple[str, dict[str, Any]]]) -> None:
    live = LiveAudit(PROMISES, tmp_path / "state")
    count = shifted(live)
    live.reset("balanced")
    assert live.method_for("balanced") == "balanced"
    assert LiveAudit(PROMISES, tmp_path / "state").method_for("balanced") == "balanced"
    assert shifted(live) == count, "it has forgotten"
    live.reset("gold")
    assert [event for event, _ in events] == ["tier withdrawn", "tier reset", "tier withdrawn", "tier not reset"]


def test_what_was_found_outlives_the_process(tmp_path: Path, events: list[tuple[str, dict[str, Any]]]) -> None:
    path = tmp_path / "state"
    first = LiveAudit(PROMISES, path)
    shifted(first)
    first.take(BAD, "turbo", 48)
    first.close()
    stood: dict[str, Standing] = {}
    again = LiveAudit(PROMISES, path, on_change=stood.__setitem__)
    assert (again.method_for("balanced"), again.method_for("turbo")) == ("premium", "turbo")
    assert stood["balanced"].is_withdrawn and stood["turbo"].evidence > 1
    assert [event for event, _ in events] == ["tier withdrawn"] * 2
    assert read_state(path).tiers["turbo"].mismatches == 12


def test_a_withdrawal_is_on_the_disk_at_once(tmp_path: Path) -> None:
    live = LiveAudit(PROMISES, tmp_path / "state")
    live.take(GOOD, "turbo", 48)
    assert not (tmp_path / "state").exists(), "the disk need not be waited for"
    shifted(live)
    assert LiveAudit(PROMISES, tmp_path / "state").method_for("balanced") == "premium"


def test_what_is_found_is_written_at_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_audit, "KEEP_SECONDS", 0.0)
    live = LiveAudit(PROMISES, tmp_path / "state")
    live.take(Audit(1, 0), "turbo", 40)
    state = read_state(tmp_path / "state").tiers["turbo"]
    assert (state.requests, state.tokens, state.mismatches, state.withdrawn) == (1, 40, 1, None)


def test_a_tier_that_is_calibrated_anew_begins_anew(tmp_path: Path) -> None:
    shifted(LiveAudit(PROMISES, tmp_path / "state"))
    anew = LiveAudit(PROMISES | {"balanced": Promise(0.02, 48, "other")}, tmp_path / "state")
    assert anew.method_for("balanced") == "balanced"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"tiers": {"turbo": {}}}', '{"tiers": {"turbo": {"promise": "b", "capital": [1]}}}']
)
def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "state").write_text(content)
    with pytest.raises(ConfigError, match=f"{tmp_path}/state is no state of audits"):
        LiveAudit(PROMISES, tmp_path / "state")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_state(tmp_path)


def test_a_file_that_cannot_be_written_stops_nobody(tmp_path: Path, events: list[tuple[str, dict[str, Any]]]) -> None:
    live = LiveAudit(PROMISES, tmp_path / "missing" / "state")
    shifted(live)
    assert live.method_for("balanced") == "premium"
    assert [event for event, _ in events] == ["tier withdrawn", "audits are not kept"]


# --- promises -------------------------------------------------------------------------------------------------------


LOSSY = Policy(accept_below=0.1, verify_above=0.5, risk_budget=0.5, max_pending=8)
CALIBRATION = CalibrationEntry(
    prompts="p", prompts_sha256="0", num_prompts=9, max_tokens=60, confidence=0.95, bound_kind="finite-sample",
    bound_method="m", date="2026-11-01",
)  # fmt: skip


def manifest(limit: float | None = 0.02, **changes: Any) -> Manifest:
    given: dict[str, Any] = {"name": "n", "target": {}, "draft": {}, "eos_token_ids": [0], "default_precision": "int8"}
    tiers = {
        "premium": TierEntry(policy=PREMIUM, lossless=True),
        "balanced": TierEntry(policy=LOSSY, lossless=False, divergence=limit),
    }
    given |= {"tiers": tiers, "files": {}, "sources": {}, "versions": {}, "calibration": CALIBRATION}
    return Manifest(**given | changes)


def test_lossy_tiers_with_a_limit_promise_it() -> None:
    (tier, promise), *others = promises_of(manifest(), "int8").items()
    assert (tier, promise.limit, promise.most, others) == ("balanced", 0.02, 60, [])
    assert promises_of(manifest(limit=None), "int8") == {}
    assert promises_of(manifest(limit=1.0), "int8") == {}, "that promises nothing"
    assert promises_of(manifest(calibration=None), "int8")["balanced"].most == 128


def test_a_promise_is_of_its_thresholds_limit_calibration_and_precision() -> None:
    other = CALIBRATION.model_copy(update={"date": "2026-11-02"})
    policy = LOSSY.model_copy(update={"accept_below": 0.2})
    tiers = manifest().tiers
    changed = {**tiers, "balanced": tiers["balanced"].model_copy(update={"policy": policy})}
    keys = [
        promises_of(each, precision)["balanced"].key
        for each, precision in (
            (manifest(), "int8"),
            (manifest(), "bf16"),
            (manifest(limit=0.03), "int8"),
            (manifest(calibration=other), "int8"),
            (manifest(tiers=changed), "int8"),
        )
    ]
    assert len(set(keys)) == 5
    assert promises_of(manifest(), "int8")["balanced"].key == keys[0]
    assert (
        promises_of(Manifest.model_validate(json.loads(manifest().model_dump_json())), "int8")["balanced"].key
        == keys[0]
    )
