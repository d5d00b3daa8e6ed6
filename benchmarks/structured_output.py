"""Do outputs of a JSON schema always have its form, whatever decodes them, and what does the mask cost?

200 schemas (`benchmarks/schemas/conformance.jsonl`: the keywords of JSON Schema that llguidance knows, one group each,
and what applications ask for) go to a real server over /v1/chat/completions, by every way that the bundle can be
decoded, whole and as a stream. An output parses and is valid (jsonschema), or ends with `length`. Where the response
says that it is lossless, it is the output of plain decoding under the same masks; a stream's text is that of the whole
answer, lossy tiers' too, as the server is on a CPU. Whole answers are asked how their tokens came about, so the record
says of each way how much was drafted and trusted, and in how many places several tokens were drafted: in a chain none.
Every other schema is sampled.

    python benchmarks/structured_output.py --bundle bundles/smollm2-135m --out benchmarks/records/structured_output.json

`--timing` measures instead what the mask costs, in this process: by the processor's time, of which other programs take
none, with one thread, the least of several turns.

    python benchmarks/structured_output.py --bundle bundles/smollm2-135m --timing --threads 1 \\
        --out benchmarks/records/structured_output_speed.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
from jsonschema.validators import validator_for
from server_under_test import ServerUnderTest

from ssv.bundle.manifest import read_manifest
from ssv.runtime.methods import baselines
from ssv.runtime.request import Output
from ssv.support.environment import versions, write_record
from ssv.support.prompts import read_prompts

ROOT = Path(__file__).parents[1]
PLAIN = "autoregressive"
MAX_FAILURES = 40
"""That a record shows."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--schemas", type=Path, default=ROOT / "benchmarks/schemas/conformance.jsonl")
    parser.add_argument("--num-schemas", type=int, help="the first so many (default: all)")
    parser.add_argument("--tiers", help="names, with commas (default: all that the bundle can be decoded by)")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--timing", action="store_true", help="what the mask costs, instead (default: off)")
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks/prompts/heldout.jsonl", help="of --timing")
    parser.add_argument("--num-prompts", type=int, default=24, help="of --timing")
    parser.add_argument("--precision", default="int8", help="of --timing")
    parser.add_argument("--threads", type=int, help="of the server, or of --timing (default: torch's)")
    parser.add_argument("--repeats", type=int, default=3, help="of --timing")
    args = parser.parse_args()
    return _timing(args) if args.timing else _conformance(args)


# Conformance


@dataclass(frozen=True, slots=True)
class Case:
    """A schema, and how an output of it is asked for."""

    name: str
    schema: dict[str, Any]
    number: int

    def body(self, model: str, max_tokens: int, is_streamed: bool) -> dict[str, Any]:
        asked = f"Answer with an example, as JSON of this schema: {json.dumps(self.schema, ensure_ascii=False)}"
        return {
            "model": model,
            "messages": [{"role": "user", "content": asked}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "example", "schema": self.schema}},
            "max_tokens": max_tokens,
            "temperature": 0.8 * (self.number % 2),
            "seed": self.number,
            "stream": is_streamed,
            "ssv_fates": not is_streamed,
        }


@dataclass(frozen=True, slots=True)
class Said:
    """An answer; where it is none, `reason` says what came instead. Of a whole one also what was drafted for it."""

    text: str
    reason: str
    is_lossless: bool = False
    drafting: Mapping[str, int] = field(default_factory=dict)


def _conformance(args: argparse.Namespace) -> int:
    lines = args.schemas.read_text(encoding="utf-8").splitlines()[: args.num_schemas]
    cases = [Case(entry["name"], entry["schema"], number) for number, entry in enumerate(map(json.loads, lines))]
    manifest = read_manifest(args.bundle, verify=False)
    known = (*baselines(manifest.heads is not None), *manifest.tiers)
    tiers = args.tiers.split(",") if args.tiers else list(known)
    start = time.monotonic()
    threads = () if args.threads is None else ("--threads", str(args.threads))
    found, drafting = {}, {}
    with ServerUnderTest(args.bundle, "--audit-share", "0", *threads, has_openai=True) as server:
        asking = _Asking(server, manifest.name, args)
        plain = asking.all(cases, PLAIN, False)
        for tier in tiers:
            whole, streamed = asking.all(cases, tier, False), asking.all(cases, tier, True)
            found[tier] = {
                "whole": _judged(cases, whole, plain),
                "streamed": _judged(cases, streamed, plain, whole),
            }
            drafting[tier] = {name: sum(said.drafting.get(name, 0) for said in whole) for name in _drafting([], None)}
        died = len(server.events("server died"))
    results: dict[str, dict[str, Any]] = {
        tier: {how: dict(counts) for how, (counts, _) in each.items()} | {"drafting": drafting[tier]}
        for tier, each in found.items()
    }
    failures = [
        {"tier": tier, "how": how, **failure}
        for tier, each in found.items()
        for how, (_, failed) in each.items()
        for failure in failed
    ]
    figures = {
        "what": "requests by what came: an output that parses and is valid, one that ended with max_tokens, a failure; "
        "of whole answers the tokens, the passes after the prompt's, what was drafted and trusted, and the places of "
        "the output for which several tokens were drafted",
        "threads": args.threads,
        "schemas": len(cases),
        "max_tokens": args.max_tokens,
        "results": results,
        "requests": len(cases) * 2 * len(tiers),
        "failures": len(failures),
        "first_failures": failures[:MAX_FAILURES],
        "server_died": died,
        "seconds": round(time.monotonic() - start, 1),
    }
    write_record(figures, args.out, versions("torch", "llguidance", "jsonschema", "nvidia-pytriton"))
    return int(bool(failures or died))


class _Asking:
    """Asks a server, several requests at a time."""

    def __init__(self, server: ServerUnderTest, name: str, args: argparse.Namespace) -> None:
        self._address = urlsplit(server.openai_url).netloc
        self._name, self._max_tokens, self._clients = name, args.max_tokens, args.clients

    def all(self, cases: Sequence[Case], tier: str, is_streamed: bool) -> list[Said]:
        with ThreadPoolExecutor(self._clients) as pool:
            said = list(pool.map(lambda case: self._one(case, tier, is_streamed), cases))
        print(f"{tier}, {'streamed' if is_streamed else 'whole'}: {len(said)} answers", file=sys.stderr, flush=True)
        return said

    def _one(self, case: Case, tier: str, is_streamed: bool) -> Said:
        connection = http.client.HTTPConnection(self._address, timeout=600)
        try:
            body = json.dumps(case.body(f"{self._name}:{tier}", self._max_tokens, is_streamed))
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status != 200:
            return Said(text, f"HTTP {response.status}")
        if not is_streamed:
            answer = json.loads(text)
            (choice,) = answer["choices"]
            content, reason = choice["message"]["content"], choice["finish_reason"]
            return Said(content, reason, answer["ssv"]["lossless"], _drafting(choice["ssv_fates"], answer["metrics"]))
        *chunks, end = _events(text)
        if end != "[DONE]":
            return Said(text, "a stream without an end")
        read = [json.loads(chunk) for chunk in chunks]
        content = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in read)
        return Said(content, read[-1]["choices"][0]["finish_reason"], read[-1]["ssv"]["lossless"])


def _drafting(fates: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any] | None) -> dict[str, int]:
    """What was drafted for an answer: its tokens, the passes of the target, and the places with several drafted
    tokens, of which one at the most is kept and the others begin the branches that were dropped there.
    """
    speculation = metrics["speculative_decoding"] if metrics else {"num_spec_steps": 0, "num_draft_tokens": 0}
    kept = [entry["fate"] not in ("corrected", "target") for entry in fates]
    firsts = [len({branch[0] for branch in entry["dropped"]}) for entry in fates]
    return {
        "tokens": len(fates),
        "passes_of_drafts": speculation["num_spec_steps"],
        "drafted": speculation["num_draft_tokens"],
        "kept": sum(kept),
        "trusted": sum(entry["fate"] == "trusted" for entry in fates),
        "places_with_several_drafted": sum(a + b > 1 for a, b in zip(kept, firsts, strict=True)),
    }


def _events(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def _judged(
    cases: Sequence[Case], said: Sequence[Said], plain: Sequence[Said], whole: Sequence[Said] | None = None
) -> tuple[Counter[str], list[dict[str, Any]]]:
    """How many answers are what, and the failures among them.

    Args:
        plain: what plain decoding answers.
        whole: what came of the same requests whole, where these were streamed.
    """
    counts: Counter[str] = Counter()
    failures = []
    for at, (case, answer, expected) in enumerate(zip(cases, said, plain, strict=True)):
        problem = _problem(case.schema, answer)
        if problem is None and answer.is_lossless:
            counts["compared with plain decoding"] += 1
            if (answer.text, answer.reason) != (expected.text, expected.reason):
                problem = f"plain decoding says {expected.text!r} ({expected.reason})"
        if problem is None and whole is not None:
            counts["compared with the whole answer"] += 1
            if (answer.text, answer.reason) != (whole[at].text, whole[at].reason):
                problem = f"the whole answer is {whole[at].text!r} ({whole[at].reason})"
        counts["failed" if problem else "valid" if answer.reason == "stop" else "length"] += 1
        if problem:
            failures.append({"schema": case.name, "text": answer.text[:400], "problem": problem[:400]})
    return counts, failures


def _problem(schema: Mapping[str, Any], answer: Said) -> str | None:
    """What is wrong with an answer; None for nothing."""
    if answer.reason == "length":
        return None
    if answer.reason != "stop":
        return f"ended with {answer.reason}"
    try:
        value = json.loads(answer.text, parse_constant=_refuse, parse_float=Decimal)
    except ValueError as error:
        return f"no JSON: {error}"
    # Decimal numbers as they are written: as floats, 1.11 is no multiple of 0.01.
    schema = json.loads(json.dumps(schema), parse_float=Decimal)
    validator = validator_for(schema, default=jsonschema.Draft202012Validator)
    error = next(validator(schema, format_checker=validator.FORMAT_CHECKER).iter_errors(value), None)
    return None if error is None else f"not valid: {error.message}"


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


# Timing

FORMS: dict[str, tuple[str, Any]] = {
    "any text": ("regex", r"(?s:.*)"),
    "any JSON": ("json_schema", {}),
    "a typical schema": (
        "json_schema",
        {
            "type": "object",
            "properties": {
                "title": {"type": "string", "maxLength": 60},
                "summary": {"type": "string", "maxLength": 300},
                "topics": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 2, "maxItems": 5},
                "level": {"enum": ["beginner", "advanced", "expert"]},
                "confidence": {"type": "number", "minimum": 0, "maximum": 1},
            },
            "required": ["title", "summary", "topics", "level", "confidence"],
            "additionalProperties": False,
        },
    ),
}
"""`any text` masks nothing: the text is the one without it, and what is slower is the mask's."""


@dataclass(frozen=True, slots=True)
class Timed:
    """An output, and the processor's time that all of it took, or that all but its first token took."""

    output: Output
    seconds: float


def _timing(args: argparse.Namespace) -> int:
    import torch

    from ssv.runtime.grammar import grammar_of
    from ssv.runtime.llm import LLM
    from ssv.runtime.request import Request, SamplingParams

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    llm = LLM.load(args.bundle, precision=args.precision)
    grammars = {
        form: grammar_of(kind, guide if isinstance(guide, str) else json.dumps(guide))
        for form, (kind, guide) in FORMS.items()
    }
    prompts = [llm.chat_ids(prompt) for prompt in read_prompts(args.prompts)[: args.num_prompts]]
    methods = [PLAIN, "premium"]
    pairs: dict[tuple[str, str], list[tuple[Timed, Timed]]] = {
        (form, method): [] for form in FORMS for method in methods
    }

    def say(prompt: Sequence[int], method: str, max_tokens: int, grammar: str | None) -> Timed:
        request = Request(tuple(prompt), method, SamplingParams(max_tokens=max_tokens, grammar=grammar))
        start = time.process_time()
        (output,) = llm.generate([request])
        return Timed(output, time.process_time() - start)

    for number in range(-1, len(prompts)):
        prompt = prompts[max(number, 0)]
        for form, method in pairs:
            # Both have as many tokens: a longer text has more to attend to.
            length = len(say(prompt, PLAIN, args.max_tokens, grammars[form]).output.token_ids)
            arms = [grammars[form], None]
            first = {arm: min(say(prompt, method, 1, arm).seconds for _ in range(args.repeats)) for arm in arms}
            turns = [
                {arm: say(prompt, method, length, arm) for arm in arms[:: 1 - 2 * (i % 2)]} for i in range(args.repeats)
            ]
            masked, free = (
                Timed(turns[0][arm].output, min(turn[arm].seconds for turn in turns) - first[arm]) for arm in arms
            )
            if number >= 0:  # the first is a warm-up
                pairs[form, method].append((masked, free))
        print(f"{number + 1} of {len(prompts)} prompts", file=sys.stderr, flush=True)
    figures = {
        "what": "tokens per second of the processor's time after the first token, with a form over those without one, "
        "of outputs of the same length, the least of several turns, with 95 % intervals over prompts",
        "results": {form: {method: _speeds(pairs[form, method]) for method in methods} for form in FORMS},
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        "prompts": len(prompts),
        "repeats": args.repeats,
        "max_tokens": args.max_tokens,
    }
    write_record(figures, args.out, versions("torch", "llguidance", "transformers"))
    return 0


def _speeds(pairs: Sequence[tuple[Timed, Timed]]) -> dict[str, Any]:
    # A text without a form may have ended sooner, and one token has no time after the first.
    kept = [pair for pair in pairs if min(len(timed.output.token_ids) for timed in pair) > 1]
    rng = random.Random(0)
    draws = sorted(_ratio(rng.choices(kept, k=len(kept))) for _ in range(2000))
    return {
        "tokens_per_s": _speed([masked for masked, _ in kept]),
        "tokens_per_s_without": _speed([free for _, free in kept]),
        "ratio": _ratio(kept),
        "ratio_95": [draws[int(0.025 * len(draws))], draws[int(0.975 * len(draws))]],
        "tokens_per_pass": _tokens_per_pass([masked for masked, _ in kept]),
        "tokens_per_pass_without": _tokens_per_pass([free for _, free in kept]),
        "prompts": len(kept),
        "same_texts": sum(masked.output.text == free.output.text for masked, free in kept),
    }


def _ratio(pairs: Sequence[tuple[Timed, Timed]]) -> float:
    return _speed([masked for masked, _ in pairs]) / _speed([free for _, free in pairs])


def _speed(timed: Sequence[Timed]) -> float:
    return sum(each.output.counters.emitted - 1 for each in timed) / sum(each.seconds for each in timed)


def _tokens_per_pass(timed: Sequence[Timed]) -> float:
    first, *rest = (each.output.counters for each in timed)
    return float(sum(rest, first).tokens_per_pass)


if __name__ == "__main__":
    sys.exit(main())
