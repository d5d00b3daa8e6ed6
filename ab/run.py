"""ssv-ab run, and what goes with the folder that it writes: `report` makes its report again, `compare` puts two of them
side by side.

A run's folder holds run.json, what was fixed before; samples.jsonl, one line a request, written as answers come;
report.json and report.html. Whatever ends a run, its samples are there, and a report of them can be made.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssv.ab import page, terminal
from ssv.ab.analysis import CONFIDENCE, RunSettings, analyse
from ssv.ab.answers import Sampling
from ssv.ab.arms import Arm
from ssv.ab.endpoints import Endpoint
from ssv.ab.journal import Journal
from ssv.ab.load import ArmDown, LoadGenerator
from ssv.ab.measures import MIN_BLOCKS, by_arm, differences, examples, identical_share, quality
from ssv.ab.plan import block_size, make_plan
from ssv.ab.questions import RIGHT_OR_WRONG, Question
from ssv.ab.samples import Sample, read_samples
from ssv.ab.statistics import prompts_needed_pairs, prompts_needed_scores, simultaneous_level
from ssv.support.environment import commit, machine, versions
from ssv.support.errors import UserError
from ssv.support.files import write_json, write_whole
from ssv.support.progress import Report

EXIT_PARTIAL = 3

RUN, SAMPLES, REPORT, PAGE = "run.json", "samples.jsonl", "report.json", "report.html"

SHOWN_EXAMPLES, SHOWN_LENGTH = 3, 160
"""Answers that `compare` shows of an arm, and characters of each."""

POWER = 0.8
EXPECTED_SCORE_SD = 0.25
"""Of a prompt's difference in score between two arms, before anything is known."""


def power_in_words(settings: RunSettings, questions: Sequence[Question], discordant: float) -> str | None:
    """Whether the prompts are enough to find quality non-inferior, said before the run; None if it is not judged.

    Args:
        discordant: share of the prompts that the arms are expected to answer differently.
    """
    if settings.margin is None:
        return None
    alpha = (1 - simultaneous_level(CONFIDENCE, len(settings.arms) - 1)) / 2
    if all(question.check in RIGHT_OR_WRONG for question in questions if question.answers):
        needed = prompts_needed_pairs(settings.margin, discordant=discordant, alpha=alpha, power=POWER)
        basis = f"if the arms differ on {discordant:.0%} of them"
    else:
        needed = prompts_needed_scores(settings.margin, sd=EXPECTED_SCORE_SD, alpha=alpha, power=POWER)
        basis = f"if differences in score have a standard deviation of {EXPECTED_SCORE_SD}"
    text = (
        f"a margin of {100 * settings.margin:g} points needs {needed} prompts with answers for a power of {POWER:.0%}, "
        f"{basis}; there are {settings.num_answers}"
    )
    return text + (": quality will probably stay undecided" if settings.num_answers < needed else "")


def blocks_in_words(settings: RunSettings) -> str | None:
    """At which concurrencies there are too few blocks for intervals; None if at none."""
    sizes = {concurrency: block_size(concurrency, settings.blocks_of) for concurrency in settings.concurrency}
    thin = {concurrency: size for concurrency, size in sizes.items() if settings.num_prompts // size < MIN_BLOCKS}
    if not thin:
        return None
    needed = ", ".join(f"{MIN_BLOCKS * size} for concurrency {concurrency}" for concurrency, size in thin.items())
    return f"too few prompts for intervals, which need {needed}; there are {settings.num_prompts}"


def run(
    settings: RunSettings,
    questions: Sequence[Question],
    folder: Path,
    *,
    connect: Callable[[Arm], Endpoint],
    report: Report,
) -> int:
    """Runs a comparison and writes its folder; exit status.

    Raises:
        UserError: the settings cannot be run, or the folder is not empty.
        UserError: an arm does not answer at all, or the run ended before anything was measured.
    """
    plan = make_plan(
        len(questions),
        [arm.name for arm in settings.arms],
        settings.concurrency,
        blocks_of=settings.blocks_of,
        seed=settings.seed,
    )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already", "choose another --out")
    sampling = Sampling(settings.max_tokens, settings.temperature, settings.timeout)
    load = LoadGenerator(settings.arms, questions, sampling, seed=settings.seed, connect=connect)
    load.warm_up(1)  # before anything is written: the arms are there
    disclosures = load.disclosures()
    folder.mkdir(parents=True, exist_ok=True)
    header = {"settings": settings.to_dict(), "disclosures": disclosures, "planned": sum(len(t.prompts) for t in plan)}
    header |= {"command": shlex.join(["ssv-ab", *sys.argv[1:]]), **_where()}
    write_json(folder / RUN, header)
    status = "complete"
    with Journal(folder / SAMPLES) as journal:
        try:
            load.run(plan, journal, report)
        except ArmDown as error:
            status = str(error)
        except KeyboardInterrupt:
            status = "the run was interrupted"
        except OSError as error:
            status = f"samples could not be written: {error}"
    load.close()
    if status != "complete":
        write_json(folder / RUN, header | {"ended": status})  # a report made again says it, too
    if not (folder / SAMPLES).stat().st_size:
        raise UserError(f"nothing was measured: {status}")
    return make_report(folder)


def make_report(folder: Path) -> int:
    """Reads a run's samples, writes its report and shows it; exit status.

    Raises:
        UserError: not a run's folder, or nothing was measured.
    """
    header, samples, torn = read_run(folder)
    settings = RunSettings.from_dict(header["settings"])
    # A run that was killed could not say how it ended: its samples can.
    status = "complete" if len(samples) >= header["planned"] else "the run ended before its time"
    status = header.get("ended", status)
    if status != "complete":
        status = f"{status}; {len(samples)} of {header['planned']} requests were made"
    if torn:
        status = f"{'' if status == 'complete' else status + '; '}{torn} damaged lines of {SAMPLES} were left out"
    document = analyse(settings, samples, header["disclosures"], status=status)
    document |= {name: header[name] for name in ("command", "date", "commit", "machine", "versions")}
    write_json(folder / REPORT, document)
    write_whole(folder / PAGE, page.render(document, samples))
    terminal.show(document)
    print(f"{folder / REPORT}\n{folder / PAGE}")
    return 0 if status == "complete" else EXIT_PARTIAL


def compare(before: Path, after: Path) -> int:
    """Shows what has changed between two runs of the same prompts, for each arm of both; exit status.

    Raises:
        UserError: runs that cannot be compared, naming what differs.
    """
    runs = [read_run(folder) for folder in (before, after)]
    old, new = (RunSettings.from_dict(header["settings"]) for header, *_ in runs)
    same = ("prompts_sha256", "num_prompts", "concurrency", "blocks_of", "max_tokens", "temperature", "seed")
    if different := [name for name in same if getattr(old, name) != getattr(new, name)]:
        raise UserError(f"the runs differ in {', '.join(different)}", "choose runs of the same prompts and settings")
    names = [arm.name for arm in old.arms if arm.name in {other.name for other in new.arms}]
    if not names:
        raise UserError("the runs have no arm of the same name", "choose others")
    sides = [by_arm(samples) for _, samples, _ in runs]
    level = simultaneous_level(CONFIDENCE, len(names) * len(old.concurrency))
    for name in names:
        each = {}
        for concurrency in old.concurrency:
            a, b = (side.get(name, {}).get(concurrency, []) for side in sides)
            found = differences(a, b, None, None, level=level, seed=old.seed)
            each[str(concurrency)] = [asdict(difference) for difference in found]
        all_a, all_b = ([sample for samples in side.get(name, {}).values() for sample in samples] for side in sides)
        share = identical_share(all_a, all_b) if old.temperature == 0 else None
        terminal.show_differences(f"{name}: {after} against {before}", each, level, share)
        margin = new.margin or old.margin
        found_quality = quality(all_a, all_b, margin=margin or 0.0, level=simultaneous_level(CONFIDENCE, len(names)))
        terminal.show_quality(
            name, asdict(found_quality) if found_quality is not None else None, has_margin=margin is not None
        )
        terminal.show_examples(name, examples(all_a, all_b, most=SHOWN_EXAMPLES, length=SHOWN_LENGTH))
    print(
        "The runs were made at different times: what their machines did besides is in these differences. "
        "Cost is time of the machine."
    )
    return 0


def read_run(folder: Path) -> tuple[dict[str, Any], list[Sample], int]:
    """A run's settings, samples, and the number of damaged lines.

    Raises:
        UserError: not a run's folder, or nothing was measured.
    """
    try:
        header = json.loads((folder / RUN).read_text())
        RunSettings.from_dict(header["settings"])
        samples, torn = read_samples(folder / SAMPLES)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder} is not the folder of a run ({error})", "choose one that `ssv-ab run` has written"
        ) from error
    if not samples:
        raise UserError(f"{folder / SAMPLES} holds no samples", "run it again")
    return header, samples, torn


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _where() -> Mapping[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions("ssv", "tritonclient", "openai", "numpy", "scipy"),
    }
