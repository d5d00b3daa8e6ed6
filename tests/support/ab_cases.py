"""Samples, settings and endpoints for tests of ssv-ab, made by hand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ssv.ab.analysis import RunSettings
from ssv.ab.answers import Answer, Sampling
from ssv.ab.arms import parse_arm
from ssv.ab.samples import Sample

ARMS = (parse_arm("a=grpc://127.0.0.1:1"), parse_arm("b=grpc://127.0.0.1:2?method=turbo"))


def sample(
    arm: str = "a", block: int = 0, repeat: int = 0, prompt: str = "p", *, start: float = 0.0, end: float = 1.0,
    **fields: Any,
) -> Sample:  # fmt: skip
    planned = {"concurrency": 1, "seed": repeat, "output_tokens": 10, "prompt_tokens": 5, "finish_reason": "stop"}
    return Sample(arm=arm, block=block, repeat=repeat, prompt=prompt, start_s=start, end_s=end, **{**planned, **fields})


def settings(**changes: Any) -> RunSettings:
    fields: dict[str, Any] = {
        "arms": ARMS,
        "prompts": "prompts.jsonl",
        "prompts_sha256": "0" * 64,
        "num_prompts": 8,
        "num_answers": 8,
        "concurrency": (1,),
        "blocks_of": None,
        "max_tokens": 16,
        "temperature": 0.0,
        "seed": 0,
        "timeout": 5.0,
        "price_per_hour": 3.6,
        "gpus": 1.0,
        "utilisation": 1.0,
        "slo": "",
        "margin": None,
        "cost_per_correct": False,
    }
    return RunSettings(**{**fields, **changes})


class FakeEndpoint:
    """Answers as it is told to: `behave` gets the prompt and the seed, and may raise."""

    def __init__(
        self, behave: Callable[[str, int], str], disclosed: dict[str, Any] | None = None, tier: str = "turbo"
    ) -> None:
        self.behave, self.disclosed, self.tier, self.closed = behave, disclosed, tier, False

    def ask(self, prompt: str, sampling: Sampling, seed: int) -> Answer:
        text = self.behave(prompt, seed)
        return Answer(
            text=text, arrivals=[(0.001, 1), (0.002, 3)], output_tokens=4, prompt_tokens=5, finish_reason="stop",
            target_passes=2, judged=4, accepted=3, unverified=1, tier=self.tier, lossless=False,
        )  # fmt: skip

    def disclosure(self) -> dict[str, Any] | None:
        return self.disclosed

    def close(self) -> None:
        self.closed = True


Respond = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


@contextmanager
def http_server(respond: Respond) -> Iterator[str]:
    """An OpenAI endpoint that responds as it is told to; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            respond(self, body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(
    handler: BaseHTTPRequestHandler, body: bytes, *, status: int = 200, missing: int = 0, stall: bool = False
) -> None:
    """A response of server-sent events.

    Args:
        missing: bytes that are promised and do not come.
        stall: whether the connection then stays open for as long as the other side keeps it.
    """
    handler.send_response(status)
    handler.send_header("content-type", "text/event-stream")
    handler.send_header("content-length", str(len(body) + missing))
    handler.end_headers()
    handler.wfile.write(body)
    if stall:
        handler.wfile.flush()
        handler.rfile.read(1)


def events(*contents: Any, done: bool = True) -> bytes:
    parts = [content if isinstance(content, bytes) else json.dumps(content).encode() for content in contents]
    return b"".join(b"data: " + part + b"\n\n" for part in (*parts, *([b"[DONE]"] if done else [])))


def chunk(content: str | None = None, reason: str | None = None, **fields: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **fields}


def usage(tokens: Any = 4, **fields: Any) -> dict[str, Any]:
    counted = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 11, **fields}
    return {**chunk(), "choices": [], "usage": counted}


def whole_answer(text: str = "Hello") -> bytes:
    return events(chunk(""), chunk(text[:3]), chunk(text[3:]), chunk(reason="stop"), usage())
