"""Bodies that nobody means well, to every door of the OpenAI API: each field with values that are right, just out of
bounds, of another type or hostile, bodies with parts exchanged, left out or wrapped, and what is no JSON. Each has
to be answered whole, or refused by a 4xx with a message (503 with Retry-After where the queue is full), and the server
has to stay.

    python benchmarks/openai_fuzz.py --bundle bundles/smollm2-135m --out benchmarks/records/openai_fuzz.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openai_bodies import request_of
from server_under_test import ServerUnderTest, reference

from ssv.bundle.manifest import read_manifest
from ssv.support.environment import versions, write_record

ANSWER_SECONDS = 1200
"""Without an answer it hangs; long, as whatever else the machine does may stop the server meanwhile."""

MAX_EXAMPLES = 250
"""That a record shows."""

# A message should name what the caller sent, not what the server or a library makes of it.
OTHERS_WORDS = re.compile(
    r"in ensemble|\[request id|INVALID_ARGUMENT|\b(text_input|input_ids|ssv_messages|ssv_tools)\b|ssv_template"
    r"|guided_decoding_g|ssv_top_logprobs|ebnf_grammar|validation error|pydantic|(literal|list|dict|union)\["
)


@dataclass
class Found:
    """What came of the requests so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    doors: Counter[str] = field(default_factory=Counter)
    refusals: dict[str, str] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--only", type=int, help="shows the body of this one request, and asks nothing")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    name = read_manifest(args.bundle, verify=False).name
    if args.only is not None:
        path, data, headers = request_of(name, args.seed, args.only)
        print(path, headers, data[:4000])
        return 0
    options = ("--prompt-cache-mb", "64", "--threads", "1", "--max-tokens", "24", "--audit-share", "0")
    with ServerUnderTest(args.bundle, *options, has_openai=True) as server:
        expected = reference(server, 24)
        run(server, name, min(500, args.requests), args.clients, seed=args.seed - 1)  # pools and caches have their size
        server.wait_idle()
        before, start = server.memory_mb(), time.monotonic()
        found = run(server, name, args.requests, args.clients, seed=args.seed)
        server.wait_openai()
        server.wait_idle()
        figures = {
            "requests": args.requests,
            "seconds": round(time.monotonic() - start, 1),
            "outcomes": dict(found.outcomes.most_common()),
            "doors": dict(found.doors.most_common()),
            "examples_of_refusals": dict(sorted(found.refusals.items())[:MAX_EXAMPLES]),
            "faults": len(found.faults),
            "first_faults": found.faults[:40],
            "server_died": len(server.events("server died")),
            "openai_api_died": len(server.events("the OpenAI API died")),
            "memory_mb_before": before,
            "memory_mb_after": server.memory_mb(),
            "normal_afterwards": reference(server, 24) == expected,
        }
    write_record(
        figures, args.out, versions("torch", "fastapi", "pydantic", "uvicorn", "llguidance", "nvidia-pytriton")
    )
    return int(bool(found.faults or figures["server_died"] or not figures["normal_afterwards"]))


def run(server: ServerUnderTest, name: str, num: int, clients: int, seed: int) -> Found:
    """What comes of so many requests."""
    found, lock = Found(), threading.Lock()

    def work(first: int) -> None:
        for number in range(first, num, clients):
            path, data, headers = request_of(name, seed, number)
            outcome, message, is_fault = _ask(server.openai_url, path, data, headers)
            with lock:
                found.outcomes[outcome] += 1
                found.doors[path] += 1
                if is_fault:
                    told = {"request": number, "path": path, "outcome": outcome, "message": message[:600]}
                    found.faults.append({**told, "body": data[:600].decode(errors="replace")})
                    print(told, file=sys.stderr, flush=True)
                elif message:
                    found.refusals.setdefault(_kind(message), message[:160])
                if sum(found.outcomes.values()) % 1000 == 0:
                    print(dict(found.outcomes), file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _kind(message: str) -> str:
    """What is alike in refusals of the same thing."""
    return " ".join(re.sub(r"\d+", "N", message).split()[:3])[:40]


# Answers


def _ask(url: str, path: str, data: bytes, headers: Mapping[str, str]) -> tuple[str, str, bool]:
    """Outcome of a request, the message of a refusal or what is wrong, and whether that is a fault."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=ANSWER_SECONDS)
    try:
        connection.request("POST", path, data, {name: value.encode("latin-1") for name, value in headers.items()})
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    except TimeoutError:
        return "hangs", "", True
    except (OSError, http.client.HTTPException) as error:
        return "connection lost", str(error), True
    finally:
        connection.close()
    status = response.status
    if status == 200:
        is_stream = (response.getheader("Content-Type") or "").startswith("text/event-stream")
        problem = _problem_of_stream(path, text) if is_stream else _problem_of_answer(path, text)
        return (f"answered: {problem}", text, True) if problem else ("answered", "", False)
    try:
        error = json.loads(text)["error"]
        message = str(error["message"])
        is_whole = bool(message.strip()) and isinstance(error["type"], str) and {"param", "code"} <= error.keys()
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status} without OpenAI's error", text, True
    if not is_whole:
        return f"HTTP {status} without a message", text, True
    if OTHERS_WORDS.search(message) and not OTHERS_WORDS.search(data.decode(errors="replace")):
        return f"HTTP {status} in words of others", message, True
    if status == 503:
        has_cure = response.getheader("Retry-After") is not None
        return f"HTTP 503{'' if has_cure else ' without Retry-After'}", message, not has_cure
    return f"refused: HTTP {status}", message, not 400 <= status < 500


_PROOFS = {
    "/v1/chat/completions": "choices",
    "/v1/completions": "choices",
    "/v1/responses": "output",
    "/tokenize": "tokens",
    "/detokenize": "prompt",
}
"""What an answer of each door has."""


def _problem_of_answer(path: str, text: str) -> str | None:
    try:
        answer = json.loads(text)
    except ValueError:
        return "no JSON"
    if _PROOFS[path] not in answer:
        return "nothing in it"
    if path == "/v1/responses":
        return None if answer["status"] in ("completed", "incomplete") else f"status {answer['status']}"
    if "choices" in answer and not all(choice["finish_reason"] for choice in answer["choices"]):
        return "a choice without an end"
    return None


def _problem_of_stream(path: str, text: str) -> str | None:
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    is_typed = path == "/v1/responses"
    if not is_typed and (not events or events.pop() != "[DONE]"):
        return "a stream without an end"
    read = [json.loads(event) for event in events]
    if any(event.get("error") for event in read):
        return "an error in a stream"
    if is_typed:
        is_over = bool(read) and read[-1]["type"] in ("response.completed", "response.incomplete")
        return None if is_over else "a stream without an end"
    ended = {choice["index"] for event in read for choice in event["choices"] if choice["finish_reason"]}
    begun = {choice["index"] for event in read for choice in event["choices"]}
    return None if begun and begun == ended else "a choice without an end"


if __name__ == "__main__":
    sys.exit(main())
