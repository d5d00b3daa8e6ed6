"""Forms of outputs: what is taken, what is refused and why, and a state that walks along paths and back."""

from __future__ import annotations

import builtins
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lettered import NUM_TOKENS, lettered

import ssv.runtime.grammar as grammar_module
from ssv.runtime.grammar import MAX_HELD, Grammars, GrammarState, grammar_of
from ssv.runtime.request import RequestError, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [0, 1, 10]}, "ab": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}},
    "required": ["a"],
    "additionalProperties": False,
}


def grammars() -> Grammars:
    return Grammars(lettered().inner.backend.to_str, NUM_TOKENS, [0])


@pytest.mark.parametrize(
    ("kind", "guide", "good", "bad"),
    [
        ("json", "", ["{}", '{"a": [1, 0]}'], ["[]", "1"]),
        ("json_schema", json.dumps(SCHEMA), ['{"a": 10}', '{"a": 0, "ab": ["a", "b"]}'], ["{}", '{"a": 2}', '{"a":0}']),
        ("json_schema", "true", ["1", "{}"], ["b"]),
        ("regex", "(ab)+c", ["abc", "ababc"], ["ab", "c"]),
        ("choice", '["a", "ba"]', ["a", "ba"], ["b"]),
        ("choice", '["a::=b"]'.replace("=", ":"), ["a:::b"], ["a"]),
        ("ebnf_grammar", 'root ::= "a" root "b" | "c"', ["c", "acb", "aacbb"], ["acbb", "ac"]),
        ("ebnf_grammar", 'start: "a" start "b" | "c"', ["c", "acb"], ["ac"]),
    ],
)
def test_forms(kind: str, guide: str, good: list[str], bad: list[str]) -> None:
    held, tokenizer = grammars(), lettered()
    for text in (*good, *bad):
        state, ids = held.begin(grammar_of(kind, guide)), tokenizer.inner.encode(text)
        ways = [state.allowed(ids[:i], ()) for i in range(len(ids) + 1)]
        is_whole = all(way is not None and token in way for way, token in zip(ways, [*ids, 0], strict=True))
        assert is_whole == (text in good), text


@pytest.mark.parametrize(
    ("kind", "guide", "says"),
    [
        ("yaml", "", "'yaml' is no form of an output; known: json, json_schema"),
        ("json_schema", "{", "the JSON schema is not valid JSON"),
        ("json_schema", "[1]", "the JSON schema must be a JSON object"),
        ("json_schema", '{"type": 5}', "type must be a string"),
        ("json_schema", '{"not": {"type": "string"}}', r"Unimplemented keys: \[\"not\"\]"),
        ("json_schema", '{"$ref": "#/nowhere"}', "does not exist"),
        ("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', 'anyOf: put "x-guidance": {"coerce_on'),
        ("json_schema", '{"a":' * 2000 + "1" + "}" * 2000, "JSON schema"),
        ("json_schema", '{"minimum": 18446744073709551616}', "the json_schema of the output cannot be read"),
        ("json_schema", '{"const": "\\ud800"}', "the json_schema of the output cannot be read"),
        ("regex", "\ud800", "the regex of the output cannot be read"),
        ("regex", "(", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("choice", "a", "the choice is not valid JSON"),
        ("choice", "[]", "the choice must be a JSON list"),
        ("choice", '["a", ""]', "the choice must be a JSON list"),
        ("choice", "[1]", "the choice must be a JSON list"),
        ("ebnf_grammar", "", "the ebnf_grammar of the output cannot be read"),
        ("ebnf_grammar", "root ::= (", "the ebnf_grammar of the output cannot be read"),
        ("ebnf_grammar", "start: x", "unknown name"),
    ],
)
def test_what_is_no_form_is_refused(kind: str, guide: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        grammar_of(kind, guide)


def test_without_the_library_the_cure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "llguidance":
            raise ImportError
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(RequestError, match="llguidance, which is not installed") as caught:
        grammar_of("json")
    assert caught.value.cure == "pip install 'ssv[structured]'"


def test_a_form_and_no_end_contradict_each_other() -> None:
    with pytest.raises(RequestError, match="ignore_eos"):
        SamplingParams(grammar=grammar_of("json"), ignore_eos=True)


@pytest.mark.parametrize("seed", range(3))
def test_a_state_goes_along_paths_and_back(seed: int) -> None:
    """After any walk it says what one that was never anywhere else does; what is none of the grammar's has no mask."""
    rng, held, grammar = random.Random(seed), grammars(), grammar_of("json_schema", json.dumps(SCHEMA))
    state, output = held.begin(grammar), list[int]()
    for _ in range(200):
        path: list[int] = []
        for _ in range(rng.randrange(5)):
            fresh = held.begin(grammar).allowed([*output, *path], ())
            found = state.allowed(output, path)
            assert (found is None) == (fresh is None)
            if found is None or fresh is None:
                break
            assert found.tokens() == fresh.tokens() != []
            assert [token for token in range(NUM_TOKENS) if token in found] == found.tokens()
            assert [token for token in range(NUM_TOKENS) if state.accepts(output, path, token)] == found.tokens()
            assert [
                token for token in range(NUM_TOKENS) if held.begin(grammar).accepts([*output, *path], (), token)
            ] == (found.tokens())
            assert (found.bias() == 0).nonzero()[0].tolist() == found.tokens() and found.bias().min() in (0, -math.inf)
            known = rng.random() < 0.9
            path.append(rng.choice(found.tokens()) if known else rng.randrange(NUM_TOKENS))
        forced = state.forced(output)
        for i, token in enumerate(forced):
            way = held.begin(grammar).allowed([*output, *forced[:i]], ())
            assert way is not None and way.tokens() == [token]
        way = state.allowed(output, ())
        assert way is not None
        token = rng.choice(way.tokens())
        if token == 0:
            assert json.loads(lettered().decode(output))["a"] in (0, 1, 10)
            output = []
            state = held.begin(grammar)
        else:
            output.append(token)


def test_what_is_held_is_bounded_and_what_fails_is_refused() -> None:
    held = grammars()
    for i in range(MAX_HELD + 9):
        held.prepare(grammar_of("regex", f"a{{{i + 1}}}"))
    assert len(held._held) == MAX_HELD
    with pytest.raises(RequestError, match="the form of the output is not supported"):
        held.prepare("{")


EXHAUSTING = "[ab]*a[ab]{9}0"
"""Of which the library learns more with each text that it is asked about."""


def walked(state: GrammarState, rng: random.Random, length: int) -> list[tuple[list[int], list[int]]]:
    """Outputs, and what may follow them."""
    output, found = list[int](), []
    for _ in range(length):
        way = state.allowed(output, ())
        assert way is not None
        found.append((list(output), way.tokens()))
        output.append(rng.choice([token for token in way.tokens() if token]))
        if lettered().decode(output[-1:]) == "0":
            break
    return found


def test_no_output_fails_by_what_others_have_had_the_library_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shared has limits, and an output that comes to them goes on by itself."""
    fresh, grammar = grammars(), grammar_of("regex", EXHAUSTING)
    monkeypatch.setattr(grammar_module, "NARROW", {"max_lexer_states": 60})
    held, was_renewed = grammars(), 0
    for seed in range(20):
        state = held.begin(grammar)
        is_shared = state._renew is not None
        ways = walked(state, random.Random(seed), 30)
        was_renewed += is_shared and state._renew is None
        assert not state.has_failed
        expected = fresh.begin(grammar)
        for output, tokens in ways:
            way = expected.allowed(output, ())
            assert way is not None and way.tokens() == tokens
        assert len(held._held) == 1
    assert was_renewed == 1, "from then on, each output has its own"


def test_a_grammar_that_is_too_much_by_itself_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but an end may follow, and nobody asks without end for another matcher."""
    monkeypatch.setattr(grammar_module, "NARROW", {"max_lexer_states": 60})
    monkeypatch.setattr(grammar_module, "WIDE", {"max_lexer_states": 60})
    held, grammar, rng = grammars(), grammar_of("regex", EXHAUSTING), random.Random(1)
    state, output = held.begin(grammar), list[int]()
    letters = lettered().inner.encode("a") + lettered().inner.encode("b")
    for _ in range(100):
        way = state.allowed(output, ())
        assert way is not None
        if state.has_failed:
            break
        assert set(letters) <= set(way.tokens())
        output.append(rng.choice(letters))
    assert way.tokens() == [0]
    assert state.accepts(output, (), 0) is True and state.accepts(output, (), letters[0]) is False


MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_grammar import grammars
from ssv.runtime.grammar import grammar_of
from ssv.runtime.memory import keep_large_blocks
from lettered import lettered

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

assert keep_large_blocks()
held, begun = grammars(), lettered().inner.encode("a")
held.begin(grammar_of("json")).allowed([], ())
before, most = resident(), 0
for i in range(8):
    state = held.begin(grammar_of("regex", f"a{{{1000000 + i}}}"))
    state.allowed([], ())
    state.allowed(begun, ())
    most = max(most, resident() - before)
    state.end()
print(most, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_grammars_leave_no_memory_behind() -> None:
    """The library takes more than 100 MB for each of these eight, within its own limits. Held, they would have 800 MB,
    and in malloc the last one's."""
    support = os.pathsep.join([*sys.path, str(Path(__file__).parents[2] / "support")])
    command = [sys.executable, "-c", MEMORY, str(Path(__file__).parent)]
    found = subprocess.run(command, env={**os.environ, "PYTHONPATH": support}, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    most, left = map(float, found.stdout.split())
    assert left < most / 3


def test_memory_is_given_back_after_what_is_seldom_and_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary, and matchers that nobody shares: with common grammars nobody waits for it."""
    given = list[None]()
    monkeypatch.setattr(grammar_module, "give_back", lambda: given.append(None))
    held, common = grammars(), [grammar_of("regex", f"[ab]{{{i}}}") for i in (3, 4)]
    held.prepare(common[0])
    assert len(given) == 1
    for grammar in common * 2:
        state = held.begin(grammar)
        state.allowed([], ())
        state.end()
    assert len(given) == 1
    monkeypatch.setattr(grammar_module, "NARROW", {"initial_lexer_fuel": 1})
    state = held.begin(grammar_of("regex", EXHAUSTING))
    assert state._renew is None and len(given) == 2, "it was tried whether `WIDE` is enough"
    state.allowed([], ())
    state.end()
    assert len(given) == 3 and not any(state._places.values())
