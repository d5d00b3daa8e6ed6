"""What a flood does to the server's memory: thousands of requests at the same moment, over gRPC and HTTP, with prompts
of the largest size that it takes and beyond. One in ten is short and could be answered. Each is to be answered or
refused, and one that comes afterwards to be answered as before.

    python benchmarks/serving_flood.py --bundle bundles/smollm2-135m --out benchmarks/records/serving_flood.json
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import tritonclient.grpc.aio as grpcclient
from server_under_test import ServerUnderTest, reference
from tritonclient.utils import InferenceServerException

from ssv.client.triton import Settings, request_inputs
from ssv.support.environment import versions, write_record

SHORT = "Write one sentence about a lighthouse."
SHORT_EVERY = 10
LONG = "A lighthouse stood on a rock. "
MAX_TOKENS = 8

_STATUS = re.compile(r"\b(UNAVAILABLE|INVALID_ARGUMENT|INTERNAL|DEADLINE_EXCEEDED)\b")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=2000, help="of a flood, every other one over HTTP")
    parser.add_argument("--bytes", default="65536,100000", help="of a long prompt; a flood of each")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds after which a request is forgotten")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the checkout to measure")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    floods = {}
    with ServerUnderTest(args.bundle, python=args.python) as server:
        expected = reference(server)
        for size in args.bytes.split(","):
            floods[size] = flood(server, args.requests, int(size), args.patience)
            floods[size]["normal_afterwards"] = reference(server) == expected
            print(size, floods[size], file=sys.stderr, flush=True)
        status = server.stop()
    figures = {"requests": args.requests, "bytes_of_a_long_prompt": floods, "exit_status": status}
    write_record(figures, args.out, versions("nvidia-pytriton", "tritonclient", "grpcio", "aiohttp"))
    return 0


def flood(server: ServerUnderTest, num: int, size: int, patience: float) -> dict[str, Any]:
    """Outcomes by door and kind of prompt, and memory before, at its most, and after."""
    long = (LONG * (size // len(LONG) + 1))[:size]
    prompts = [SHORT if at // 2 % SHORT_EVERY == 0 else long for at in range(num)]
    outcomes: list[str] = []
    before, start = memory_mb(server), time.monotonic()
    peak = dict(before)
    asking = threading.Thread(target=lambda: outcomes.extend(asyncio.run(ask_all(server, prompts, patience))))
    asking.start()
    while asking.is_alive():
        now = memory_mb(server)
        peak = {name: max(mb, now.get(name, 0.0)) for name, mb in peak.items()}
        time.sleep(0.1)
    seconds = time.monotonic() - start
    time.sleep(2.0)  # connections are closed, and what they held is free
    found: dict[str, Counter[str]] = {}
    for at, (prompt, outcome) in enumerate(zip(prompts, outcomes, strict=True)):
        kind = f"{'HTTP' if at % 2 else 'gRPC'}, {'short' if prompt is SHORT else 'long'}"
        found.setdefault(kind, Counter())[outcome] += 1
    return {
        "outcomes": found,
        "seconds": round(seconds, 1),
        "memory_mb_before": before,
        "memory_mb_peak": peak,
        "memory_mb_after": memory_mb(server),
    }


def memory_mb(server: ServerUnderTest) -> dict[str, float]:
    """Of each process of the server, ssv-serve's own among them, and of all at the moment."""
    own = psutil.Process(server.process.pid).memory_info().rss / 2**20
    found = {**server.memory_mb(), "ssv-serve": round(own, 1)}
    return {**found, "all": round(sum(found.values()), 1)}


async def ask_all(server: ServerUnderTest, prompts: Sequence[str], patience: float) -> list[str]:
    """How each request has ended: answered, with the status of its refusal, or otherwise."""
    address = server.grpc_url.removeprefix("grpc://")
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        grpcclient.InferenceServerClient(address) as client,
        aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout()) as session,
    ):
        return await asyncio.gather(
            *(
                patient(ask_http(session, server.http_url, prompt) if at % 2 else ask_grpc(client, prompt), patience)
                for at, prompt in enumerate(prompts)
            )
        )


async def patient(asking: Coroutine[Any, Any, str], seconds: float) -> str:
    try:
        return await asyncio.wait_for(asking, seconds)
    except TimeoutError:
        return "no answer"


async def ask_grpc(client: grpcclient.InferenceServerClient, prompt: str) -> str:
    inputs = request_inputs(prompt, Settings(max_tokens=MAX_TOKENS), stream=False)

    async def one() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "ensemble", "inputs": inputs}

    try:
        async for result, error in client.stream_infer(one()):
            if error is not None:
                return status_of(str(error))
            if result.as_numpy("finish_reason").reshape(-1)[0]:
                return "answered"
    except InferenceServerException as error:
        return status_of(f"{error.status()} {error}")
    return "ended without an answer"


async def ask_http(session: aiohttp.ClientSession, url: str, prompt: str) -> str:
    body = {"text_input": prompt, "max_tokens": MAX_TOKENS}
    try:
        async with session.post(f"{url}/v2/models/ensemble/generate", json=body) as response:
            text = await response.text()
    except aiohttp.ClientError as error:
        return type(error).__name__
    return "answered" if response.status == 200 and '"error"' not in text else status_of(text)


def status_of(message: str) -> str:
    match = _STATUS.search(message)
    return match[1] if match else message[:80]


if __name__ == "__main__":
    sys.exit(main())
