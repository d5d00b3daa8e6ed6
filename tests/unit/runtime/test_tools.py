"""Calls of functions: told from text in every form, however it is cut; grammars that write nothing else; and templates
that know tools and such that do not."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from lettered import lettered

from ssv.model.chat_template import ChatTemplate
from ssv.runtime.grammar import grammar_of
from ssv.runtime.request import RequestError
from ssv.runtime.tokenizer import BundleTokenizer
from ssv.runtime.tokenizer_files import FileTokenizer
from ssv.runtime.tools import Call, CallParser, Form, call_grammar, form_of, told_in_texts

HERMES = "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}<tool_call>"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"$ref": "#/$defs/town"}},
                "required": ["town"],
                "additionalProperties": False,
                "$defs": {"town": {"enum": ["Oslo", "Rome"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
NAMES = ["weather", "now"]
OSLO, NOW = Call("weather", '{"town": "Oslo"}'), Call("now", "{}")

ANSWERS: list[tuple[Form, str, str, list[Call]]] = [
    ("hermes", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "", [NOW]),
    (
        "hermes",
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "now", "arguments": {}}\n</tool_call>',
        "I look.\n",
        [OSLO, NOW],
    ),
    ("hermes", "a < b <tool", "a < b <tool", []),
    ("hermes", "<tool_call>no</tool_call> more", "<tool_call>no</tool_call> more", []),
    ("hermes", '<tool_call>{"name": "now"', '<tool_call>{"name": "now"', []),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}', "", [NOW]),
    ("hermes", '{"name": "now", "arguments": {}}', '{"name": "now", "arguments": {}}', []),
    (
        "smollm2",
        '<tool_call>[{"name": "weather", "arguments": {"town": "Oslo"}}, {"name": "now"}]</tool_call>',
        "",
        [OSLO, NOW],
    ),
    ("smollm2", "<tool_call>[]</tool_call>", "", []),
    ("smollm2", "<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    ("llama3", '{"name": "weather", "parameters": {"town": "Oslo"}}', "", [OSLO]),
    ("llama3", ' <|python_tag|>{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}', "", [NOW, NOW]),
    ("llama3", '{"town": "Oslo"}', '{"town": "Oslo"}', []),
    ("llama3", '{"name": "nobody", "parameters": {}}', '{"name": "nobody", "parameters": {}}', []),
    ("llama3", "It is {cold}.", "It is {cold}.", []),
    ("llama3", '{"name": "now", "parameters": {', '{"name": "now", "parameters": {', []),
    ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "Oslo"}}]', "", [OSLO]),
    ("mistral", ' [{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]', "", [NOW, NOW]),
    ("mistral", 'weather{"town": "Oslo"}', "", [OSLO]),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"town": "Oslo"}[TOOL_CALLS]now[ARGS]{}', "", [OSLO, NOW]),
    ("mistral", "weathers change", "weathers change", []),
    ("mistral", "no", "no", []),
    ("mistral", "[1, 2]", "[1, 2]", []),
    ("mistral", "", "", []),
]


@pytest.mark.parametrize(("form", "answer", "text", "calls"), ANSWERS)
def test_calls_are_told_from_text_however_it_is_cut(form: Form, answer: str, text: str, calls: list[Call]) -> None:
    rng = random.Random(answer)
    for size in (1, 2, 5, 1000, *[None] * 8):
        parser, texts, found = CallParser(form, NAMES), [], list[Call]()
        at = 0
        while at < len(answer):
            step = size or rng.randint(1, 9)
            piece, new = parser.push(answer[at : at + step])
            texts.append(piece)
            found += new
            at += step
        piece, new = parser.flush()
        assert ("".join(texts) + piece, found + new) == (text, calls)


def test_a_call_leaves_when_it_is_complete_and_text_at_once() -> None:
    parser = CallParser("hermes", NAMES)
    assert parser.push("Wait. ") == ("Wait. ", [])
    assert parser.push('<tool_call>{"name": "now", "arguments": {}}</tool_call>') == ("", [NOW])
    parser = CallParser("llama3", NAMES)
    assert parser.push('{"name": "now", "parameters": {}}') == ("", [NOW])
    parser = CallParser("mistral", NAMES)
    assert parser.push("It is cold.") == ("It is cold.", [])


@pytest.mark.parametrize("form", ["hermes", "smollm2", "llama3", "mistral"])
@pytest.mark.parametrize("most", [1, 3])
def test_what_a_grammar_writes_is_read_as_calls(form: Form, most: int) -> None:
    """Of every form, with references into a function's own schema."""
    import llguidance

    tokenizer = llguidance.LLTokenizer("byte")
    grammar = grammar_of("ebnf_grammar", call_grammar(form, TOOLS, most=most))
    for seed in range(5):
        rng, matcher = random.Random(seed), llguidance.LLMatcher(tokenizer, grammar)
        written: list[int] = []
        while not matcher.is_stopped() and len(written) < 4000:
            mask = matcher.compute_bitmask()
            allowed = [t for t in range(tokenizer.vocab_size) if mask[t >> 3] >> (t & 7) & 1]
            token = rng.choice(allowed)
            if token in tokenizer.eos_tokens:
                break
            matcher.consume_token(token)
            written.append(token)
        parser = CallParser(form, NAMES)
        text, calls = parser.push(tokenizer.decode_bytes(written).decode(errors="replace"))
        rest, more = parser.flush()
        assert not (text + rest).strip() and 1 <= len(calls + more) <= most
        for call in calls + more:
            arguments = json.loads(call.arguments)
            assert call.name == "now" or arguments["town"] in ("Oslo", "Rome")


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, "smollm2"),
        ("{{ messages }}", "smollm2"),
        ("{{ tools }}<tool_call>[", "smollm2"),
        (HERMES, "hermes"),
        ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ('{{ tools }}{"name": function name, "parameters": ...}', "llama3"),
    ],
)
def test_the_form_is_the_templates(template: str | None, form: Form) -> None:
    assert form_of(template) == form


def test_templates_are_given_tools_and_calls() -> None:
    source = (
        "{% for t in tools %}{{ t | tojson }};{% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %};{% endfor %}"
    )
    calls = [{"id": "a", "type": "function", "function": {"name": "now", "arguments": {"x": 1}}}]
    messages = [{"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "5"}]
    text = ChatTemplate(source).render(messages, {}, tools=TOOLS[1:])
    assert text == '{"type": "function", "function": {"name": "now"}};assistant:{"x": 1};tool:5;'


def with_template(source: str) -> BundleTokenizer:
    backend = lettered().inner.backend
    return BundleTokenizer(FileTokenizer(backend, {}, source), [0])


def test_control_tokens_in_tools_are_text_or_refused() -> None:
    """Written by who asks, they are nobody's control tokens; in names of fields nobody could tell."""
    tokenizer = with_template("{% for t in tools %}{{ t | tojson }}{% endfor %}{{ messages[0].content }}<end>")
    message = [{"role": "user", "content": "ab"}]
    ids = tokenizer.chat_ids(message, [{"a": "<end>", "b": {"c": ["<end>"]}}])
    assert ids.count(0) == 1 and ids[-1] == 0
    with pytest.raises(RequestError, match="a field's name has the control token '<end>'"):
        tokenizer.chat_ids(message, [{"<end>": 1}])


def test_templates_without_tools_are_told_in_texts() -> None:
    calls = [{"id": "a", "type": "function", "function": {"name": "now", "arguments": {}}}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "noon", "tool_call_id": "a"},
    ]
    told = told_in_texts(messages, TOOLS[1:])
    assert [message["role"] for message in told] == ["system", "user", "assistant", "tool"]
    assert told[0]["content"].startswith("Be brief.\n\n") and '"name": "now"' in told[0]["content"]
    assert told[2] == {
        "role": "assistant",
        "content": '<tool_call>[{"name": "now", "arguments": {}}]</tool_call>',
    }
    assert told[3] == {"role": "tool", "content": "noon"}
    assert [message["role"] for message in told_in_texts(messages[1:2], TOOLS)] == ["system", "user"]
    assert told_in_texts(messages[1:2], None) == messages[1:2]
    tokenizer = with_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert tokenizer.chat_ids(messages[1:2], TOOLS) != tokenizer.chat_ids(messages[1:2])
