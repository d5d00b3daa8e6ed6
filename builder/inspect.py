"""Shows a bundle, for a person and for a program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from ssv.bundle.manifest import BundleError, CalibrationEntry, Manifest, read_manifest
from ssv.bundle.profile import Costs
from ssv.bundle.survival import Reliability
from ssv.support.files import read_text
from ssv.support.json_text import parse_json
from ssv.support.strict import problems
from ssv.support.waiting import waiting

CALIBRATION = "calibration.json"


def bundle_facts(bundle: Path) -> dict[str, Any]:
    """The manifest, checked against the files, the bundle's size in bytes, and what came true of the draft's guesses by
    rank and depth, if that is known (`Reliability`).

    Raises:
        BundleError: see `read_manifest`, or its calibration is damaged.
    """
    manifest = _read(bundle)
    return {
        **manifest.model_dump(mode="json"),
        "total_bytes": sum(f.size for f in manifest.files.values()),
        "reliability_by_depth": [row.model_dump(mode="json") for row in _reliability(bundle, manifest)],
    }


def print_bundle(bundle: Path) -> None:
    """Prints what is in a bundle to stdout."""
    manifest = _read(bundle)
    console = Console(width=None if sys.stdout.isatty() else 120)  # a log has no width of its own
    target, draft = manifest.target, manifest.draft
    console.print(f"[bold]{manifest.name}[/bold]  ({bundle}, all {len(manifest.files)} files match their hashes)")
    console.print(_network_line("target", target))
    taps = f", sees target layers {draft['feature_layers']}" if draft["feature_layers"] else ""
    kind = f"{draft['kind']} as EAGLE-3" if draft.get("eagle3") else draft["kind"]
    own = [what for what in ("embedding", "lm_head") if draft.get(f"own_{what}")]
    console.print(
        _network_line("draft", draft["decoder"])
        + f", {kind}{taps}, head of {draft['head_size']} tokens"
        + (f", with {' and '.join(own)} of its own" if own else "")
    )
    if not manifest.has_scorer:
        console.print("scorer: none, the draft's own shares say how sure it is")
    if manifest.heads is not None:
        h = manifest.heads
        of = "LM heads of their own" if h["own_lm_heads"] else "the target's LM head rows"
        console.print(f"heads: {h['num_heads']} of {h['num_layers']} ResBlocks, {of}, {h['head_size']} tokens")
    console.print(_tier_table(manifest))
    for name, policy in manifest.methods.items():
        console.print(f"{name}: {policy.model_dump_json(exclude_defaults=True)}", markup=False)
    if manifest.calibration is not None:
        console.print(_calibration_line(manifest.calibration), markup=False)
    for table in _reliability_tables(_reliability(bundle, manifest)):
        console.print(table)
    for place, costs in manifest.profiles.items():
        console.print(_profile_line(place, costs), markup=False)
    if manifest.engines:
        console.print(_engine_table(manifest))
    files = Table("file", "MB", "SHA-256")
    for column in files.columns[1:2]:
        column.justify = "right"
    for name, entry in manifest.files.items():
        files.add_row(name, f"{entry.size / 1e6:.2f}", entry.sha256[:12])
    console.print(files)


def _read(bundle: Path) -> Manifest:
    with waiting(f"checking {bundle}") as say:
        return read_manifest(bundle, say=say)


def _network_line(role: str, spec: dict[str, Any]) -> str:
    return (
        f"{role}: {spec['family']}, {spec['num_layers']} layer{'s' if spec['num_layers'] > 1 else ''}, hidden "
        f"{spec['hidden_size']}, {spec['num_heads']}/{spec['num_kv_heads']} heads, vocabulary {spec['vocab_size']}"
    )


def _calibration_line(c: CalibrationEntry) -> str:
    return (
        f"calibrated on {c.num_prompts} prompts of {c.prompts}, {c.max_tokens} tokens each, "
        f"{f'on {c.date}, ' if c.date else ''}confidence {c.confidence:.0%}, {c.bound_kind} bound: {c.bound_method}"
    )


def _reliability(bundle: Path, manifest: Manifest) -> list[Reliability]:
    if CALIBRATION not in manifest.files:
        return []
    try:
        survival = parse_json(read_text(bundle / CALIBRATION)).get("survival") or {}
        return [Reliability.model_validate(row) for row in survival.get("reliability_by_depth", ())]
    except (ValueError, AttributeError, TypeError) as error:
        wrong = problems(error) if isinstance(error, ValidationError) else error
        raise BundleError(f"{bundle / CALIBRATION} is damaged ({wrong})", "calibrate the bundle anew") from error


def _reliability_tables(rows: Sequence[Reliability]) -> list[Table]:
    """What guesses are given, and how many came true: a table of greedy and one of sampled rows."""
    depths = range(1, 1 + max((row.depth for row in rows), default=0))
    tables = []
    for kind in dict.fromkeys(row.rows for row in rows):
        table = Table(f"guess, {kind}", *(f"depth {depth}" for depth in depths))
        found = {(row.rank, row.depth): row for row in rows if row.rows == kind}
        for rank in sorted({rank for rank, _ in found}):
            cells = [found.get((rank, depth)) for depth in depths]
            shown = (f"{c.corrected:.0%} {c.chosen:.0%} {c.guesses}" if c is not None else "" for c in cells)
            table.add_row(str(rank + 1), *shown)
        tables.append(table)
    if tables:
        tables[0].title = "the draft's guesses: share that they are given, share that came true, how many"
    return tables


def _profile_line(place: str, costs: Costs) -> str:
    doubts = costs.conditions.doubts if costs.conditions is not None else None
    doubtful = f"; may be wrong, as {doubts}: measure it again" if doubts else ""
    return (
        f"profile of {place}: a pass of one token {costs.target.at(1) * 1e3:.2f} ms, of eight "
        f"{costs.target.at(8) * 1e3:.2f}, a draft step {costs.draft.at(1) * 1e3:.2f}{doubtful}"
    )


def _engine_table(manifest: Manifest) -> Table:
    table = Table("engine", "TensorRT", "runs on", "batch", "length", "MB", "built in", "peak memory")
    for column in table.columns[3:]:
        column.justify = "right"
    for engine in manifest.engines.values():
        table.add_row(
            f"{engine.role} {engine.precision}{' with plugins' if engine.plugins else ''}",
            f"{'RTX ' if engine.flavor == 'tensorrt_rtx' else ''}{engine.tensorrt}",
            "SM " + ", ".join(engine.compute_capabilities),
            str(engine.max_batch),
            str(engine.max_length),
            f"{manifest.files[engine.file].size / 1e6:.1f}",
            f"{engine.build_seconds:.1f} s",
            f"{engine.peak_memory_bytes / 1e6:.0f} MB",
        )
    return table


def _tier_table(manifest: Manifest) -> Table:
    table = Table("tier", "accept below", "verify above", "risk budget", "max pending", "lossless", "divergence")
    for name, tier in manifest.tiers.items():
        p = tier.policy
        limit = (
            "-"
            if tier.divergence is None
            else f"<= {tier.divergence:.1%} ({tier.bound_kind or 'asymptotic'} bound {tier.divergence_bound:.2%})"
        )
        numbers = (f"{p.accept_below:g}", f"{p.verify_above:g}", f"{p.risk_budget:g}", str(p.max_pending))
        table.add_row(name, *numbers, "yes" if tier.lossless else "no", limit)
    return table
