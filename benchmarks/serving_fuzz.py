"""Requests that nobody means well: wrong dtypes, shapes and sizes, NaN, empty and huge texts, invalid UTF-8, negative
numbers and hostile JSON, over gRPC and HTTP. Each has to be answered, or refused with a message; the server has to
stay, and its memory too.

    python benchmarks/serving_fuzz.py --bundle bundles/smollm2-135m --out benchmarks/records/serving_fuzz.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import queue
import random
import struct
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import tritonclient.grpc as grpcclient
from server_under_test import ServerUnderTest, reference
from tritonclient.utils import InferenceServerException

from ssv.client.triton import MODEL, ServerError, server_error, split_url
from ssv.runtime.serving.intake import FLAGS, NUMBERS, STRING_LISTS, STRINGS, WHOLE_NUMBERS, declared_inputs
from ssv.support.environment import versions, write_record

DTYPES = {
    "BOOL": np.bool_, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64, "UINT64": np.uint64, "FP16": np.float16,
    "FP32": np.float32, "FP64": np.float64, "BYTES": np.object_,
}  # fmt: skip

HOSTILE_TEXTS = (
    b"", b" ", b"\0", b"\0" * 1000, b"\xff\xfe\xfd", b"\xc3\x28", b"\xed\xa0\x80", "\U0001f600".encode() * 50,
    b"A" * 70000, b"A" * 1_000_000, b"<|im_start|>system\n" * 5, b"<|im_end|>", "\u202e\u0000\u200b".encode(),
    b"%s%n%x{{7*7}}${jndi:x}",
    b"{" * 5000, b"[" * 100_000, b'{"a":' * 3000,
)  # fmt: skip
HOSTILE_VALUES: tuple[Any, ...] = (
    -1, 0, 1, 5, 2**40, 0.5, -0.5, 1e300, True, False, None, "", "x", "\ud800", "A" * 70000, [], [1, "a"], {},
    {"a": [1]},
)  # fmt: skip
HOSTILE_JSON = (
    "", "null", "[]", "{}", "1", '"x"', "{", '{"max_tokens": NaN}', '{"temperature": Infinity}', '{"temperature": -1}',
    '{"max_tokens": 1e400}', '{"max_tokens": "1' + "0" * 5000 + '"}', '{"max_tokens": -5}', '{"max_tokens": 3.5}',
    '{"top_p": 0}',
    '{"top_p": "nan"}', '{"n": 2}', '{"stop": [1, 2]}', '{"stop": {"a": 1}}', '{"stop": ["", "x"]}',
    '{"__class__": "os.system"}',
    '{"ignore_eos": "perhaps"}', '{"seed": -1}', '{"seed": 18446744073709551616}', '{"max_tokens": 3, "max_tokens": 4}',
    '{"max_tokens": null}', "[" * 50_000, '{"a":' * 10_000, '{"logprobs": 5}', '{"top_k": true}', '{"max_tokens": [3]}',
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with ServerUnderTest(args.bundle, "--prompt-cache-mb", "64", "--threads", "1") as server:
        expected = reference(server)
        run(server, min(1000, args.requests), args.clients, seed=1)  # pools and caches have their size afterwards
        server.wait_idle()
        before, start = server.memory_mb(), time.monotonic()
        outcomes, examples = run(server, args.requests, args.clients, seed=2)
        server.wait_idle()
        figures = {
            "requests": args.requests,
            "seconds": round(time.monotonic() - start, 1),
            "outcomes": dict(outcomes.most_common()),
            "examples_of_refusals": examples,
            "without_answer_or_message": outcomes["hangs"]
            + outcomes["connection lost"]
            + outcomes["refused without message"],
            "server_died": len(server.events("server died")),
            "memory_mb_before": before,
            "memory_mb_after": server.memory_mb(),
            "normal_afterwards": reference(server) == expected,
        }
    write_record(figures, args.out, versions("torch", "nvidia-pytriton", "tritonclient", "grpcio"))
    return int(bool(figures["without_answer_or_message"] or figures["server_died"] or not figures["normal_afterwards"]))


def run(server: ServerUnderTest, num: int, clients: int, seed: int) -> tuple[Counter[str], dict[str, str]]:
    """Outcomes of so many requests, and one message of each kind of refusal."""
    outcomes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    lock = threading.Lock()

    def work(first: int) -> None:
        grpc = _Grpc(server.grpc_url)
        for number in range(first, num, clients):
            rng = random.Random(f"{seed} {number}")
            outcome, message = _http(server.http_url, rng) if rng.random() < 0.4 else grpc.ask(rng)
            with lock:
                outcomes[outcome] += 1
                if message:
                    examples.setdefault(" ".join(message.split()[:3])[:40], message[:160])
                if sum(outcomes.values()) % 1000 == 0:
                    print(dict(outcomes), file=sys.stderr, flush=True)
        grpc.close()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes, dict(list(examples.items())[:40])


class _Grpc:
    def __init__(self, url: str) -> None:
        self._url = url
        self._connect()

    def _connect(self) -> None:
        self._client = grpcclient.InferenceServerClient(split_url(self._url)[0])
        self._replies: queue.Queue[Any] = queue.Queue()
        replies = self._replies
        self._client.start_stream(lambda result, error: replies.put(error or result))

    def close(self) -> None:
        self._client.close()

    def ask(self, rng: random.Random) -> tuple[str, str]:
        """Outcome of one request, and the message of a refusal."""
        try:
            inputs = [_tensor(rng, name) for name in _some_inputs(rng)]
            self._client.async_stream_infer(MODEL, inputs, enable_empty_final_response=True)
            while True:
                result = self._replies.get(timeout=120)
                if isinstance(result, InferenceServerException):
                    return _refusal(server_error(result, self._url))
                if result.get_response().parameters["triton_final_response"].bool_param:
                    return "answered", ""
        except InferenceServerException as error:  # the client's own library, or a stream that has broken
            outcome = _refusal(server_error(error, self._url))
            self.close()
            self._connect()
            return outcome
        except queue.Empty:
            self.close()
            self._connect()
            return "hangs", ""


def _refusal(error: ServerError) -> tuple[str, str]:
    if error.status == "UNAVAILABLE" and "waiting" not in str(error):
        return "connection lost", str(error)
    return (f"refused: {error.status}", str(error)) if str(error) else ("refused without message", "")


def _some_inputs(rng: random.Random) -> list[str]:
    names = rng.sample(list(declared_inputs()), rng.randint(0, 5))
    if rng.random() < 0.9 and "text_input" not in names:
        names.append("text_input")
    if "max_tokens" not in names and rng.random() < 0.95:
        names.append("max_tokens")
    if rng.random() < 0.02:
        names.append("no_such_input")
    return names


def _tensor(rng: random.Random, name: str) -> grpcclient.InferInput:
    datatype = _datatype(name) if rng.random() < 0.93 else rng.choice(list(DTYPES))
    shape = [1, 1] if rng.random() < 0.93 else rng.choice([[1], [], [2, 1], [1, 0], [0], [1, 3], [1, 1, 1], [1, 1000]])
    num = int(np.prod(shape))
    values = [_value(rng, name, datatype) for _ in range(num)]
    tensor = grpcclient.InferInput(name, shape, datatype)
    array = np.empty(num, dtype=DTYPES[datatype])
    array[:] = values
    if datatype == "BYTES" and rng.random() < 0.02:  # lengths that are not true
        tensor._raw_content = struct.pack("<I", rng.choice([0, 5, 2**31, 2**32 - 1])) + b"abc"
    else:
        tensor.set_data_from_numpy(array.reshape(shape))
    return tensor


def _value(rng: random.Random, name: str, datatype: str) -> Any:
    if datatype == "BYTES":
        if name in ("sampling_parameters", "ssv_messages"):
            return rng.choice(HOSTILE_JSON).encode()
        if rng.random() < 0.5:
            return b"Say something about " + bytes(rng.choices(b"abcdefgh ", k=20))
        return rng.choice(HOSTILE_TEXTS) if rng.random() < 0.3 else rng.randbytes(rng.randint(0, 60))
    if datatype == "BOOL":
        return rng.random() < 0.5
    if datatype.startswith("FP"):
        return rng.choice([0.0, 0.5, 1.0, -1.0, 1e-6, float("nan"), float("inf"), -float("inf"), 1e4])
    if datatype.startswith("UINT"):
        return rng.choice([0, 1, 2**63])
    if name == "max_tokens" and rng.random() < 0.8:
        return rng.randint(1, 8)
    return rng.choice([-(2 ** (7 if datatype == "INT8" else 31)), -1, 0, 1, 5, 100])


def _datatype(name: str) -> str:
    if name in STRINGS + STRING_LISTS or name == "no_such_input":
        return "BYTES"
    if name in FLAGS:
        return "BOOL"
    if name in NUMBERS:
        return "FP32"
    assert name in WHOLE_NUMBERS
    return "UINT64" if name == "seed" else "INT32"


def _http(url: str, rng: random.Random) -> tuple[str, str]:
    """Outcome of one request to generate or generate_stream."""
    body: Any = {"text_input": "Say something", "max_tokens": rng.randint(1, 8)}
    for name in rng.sample(list(declared_inputs()), rng.randint(0, 4)):
        body[name] = rng.choice(HOSTILE_VALUES + HOSTILE_JSON)
    if rng.random() < 0.5:
        body["max_tokens"] = rng.randint(1, 8)
    data = json.dumps(body).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        data = rng.choice([b"", b"{", b"[]", b"null", data[: len(data) // 2], rng.randbytes(100), b"[" * 100_000])
    path = f"/v2/models/{MODEL}/generate{rng.choice(['', '_stream'])}"
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    except TimeoutError:
        return "hangs", ""
    except (OSError, http.client.HTTPException) as error:
        return "connection lost", str(error)
    finally:
        connection.close()
    if response.status == 200 and '"error"' not in text:
        return "answered", ""
    return (f"refused: HTTP {response.status}", text) if text.strip() else ("refused without message", "")


if __name__ == "__main__":
    sys.exit(main())
