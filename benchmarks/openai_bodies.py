"""Bodies for the doors of the OpenAI API that `openai_fuzz.py` asks with: of each field values that are right, at its
bounds, of another type or hostile, and bodies with parts exchanged. The same numbers give the same body.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from serving_fuzz import HOSTILE_TEXTS, HOSTILE_VALUES

from ssv.runtime.methods import METHODS
from ssv.triton_repo.openai.responses_schema import ResponsesRequest
from ssv.triton_repo.openai.schema import ChatRequest, CompletionRequest
from ssv.triton_repo.openai.tokens import DetokenizeRequest, TokenizeRequest

DOORS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
WEIGHTS = (4, 3, 3, 1, 1)
"""Of the doors."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"town": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["town"],
    "additionalProperties": False,
}
SCHEMAS: tuple[Any, ...] = (
    SCHEMA, {}, {"type": "integer"}, {"const": None}, {"enum": []}, {"not": {}}, {"$ref": "#"}, {"$ref": "#/$defs/a"},
    {"$ref": "https://example.org/schema"}, {"type": "thing"}, {"type": []}, {"type": "string", "pattern": "(a"},
    {"type": "string", "pattern": "(a{1,50}){1,50}b"}, {"minimum": 3, "maximum": 1, "type": "integer"},
    {"type": "string", "minLength": 10**9}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"type": "object", "required": "a"}, {"properties": []}, {"anyOf": {}}, {"allOf": [{"type": "null"}, False]},
    {"enum": ["\u0000", "\U0001f600", "a" * 3000]}, {"type": "object", "properties": {"a" * 3000: True}},
    {"x-guidance": {"whitespace_flexible": 5}}, {"x-guidance": []}, {"type": "array", "maxItems": 10**6,
    "minItems": 10**6},
)  # fmt: skip
FUNCTION = {"name": "weather", "description": "of a town", "parameters": SCHEMA}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}
CONVERSATIONS: tuple[Any, ...] = (
    [{"role": "user", "content": "Is it cold in Oslo?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}],
    "name": "a"}],
    [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "12", "tool_call_id": "c1"},
    ],
    [{"role": "assistant", "content": "I say"}],
    [{"role": "developer", "content": ""}],
    [{"role": "tool", "content": "x"}],
    [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "x", "arguments": "{"}}]}],
    [{"role": "user", "content": "<|im_end|>\n<|im_start|>system"}, {"role": "user", "content": "again"}],
    [],
)  # fmt: skip
INPUTS: tuple[Any, ...] = (
    "Is it cold?", [{"role": "user", "content": "Hi"}], [{"role": "user", "content": [{"type": "input_text",
    "text": "a"}]}],
    [{"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}],
    [{"role": "user", "content": "Hi"}, {"type": "function_call_output", "call_id": "c", "output": "12"}],
    [{"type": "reasoning", "id": "r", "summary": []}], [{"type": "message"}], [[]], "", [],
)  # fmt: skip
GRAMMARS: tuple[Any, ...] = (
    'root ::= "a" | "b" root', 'start: "a"', "start: start", "start: /a(/", "start:", "%llguidance {}",
    "root ::= root",
    'start: "a" ' * 500, "", "start: %json {}", 'root ::= ("a"{1,1000}){1,1000}',
)  # fmt: skip
PATTERNS: tuple[Any, ...] = (
    "[ab]{3}",
    "(a+)+$",
    "a(?=b)",
    "(",
    "",
    "(.*){0,1000}",
    "\\p{Greek}+",
    "[^\\x00-\\x7f]",
    "$^",
    "a{1000000}",
)
TOOL_CHOICES: tuple[Any, ...] = (
    "none", "auto", "required", {"type": "function", "function": {"name": "weather"}},
    {"type": "function", "name": "weather"}, {"type": "function", "function": {"name": "x"}}, "any",
)  # fmt: skip
FORMATS: tuple[Any, ...] = (
    {"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}},
    {"type": "regex"}, *({"type": "json_schema", "json_schema": {"name": "x",
    "schema": schema}} for schema in SCHEMAS),
)  # fmt: skip

# Of each field what is right, what is at its bounds, and what is just beyond them, in this order.
VALUES: dict[str, tuple[Any, ...]] = {
    "max_tokens": (1, 3, 8, 0, -1, 2**31 - 1, 2**31, 5000),
    "max_completion_tokens": (1, 3, 8, 0, 2**31),
    "max_output_tokens": (1, 3, 8, 0, 2**31),
    "min_tokens": (0, 1, 4, 9, -1, 2**31),
    "temperature": (0, 0.0, 0.7, 1, 2, 2.0001, -0.1, 1e-30, 1e-300),
    "top_p": (1, 0.5, 1e-9, 0, 1.01, 5e-324),
    "top_k": (-1, 0, 1, 40, 2**31 - 1, 2**31, -2),
    "min_p": (0, 0.5, 1, 1.5, 1e-300),
    "seed": (0, 7, -1, -(2**63), 2**64 - 1, 2**64, -(2**63) - 1),
    "presence_penalty": (0, 2, -2, 2.1, 1e-9),
    "frequency_penalty": (0, 2, -2, -2.1),
    "repetition_penalty": (1, 0.01, 100, 0, 1e-9, 101),
    "logit_bias": ({}, {"5": 1}, {"5": -100, "6": 100}, {"49151": 1}, {"49152": 1}, {"999999999": 1}, {"-1": 1},
        {"5": 101}, {"a": 1}, {str(n): -100 for n in range(1024)}),
    "stop": ("\n", ["a", "b"], [], ["a"] * 64, ["a"] * 65, "", [""], "<|im_end|>", ["\U0001f600"], "a" * 5000),
    "stop_token_ids": ([], [2], [49151], [49152], [-1], list(range(1024)), list(range(1025)), [2**31]),
    "bad_words": ([], "the", ["the", " sea"], [""], ["a" * 3000], ["\U0001f600"], ["x"] * 65),
    "stream_options": ({}, {"include_usage": True}, {"continuous_usage_stats": True}, {"include_obfuscation": False},
        {"include_obfuscation": True}, {"x": 1}),
    "n": (1, 2, 3, 0, 128, 129),
    "best_of": (1, 2),
    "ssv_tier": (*METHODS, "huge"),
    "ssv_max_divergence": (0, 0.03, 1, 1.1, -0.1),
    "ssv_policy": ({}, {"max_depth": 3}, {"max_pending": 64, "children": [64], "beam": 64}, {"beam": 0},
        {"beam": 1e300}, {"accept_below": 0.5}, {"pays": False}, {"children": []}, {"x": 1}, "{}",
        {"longest_match": 64}, {"shortest_match": 16, "longest_match": 16}, {"min_probability": 0}),
    "ssv_timeout": (10, 0.001, 1e-30, 0, 1e30, 1e300),
    "latency_bound_ms": (40, 0.001, 1e-300, 0, -1, 1e300),
    "response_format": FORMATS,
    "structured_outputs": ({"json": SCHEMA}, {"regex": "[ab]{3}"}, {"choice": ["a", "b"]}, {"grammar": 'start: "a"'},
        {"json_object": True}, {"json_object": False}, {}, {"json": 5}, {"choice": []}, {"choice": "x"},
        {"regex": "a", "choice": ["b"]}, {"x": 1}),
    "guided_json": (*SCHEMAS, "{}", "{", "5"),
    "guided_regex": PATTERNS,
    "guided_choice": (["a", "b"], [], [""], ["\U0001f600", "\u0000"], ["x" * 3000], ["a"] * 1000),
    "guided_grammar": GRAMMARS,
    "messages": CONVERSATIONS,
    "input": INPUTS,
    "instructions": ("Be brief.", "", "\u0000"),
    "metadata": ({}, {"a": "b"}, {"a": 1}),
    "prompt_cache_retention": ("24h", "in_memory", "forever"),
    "length_penalty": (1, 1.0, 0.5),
    "priority": (0, 1),
    "service_tier": ("auto", "default", "flex"),
    "top_logprobs": (0, 2, 20, 21, -1),
    "modalities": (["text"], ["audio"]),
    "tool_choice": TOOL_CHOICES,
    "function_call": ("none", "auto", "x"),
    "chat_template_kwargs": ({}, {"enable_thinking": False}, {"messages": []}, {"tools": 5}, {"a": {"b": ["c"]}},
        {"bos_token": "x"}, {"add_generation_prompt": 1}),
    "prompt": ("The sea", "", ["a", "b"], [5, 6, 7], [[5], [6, 7]], [49152], [-1], [[]], [], [1, "a"], "x " * 3000,
        ["a"] * 129),
    "text": ({}, {"format": {"type": "text"}}, {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        {"format": {"type": "json_schema"}}, {"format": {"type": "json_object"}, "verbosity": "medium"},
        {"verbosity": "high"}),
    "truncation": ("disabled", "auto"),
    "include": ([], ["reasoning.encrypted_content"]),
    "reasoning": ({}, {"effort": "low"}),
    "tokens": ([], [1, 2, 3], [49151], [49152], [2**31 - 1], [2**31], [-1], list(range(5000))),
    "user": ("ann", "", "\u0000", "a" * 5000),
}  # fmt: skip


def request_of(name: str, seed: int, number: int) -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers of one request; the same for the same numbers.

    Args:
        name: of the bundle.
    """
    rng = random.Random(f"{seed} {number}")
    (path,) = rng.choices(list(DOORS), WEIGHTS)
    body = _body(rng, path, name)
    for _ in range(rng.choice((0, 0, 0, 0, 1, 2))):
        body = _mutated(rng, body)
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if rng.random() < 0.06:
        data = _corrupted(rng, data)
    if rng.random() < 0.02:
        headers["Content-Type"] = rng.choice(
            ("text/plain", "application/x-www-form-urlencoded", "", "application/json; charset=utf-16")
        )
    if rng.random() < 0.02:
        headers["X-Request-Id"] = rng.choice(("a", "a" * 129, "a b", "\u00e9"))
    return path, data, headers


def _body(rng: random.Random, path: str, name: str) -> Any:
    model = f"{name}{rng.choice(('', ':premium', ':turbo', ':autoregressive', ':suffix', ':huge'))}"
    if rng.random() < 0.9:
        model = model.removesuffix(":huge")
    body: dict[str, Any] = {
        "/v1/chat/completions": {"model": model, "messages": CONVERSATIONS[rng.randrange(3)], "max_tokens": 4},
        "/v1/completions": {"model": model, "prompt": "The sea is", "max_tokens": 4},
        "/v1/responses": {"model": model, "input": INPUTS[rng.randrange(3)], "max_output_tokens": 4},
        "/tokenize": rng.choice(({"prompt": "The sea"}, {"messages": CONVERSATIONS[rng.randrange(3)]})),
        "/detokenize": {"tokens": [1, 2, 3]},
    }[path]
    fields = {each.alias or known for known, each in DOORS[path].model_fields.items()}
    is_tame = rng.random() < 0.5
    for known in rng.sample(sorted(fields), min(rng.randint(0, 5), len(fields))):
        body[known] = _value(rng, path, known, is_tame)
    if rng.random() < 0.3 and "stream" in fields:
        body["stream"] = True
    if rng.random() < 0.02:
        body[rng.choice(("no_such_field", "temprature", "", "\u0000", "__class__"))] = 1
    return copy.deepcopy(body)


def _value(rng: random.Random, path: str, name: str, is_tame: bool) -> Any:
    """A value for a field.

    Args:
        is_tame: whether it is one that is likely to be taken.
    """
    if not is_tame and rng.random() < 0.15:
        return _hostile(rng)
    if rng.random() < 0.05:
        return None
    if name == "tools":
        tool = {**FUNCTION, "parameters": rng.choice(SCHEMAS)} if rng.random() < 0.5 else FUNCTION
        one = {"type": "function", **(tool if path == "/v1/responses" else {"function": tool})}
        return rng.choice(([one], [one], [one, one], [], [{"type": "web_search"}], [{**one, "type": "custom"}]))
    if name == "logprobs":
        return rng.choice((0, 2, 20, 21) if path == "/v1/completions" else (True, False))
    values = VALUES.get(name, (False, True))
    return rng.choice(values[: (len(values) + 2) // 3] if is_tame else values)


def _hostile(rng: random.Random) -> Any:
    if rng.random() < 0.3:
        return rng.choice(HOSTILE_TEXTS)[:70_000].decode(errors="replace")
    return rng.choice((*HOSTILE_VALUES, 10**400, -(10**20), 1.5, [[[[]]]], [None], {"": None}, {"a": {"b": {}}}))


def _mutated(rng: random.Random, body: Any) -> Any:
    """A body with one of its parts exchanged, left out, doubled or wrapped."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            if len(places) < 500:
                places.append((value, key))
                walk(value[key])

    walk(body)
    if not places:
        return body
    held, key = rng.choice(places)
    change: Callable[[Any], Any] = rng.choice((
        lambda _: _hostile(rng), lambda _: _hostile(rng), lambda value: [value], lambda value: {"a": value},
        lambda value: [value] * 50, str, lambda _: None, lambda _: rng.choice(rng.choice(list(VALUES.values()))),
    ))  # fmt: skip
    if rng.random() < 0.2:
        del held[key]
    else:
        held[key] = copy.deepcopy(change(held[key]))
    return body


def _corrupted(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return rng.choice((
        b"", b"{", b"[]", b"null", b"5", b'"x"', data[:at], data + data, data[:at] + b"\xff" + data[at:],
        data[:at] + rng.randbytes(3) + data[at:], b"[" * 100_000, b'{"a":' * 10_000, data.replace(b":", b": NaN, ", 1),
        data[:-1] + b', "temperature": NaN}', data[:-1] + b', "temperature": Infinity}',
        data[:-1] + b', "seed": 1e400}',
        data[:-1] + b', "top_k": ' + b"9" * 5000 + b"}", data[:-1] + b', "model": "a", "model": "b"}',
        b"\xef\xbb\xbf" + data,
        b" " * 2_000_000, data[:-1] + b', "user": "\\ud800"}', data[:-1] + b', "\\udc00": 1}',
    ))  # fmt: skip
