"""Stands for `vllm serve` (as of 0.26): the addresses that a comparison asks, with a text that the prompt decides.

    python fake_vllm.py serve FOLDER [options] --port PORT

An arm with a draft sends two tokens at a time and counts them as vLLM does: three drafted, one of them accepted, in
each pass after a request's first. What it was started with goes to the file that FAKE_VLLM_LOG names, a line each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

WORDS = 9  # of an answer: one from the prompt, and four passes of two


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, speculates: bool) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.speculates = speculates
        self.lock, self.requests = Lock(), 0

    def metrics(self) -> str:
        engine = 'engine="0",model_name="target"'
        passes = self.requests * (WORDS - 1) // 2
        lines = [
            "# HELP vllm:generation_tokens_total Number of generation tokens processed.",
            "# TYPE vllm:generation_tokens_total counter",
            f"vllm:generation_tokens_total{{{engine}}} {float(self.requests * WORDS)}",
            f'vllm:request_success_total{{{engine},finished_reason="stop"}} {float(self.requests)}',
            f'vllm:request_success_total{{{engine},finished_reason="length"}} 0.0',
        ]
        if self.speculates:
            lines += [
                f"vllm:spec_decode_num_drafts_total{{{engine}}} {float(passes)}",
                f"vllm:spec_decode_num_draft_tokens_total{{{engine}}} {float(3 * passes)}",
                f"vllm:spec_decode_num_accepted_tokens_total{{{engine}}} {float(passes)}",
            ]
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{engine},position="{position}"}} {float(count)}'
                for position, count in enumerate((passes, 0, 0))
            ]
        return "\n".join(lines) + "\n"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path == "/metrics":
            return self.answer("text/plain", self.server.metrics())
        if self.path in ("/health", "/v1/models"):
            return self.answer("application/json", json.dumps({"object": "list", "data": [{"id": "target"}]}))
        return self.send_error(404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert asked["model"] == "target" and asked["temperature"] == 0.0 and asked["stream"]
        with self.server.lock:
            self.server.requests += 1
        self.answer("text/event-stream", "".join(f"data: {event}\n\n" for event in self.events(asked)))

    def events(self, asked: dict[str, Any]) -> Iterator[str]:
        said = [f"w{len(asked['messages'][-1]['content']) + i} " for i in range(WORDS)]
        step = 2 if self.server.speculates else 1
        common = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "target"}
        for start in (0, *range(1, WORDS, step)):
            delta = {"content": "".join(said[start : start + (step if start else 1)])}
            reason = "stop" if start + step >= WORDS else None
            yield json.dumps({**common, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})
        usage = {"prompt_tokens": 20, "completion_tokens": WORDS, "total_tokens": 20 + WORDS}
        yield json.dumps({**common, "choices": [], "usage": usage})
        yield "[DONE]"

    def answer(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    with open(os.environ["FAKE_VLLM_LOG"], "a") as log:
        log.write(f"{os.environ['CUDA_VISIBLE_DEVICES']} {os.getpid()} {' '.join(sys.argv[1:])}\n")
    if sys.argv[sys.argv.index("--tensor-parallel-size") + 1] == os.environ.get("FAKE_VLLM_DIES"):
        sys.exit(3)
    Server(int(sys.argv[sys.argv.index("--port") + 1]), "--speculative-config" in sys.argv).serve_forever()
