"""What clients may send: every field, what vLLM's clients put into JSON, and what nobody should."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ssv.bundle.manifest import Manifest, TierEntry
from ssv.bundle.policy import Policy
from ssv.runtime.grammar import grammar_of
from ssv.runtime.methods import EAGLE, METHODS, SUFFIX
from ssv.runtime.request import RequestError, SamplingParams
from ssv.runtime.serving import intake as module
from ssv.runtime.serving.intake import (
    _ELSEWHERE,
    LARGEST_SEED,
    Intake,
    Limits,
    Settings,
    declared_inputs,
    parameter_tensors,
)
from ssv.runtime.tokenizer import BundleTokenizer

VOCAB_SIZE = 300
EOS_IDS = [2, 7]
LIMITS = Limits(max_length=400, max_tokens=100, max_prompt_bytes=1000)


class Bytes:
    """A token for each byte; a chat is its contents with their roles."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [byte + 10 for byte in text.encode()]

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **_: bool) -> str:
        if any(message["role"] == "tool" for message in messages):
            raise ValueError("who is that?")
        return "".join(f"{message['role']}:{message['content']};" for message in messages)


def tier(accept_below: float, bound: float | None = None) -> TierEntry:
    policy = Policy(accept_below=accept_below, verify_above=0.5, risk_budget=0.6, max_pending=6)
    return TierEntry(policy=policy, lossless=accept_below == 0, divergence=bound, divergence_bound=bound)


TIERS = {"premium": tier(0.0), "balanced": tier(0.1, 0.02), "turbo": tier(0.2, 0.1)}


def make(limits: Limits = LIMITS, tiers: dict[str, TierEntry] = TIERS, heads: bool = True) -> Intake:
    manifest = Manifest(
        name="m",
        target={"vocab_size": VOCAB_SIZE},
        draft={},
        heads={"num_heads": 5} if heads else None,
        eos_token_ids=EOS_IDS,
        default_precision="fp32",
        tiers=tiers,
        files={},
        sources={},
        versions={},
    )
    return Intake(manifest, BundleTokenizer(Bytes()), limits)


def tensors(given: dict[str, Any]) -> dict[str, np.ndarray]:
    """As Triton hands them over: [1, n], texts as bytes."""
    dtypes: dict[str, Any] = {name: np.object_ for name in module.STRINGS + module.STRING_LISTS}
    dtypes |= {name: np.bool_ for name in module.FLAGS} | {name: np.float32 for name in module.NUMBERS}
    dtypes |= {name: np.int32 for name in module.WHOLE_NUMBERS + module.TOKEN_LISTS} | {"seed": np.uint64}
    made = {}
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        values = [v.encode() if isinstance(v, str) else v for v in values]
        array = np.empty((1, len(values)), dtype=dtypes[name])
        array[0, :] = values
        made[name] = array
    return made


def prepare(intake: Intake | None = None, **given: Any) -> tuple[tuple[int, ...], Settings]:
    return (intake or make()).prepare(tensors({"text_input": "hello", **given}))


def params(**given: Any) -> SamplingParams:
    return prepare(**given)[1].params


def vllm(text: Any, **given: Any) -> SamplingParams:
    return params(sampling_parameters=text if isinstance(text, (str, bytes)) else json.dumps(text), **given)


def refused(says: str, **given: Any) -> None:
    with pytest.raises(RequestError, match=says):
        prepare(**given)


# --- fields ---------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    prompt, settings = prepare()
    assert prompt == tuple(byte + 10 for byte in b"hello")
    seed = settings.params.seed
    assert settings == Settings("premium", SamplingParams(seed=seed, max_tokens=100), stream=False, timeout=None)


def test_default_of_max_tokens_is_what_fits() -> None:
    roomy = Limits(max_length=4000, max_tokens=3000, max_prompt_bytes=1000)
    assert prepare(make(roomy))[1].params.max_tokens == 3000
    assert prepare(make(Limits(40, 3000, 1000)))[1].params.max_tokens == 35


def test_all_that_is_supported_arrives() -> None:
    _, settings = prepare(
        max_tokens=50,
        min_tokens=3,
        temperature=0.5,
        top_k=40,
        top_p=0.75,
        seed=LARGEST_SEED,
        stop_words=["one", "two"],
        ignore_eos=True,
        stream=True,
        ssv_tier="turbo",
        ssv_timeout=2.5,
        exclude_input_in_output=True,
        return_perf_metrics=True,
        return_num_input_tokens=True,
        return_num_output_tokens=False,
        return_finish_reason=True,
        pad_id=0,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias='{"5": -1.5, "7": 2}',
        bad_words=["x", "", " y"],
        stop_token_ids=[9, 8, 9],
        ssv_top_logprobs=3,
        ssv_prompt_logprobs=0,
        ssv_return_fates=True,
        latency_bound_ms=40.0,
    )
    wanted = SamplingParams(
        temperature=0.5,
        top_k=40,
        top_p=0.75,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias=((5, -1.5), (7, 2.0)),
        bad_token_ids=((ord("x") + 10,), (ord(" ") + 10, ord("x") + 10), (ord(" ") + 10, ord("y") + 10)),
        seed=LARGEST_SEED,
        max_tokens=50,
        min_tokens=3,
        stop=("one", "two"),
        stop_token_ids=(9, 8),
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=0,
        fates=True,
        latency_bound_ms=40.0,
    )
    assert settings == Settings("turbo", wanted, stream=True, timeout=2.5)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_either_rank_is_taken(shape: tuple[int, ...]) -> None:
    given = {name: tensor.reshape(shape) for name, tensor in tensors({"text_input": "a", "max_tokens": 3}).items()}
    assert make().prepare(given)[1].params.max_tokens == 3


def test_text_may_be_text() -> None:
    assert make().prepare({"text_input": np.array([["é"]], dtype=np.object_)})[0] == (195 + 10, 169 + 10)


@pytest.mark.parametrize("name", ["min_tokens", "min_length"])
def test_least_tokens_under_either_name(name: str) -> None:
    assert params(max_tokens=9, **{name: 9}).min_tokens == 9


def test_least_tokens_under_both_names() -> None:
    assert params(min_tokens=4, min_length=4).min_tokens == 4
    refused("min_tokens 4 and min_length 5 are the same setting", min_tokens=4, min_length=5)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 9e-6])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    assert params(temperature=temperature).greedy


def test_temperature_is_sampled() -> None:
    assert params(temperature=0.01).temperature == pytest.approx(0.01)


@pytest.mark.parametrize("top_k", [0, -1])
def test_all_tokens_are_kept(top_k: int) -> None:
    assert params(top_k=top_k).top_k == 0


@pytest.mark.parametrize("seed", [0, 1, 2**63, LARGEST_SEED])
def test_seed(seed: int) -> None:
    assert params(seed=seed).seed == seed


def test_without_a_seed_each_request_has_another() -> None:
    seeds = {params(temperature=1.0).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed <= LARGEST_SEED for seed in seeds)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_tokens": 0}, "max_tokens 0 must be between 1"),
        ({"max_tokens": -5}, "max_tokens -5 must be between 1"),
        ({"max_tokens": 101}, "max_tokens 101: at most 100 are possible"),
        ({"min_tokens": -1}, "min_tokens -1"),
        ({"min_tokens": 11, "max_tokens": 10}, "min_tokens 11"),
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"temperature": math.nan}, "temperature nan is not a number"),
        ({"temperature": math.inf}, "temperature inf is not a number"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_k": -2}, "top_k -2"),
        ({"min_p": 1.5}, "min_p 1.5 must be between 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 must be between 0.01 and 100"),
        ({"presence_penalty": 2.5}, "presence_penalty 2.5 must be between -2 and 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty -2.5 must be between -2 and 2"),
        ({"bad_words": ["x"] * 65}, "65 bad_words, the longest of 1 bytes: at most 64"),
        ({"stop_token_ids": list(range(1025))}, "1025 stop_token_ids: at most 1024"),
        ({"logit_bias": "[1]"}, "logit_bias must be a JSON object"),
        ({"logit_bias": "{"}, "logit_bias is not valid JSON"),
        ({"logit_bias": '{"x": 1}'}, "token 'x' is not a number"),
        ({"logit_bias": '{"1": "x"}'}, "bias 'x' is not a number"),
        ({"logit_bias": '{"1": 101}'}, "logit_bias 101.0 of token 1 must be between -100 and 100"),
        ({"logit_bias": '{"1": 1, "01": 1}'}, "logit_bias has a token twice"),
        ({"logit_bias": json.dumps({str(i): 1 for i in range(1025)})}, "logit_bias has 10165 bytes, at most 1000"),
        ({"ssv_top_logprobs": 21}, "logprobs 21 must be between 0 and 20"),
        ({"ssv_prompt_logprobs": -1}, "prompt_logprobs -1 must be between 0 and 20"),
        ({"input_ids": [1, 2]}, "input_ids and text_input are both given"),
        ({"input_ids": [1, 300], "text_input": ""}, "token 300 is outside the vocabulary of 300"),
        ({"exclude_input_in_output": False}, "exclude_input_in_output false is not supported"),
        ({"latency_bound_ms": 0.0}, "latency_bound_ms 0.0 must be above 0"),
        ({"latency_bound_ms": math.nan}, "latency_bound_ms nan"),
        ({"ssv_timeout": 0.0}, "ssv_timeout 0.0 must be above 0"),
        ({"ssv_timeout": -1.0}, "ssv_timeout -1.0 must be above 0"),
        ({"ssv_timeout": math.nan}, "ssv_timeout nan"),
        ({"ssv_timeout": math.inf}, "ssv_timeout inf"),
        ({"ssv_max_divergence": -0.5}, "ssv_max_divergence -0.5 must be between 0 and 1"),
        ({"ssv_max_divergence": 1.5}, "ssv_max_divergence 1.5"),
        ({"ssv_max_divergence": math.nan}, "ssv_max_divergence nan"),
        ({"ssv_tier": "gold"}, "ssv_tier 'gold' is unknown; known: autoregressive"),
        ({"max_tokens": [1, 2]}, "max_tokens has 2 values, one is wanted"),
        ({"max_tokens": []}, "max_tokens has 0 values"),
        ({"text_input": ["a", "b"]}, "text_input has 2 values"),
    ],
)
def test_refused(given: dict[str, Any], says: str) -> None:
    refused(says, **given)


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end_id", EOS_IDS)
def test_end_id_of_the_model_changes_nothing(end_id: int) -> None:
    assert not params(end_id=end_id).ignore_eos


@pytest.mark.parametrize("end_id", [-1, VOCAB_SIZE, 1_048_576])
def test_end_id_that_is_no_token_asks_for_no_end(end_id: int) -> None:
    assert params(end_id=end_id).ignore_eos


@pytest.mark.parametrize("end_id", [0, VOCAB_SIZE - 1])
def test_other_end_ids_are_refused(end_id: int) -> None:
    refused(f"end_id {end_id} is not one of the model's \\(2, 7\\)", end_id=end_id)


@pytest.mark.parametrize("words", [[""], ["", ""], []])
def test_empty_words_are_none(words: list[str]) -> None:
    assert params(stop_words=words, bad_words=words).stop == ()


def test_empty_words_among_others() -> None:
    assert params(stop_words=["", "END", ""]).stop == ("END",)


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"ssv_chat": True}, {"ssv_messages": "[]"}])
def test_empty_prompt(given: dict[str, Any]) -> None:
    refused("the prompt is empty", text_input="", **given)


@pytest.mark.parametrize("given", [{}, {"max_tokens": 5}, {"stream": True}, {"ssv_chat": True}, {"ssv_messages": ""}])
def test_a_request_without_a_prompt(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="text_input is missing: give a prompt"):
        make().prepare(tensors(given))


def test_messages_are_a_prompt_without_a_text() -> None:
    given = tensors({"ssv_messages": json.dumps([{"role": "user", "content": "a"}])})
    assert make().prepare(given)[0] == tuple(byte + 10 for byte in b"user:a;")


# --- parameters: what HTTP `generate` makes of fields that are no inputs ------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("max_token", "max_tokens"),
        ("max_new_tokens", "max_tokens"),
        ("Max_Tokens", "max_tokens"),
        ("temprature", "temperature"),
        ("top-p", "top_p"),
        ("stop", "stop_words"),
        ("prompt", "text_input"),
        ("messages", "ssv_messages"),
        ("timeout", "ssv_timeout"),
        ("tier", "ssv_tier"),
        ("zzzz", None),
        ("priority", None),
    ],
)
@pytest.mark.parametrize("value", [1, True, "1"])
def test_unknown_parameters_are_refused_with_the_nearest_known_name(name: str, near: str | None, value: Any) -> None:
    says = f"'{name}' is unknown: " + (f"use {near}, or leave it out" if near else "leave it out")
    with pytest.raises(RequestError) as raised:
        make().prepare(tensors({"text_input": "hello"}), {name: value})
    assert str(raised.value) == says


@pytest.mark.parametrize("name", ["n", "best_of"])
def test_several_outputs_are_refused_with_how_to_get_them(name: str) -> None:
    cure = "leave it out, and ask once for each output, with seeds of their own"
    with pytest.raises(RequestError, match=f"'{name}' is unknown: {cure}"):
        make().prepare(tensors({"text_input": "hello"}), {name: 2})
    refused(f"sampling_parameters: {name} 2 is not supported: {cure}", sampling_parameters=json.dumps({name: 2}))
    refused(f"num_return_sequences 2 is not supported: {cure}", num_return_sequences=2)


def test_the_nearest_names_are_known() -> None:
    assert set(_ELSEWHERE.values()) <= set(declared_inputs())
    assert not set(_ELSEWHERE) & set(declared_inputs())


def test_what_comes_with_a_request_is_no_setting() -> None:
    settings = make().prepare(tensors({"text_input": "hello"}), {"id": "a/b", "accumulate_tokens": True})[1]
    assert settings.params == SamplingParams(seed=settings.params.seed, max_tokens=settings.params.max_tokens)


def test_parameters_of_known_names_are_settings() -> None:
    """vLLM's example client sends its settings so, as texts."""
    given = {"max_tokens": "7", "temperature": "0.5", "top_k": 3, "ignore_eos": "true", "stop_words": "END", "seed": 5}
    settings = make().prepare(tensors({"text_input": "hello", "max_tokens": 7}), given)[1]
    expected = SamplingParams(temperature=0.5, top_k=3, max_tokens=7, ignore_eos=True, stop=("END",), seed=5)
    assert settings.params == expected
    assert make().prepare({}, {"text_input": "hello"})[0] == prepare()[0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_tokens": 6}, "max_tokens is given twice, as 5 and as a parameter as 6: give it once"),
        ({"max_tokens": "five"}, "parameters: max_tokens 'five' is not a number"),
        ({"ignore_eos": "perhaps"}, "parameters: ignore_eos 'perhaps' is not a flag"),
        ({"text_input": "other"}, "text_input is given twice"),
        ({"sampling_parameters": '{"max_tokens": 6}'}, "max_tokens is given twice"),
        ({"ssv_messages": "x" * 1001}, "ssv_messages has 1001 bytes"),
        ({"beam_width": 2}, "beam_width 2 is not supported"),
    ],
)
def test_parameters_that_cannot_be(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        make().prepare(tensors({"text_input": "hello", "max_tokens": 5}), given)


def test_parameters_become_tensors_as_they_would_have_been_sent() -> None:
    given = {
        "max_tokens": "7",
        "temperature": 1,
        "ignore_eos": True,
        "stop_words": "é",
        "seed": LARGEST_SEED,
        "id": "x",
    }
    made, wanted = parameter_tensors(given), tensors({"max_tokens": 7, "temperature": 1.0, "ignore_eos": True})
    wanted |= tensors({"stop_words": ["é"], "seed": LARGEST_SEED})
    assert made.keys() == wanted.keys()
    for name, array in wanted.items():
        assert made[name].dtype == array.dtype and made[name].tolist() == array.tolist()
    with pytest.raises(RequestError, match="'max_token' is unknown: use max_tokens"):
        parameter_tensors({"max_token": 3})
    with pytest.raises(RequestError, match="max_tokens 1099511627776 is too large"):
        parameter_tensors({"max_tokens": 2**40})


@pytest.mark.parametrize(
    "name", ["text_input", "ssv_messages", "sampling_parameters", "ssv_tier", "stop_words", "bad_words"]
)
def test_invalid_utf8(name: str) -> None:
    refused(f"{name} is not valid UTF-8: byte 1 is 0xff", **{name: b"a\xff"})


def test_prompt_that_leaves_no_room() -> None:
    assert prepare(text_input="x" * 399)[1].params.max_tokens == 1
    for length in (400, 401):
        refused(f"the prompt has {length} tokens, and prompt and output together may have 400", text_input="x" * length)


def test_max_tokens_beside_a_long_prompt() -> None:
    assert params(text_input="x" * 390, max_tokens=10).max_tokens == 10
    refused("max_tokens 11: at most 10 are possible with this prompt", text_input="x" * 390, max_tokens=11)


def test_too_many_bytes_are_refused_before_they_are_tokenized() -> None:
    class Untouchable(Bytes):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            raise AssertionError("tokenized")

    intake = make()
    intake._tokenizer = BundleTokenizer(Untouchable())
    with pytest.raises(RequestError, match="text_input has 1001 bytes, at most 1000 are taken"):
        prepare(intake, text_input="x" * 1001)
    with pytest.raises(RequestError, match="text_input has 1002 bytes"):
        prepare(intake, text_input="é" * 501)
    messages = json.dumps([{"role": "user", "content": "x" * 1000}])
    with pytest.raises(RequestError, match=f"ssv_messages has {len(messages)} bytes"):
        prepare(intake, text_input="", ssv_messages=messages)


def test_chat() -> None:
    assert prepare(ssv_chat=True)[0] == tuple(byte + 10 for byte in b"user:hello;")
    assert prepare(ssv_chat=False)[0] == tuple(byte + 10 for byte in b"hello")


def test_messages() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "é"}]
    prompt, _ = prepare(text_input="", ssv_messages=json.dumps(messages))
    assert prompt == tuple(byte + 10 for byte in "system:s;user:é;".encode())


def test_messages_that_go_through_the_template_in_another_way() -> None:
    said = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    ids, _ = prepare(text_input="", ssv_messages=said, ssv_template='{"continue_final_message": true}')
    assert ids == tuple(byte + 10 for byte in b"user:a;assistant:b")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ('{"continue_final_message": true, "add_generation_prompt": true}', "are both true"),
        ('{"add_generation_prompt": 1}', "ssv_template must be"),
        ('{"variables": []}', "ssv_template must be"),
        ('{"thinks": true}', "ssv_template must be"),
        ("[]", "ssv_template must be"),
        ("{", "ssv_template is not valid JSON"),
    ],
)
def test_ways_through_the_template_that_cannot_be(template: str, says: str) -> None:
    refused(says, text_input="", ssv_messages='[{"role": "user", "content": "a"}]', ssv_template=template)


def test_a_text_goes_through_no_template() -> None:
    refused("ssv_template is of a conversation", ssv_template='{"add_generation_prompt": false}')


def test_messages_and_a_text() -> None:
    refused("both given", ssv_messages='[{"role": "user", "content": "a"}]')


def test_messages_that_the_template_refuses() -> None:
    refused("chat template refuses .* who is that", text_input="", ssv_messages='[{"role": "tool", "content": "a"}]')
    refused("role 'robot' is unknown", text_input="", ssv_messages='[{"role": "robot", "content": "a"}]')


@pytest.mark.parametrize(
    "messages",
    [
        '{"role": "user", "content": "a"}',
        '["a"]',
        '[{"role": "user"}]',
        '[{"role": "user", "content": "a", "name": "b"}]',
        '[{"role": "user", "content": 1}]',
        '[{"role": "user", "content": ["a"]}]',
        '[{"role": null, "content": "a"}]',
        "[[]]",
        "1",
        "null",
    ],
)
def test_messages_of_another_form(messages: str) -> None:
    refused("ssv_messages must be a JSON list of", text_input="", ssv_messages=messages)


@pytest.mark.parametrize("messages", ["[", "x", "[" * 900, '["\x00"]'])
def test_messages_that_are_no_json(messages: str) -> None:
    refused("ssv_messages is not valid JSON", text_input="", ssv_messages=messages)


@pytest.mark.parametrize("field", ["role", "content"])
def test_half_a_surrogate_in_messages_is_refused(field: str) -> None:
    """JSON can say what no text can hold; tokenizers raise TypeError on it."""
    message = {"role": "user", "content": "a", field: "\ud800"}
    with pytest.raises(RequestError):
        prepare(text_input="", ssv_messages=json.dumps([message]))


# --- tiers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_asked_for(method: str) -> None:
    assert prepare(ssv_tier=method)[1].method == method


def test_medusa_of_a_bundle_without_heads() -> None:
    with pytest.raises(RequestError, match="ssv_tier 'medusa' needs Medusa's heads, which this bundle has not"):
        make(heads=False).prepare(tensors({"text_input": "hello", "ssv_tier": "medusa"}))


def test_typical_acceptance_is_within_a_bound_where_it_is_exact() -> None:
    asked = {"ssv_tier": "medusa-typical", "ssv_max_divergence": 0.0}
    assert prepare(**asked)[1].method == "medusa-typical"
    refused(
        "'medusa-typical' has no bound on its divergence and exceeds ssv_max_divergence 0.0: leave one of",
        temperature=1.0,
        **asked,
    )


@pytest.mark.parametrize(
    ("bound", "method"), [(0.0, "premium"), (0.01, "premium"), (0.03, "balanced"), (0.2, "turbo"), (1.0, "turbo")]
)
def test_fastest_tier_within_a_bound(bound: float, method: str) -> None:
    assert prepare(ssv_max_divergence=bound)[1].method == method
    assert prepare(ssv_max_divergence=bound, ssv_tier="")[1].method == method


def test_tier_and_bound() -> None:
    assert prepare(ssv_tier="speculative", ssv_max_divergence=0.0)[1].method == "speculative"
    assert prepare(ssv_tier="balanced", ssv_max_divergence=0.5)[1].method == "balanced"
    refused("ssv_tier 'turbo' has a divergence of up to 0.1", ssv_tier="turbo", ssv_max_divergence=0.05)


def test_tiers_without_a_bound_are_within_none() -> None:
    intake = make(tiers={**TIERS, "turbo": tier(0.2)})
    assert prepare(intake, ssv_max_divergence=1.0)[1].method == "balanced"
    with pytest.raises(RequestError, match="no bound on its divergence"):
        prepare(intake, ssv_tier="turbo", ssv_max_divergence=1.0)
    assert prepare(intake, ssv_tier="turbo")[1].method == "turbo"


def test_tier_that_the_bundle_has_not() -> None:
    intake = make(tiers={"premium": TIERS["premium"]})
    with pytest.raises(RequestError, match="turbo"):
        prepare(intake, ssv_tier="turbo")
    assert prepare(intake, ssv_max_divergence=1.0)[1].method == "premium"


# --- options of a tier ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{}", " {} ", '{"max_depth": null}'])
def test_a_policy_without_options_is_the_methods(text: str) -> None:
    assert prepare(ssv_tier="eagle", ssv_policy=text)[1].policy in (None, EAGLE)


def test_options_change_the_methods_policy_and_nothing_else() -> None:
    _, settings = prepare(ssv_tier="eagle", ssv_policy='{"max_pending": 16, "children": [4, 2], "max_depth": 3}')
    assert settings.method == "eagle"
    assert settings.policy == EAGLE.model_copy(update={"max_pending": 16, "children": (4, 2), "max_depth": 3})
    assert Settings.from_json(settings.to_json()) == settings
    _, settings = prepare(ssv_policy='{"max_pending": 4}')  # of premium, and by the bundle's own policy of it
    assert settings.policy == TIERS["premium"].policy.model_copy(update={"max_pending": 4})
    _, settings = prepare(ssv_tier="suffix", ssv_policy='{"longest_match": 12, "min_probability": 0.25}')
    assert settings.policy == SUFFIX.model_copy(update={"longest_match": 12, "min_probability": 0.25})
    assert Settings.from_json(settings.to_json()) == settings


def test_options_of_a_lossless_tier_are_within_any_bound() -> None:
    asked = {"ssv_tier": "eagle", "ssv_policy": '{"max_depth": 2}', "ssv_max_divergence": 0.0}
    assert prepare(**asked)[1].policy == EAGLE.model_copy(update={"max_depth": 2})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ssv_policy": "{"}, "ssv_policy is not valid JSON"),
        ({"ssv_policy": "[1]"}, r'ssv_policy must be a JSON object of options, as {"max_depth": 4}'),
        ({"ssv_policy": '{"max_depth": 1, "max_depth": 2}'}, "ssv_policy has a key twice: max_depth"),
        (
            {"ssv_policy": '{"max_depth": 2}', "ssv_max_divergence": 0.0},
            "ssv_max_divergence leaves open which tier it is: give ssv_tier",
        ),
        ({"ssv_policy": '{"max_depth": 2}', "ssv_tier": "turbo"}, "ssv_policy: turbo is lossy, and its bound on"),
        ({"ssv_policy": '{"depth": 2}', "ssv_tier": "eagle"}, "ssv_policy: depth: there is no such option"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], says: str) -> None:
    refused(says, **given)


@pytest.mark.parametrize("name", ["policy", "num_draft_tokens", "num_speculative_tokens"])
def test_options_under_other_names_are_refused_with_ours(name: str) -> None:
    with pytest.raises(RequestError, match=f"'{name}' is unknown: use ssv_policy"):
        make().prepare(tensors({"text_input": "hello"}), {name: 4})


# --- vLLM's sampling parameters -------------------------------------------------------------------------------------


def test_sampling_parameters_of_numbers_and_of_texts() -> None:
    numbers = {"max_tokens": 64, "min_tokens": 4, "temperature": 0.5, "top_p": 0.25, "top_k": 5, "seed": 9}
    wanted = SamplingParams(temperature=0.5, top_k=5, top_p=0.25, seed=9, max_tokens=64, min_tokens=4)
    assert vllm(numbers) == wanted
    assert vllm({name: str(value) for name, value in numbers.items()}) == wanted
    assert vllm({name: float(value) for name, value in numbers.items()}) == wanted


def test_sampling_parameters_of_lists() -> None:
    found = vllm({"stop_token_ids": [5, "6"], "bad_words": "x", "logit_bias": {"5": 1}, "logprobs": 2, "min_p": "0.5"})
    assert (found.stop_token_ids, found.logit_bias, found.logprobs, found.min_p) == ((5, 6), ((5, 1.0),), 2, 0.5)
    assert found.bad_token_ids[0] == (ord("x") + 10,)
    assert vllm({"prompt_logprobs": 1}).prompt_logprobs == 1
    assert vllm({}, return_log_probs=True).logprobs == 0


def test_biases_are_bounded() -> None:
    biases = json.dumps({str(i): 1 for i in range(1025)})
    with pytest.raises(RequestError, match="logit_bias of 1025 tokens: at most 1024"):
        prepare(make(Limits(400, 100, 20_000)), logit_bias=biases)


FORMS: list[dict[str, Any]] = [
    {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": '{"type": "array"}'},
    {"sampling_parameters": '{"structured_outputs": {"json": {"type": "array"}}}'},
    {"sampling_parameters": '{"guided_decoding": {"json": "{\\"type\\": \\"array\\"}"}}'},
]


@pytest.mark.parametrize("given", FORMS)
def test_forms_of_outputs(given: dict[str, Any]) -> None:
    assert params(**given).grammar == grammar_of("json_schema", '{"type": "array"}')


def test_any_json_object_has_no_guide() -> None:
    assert params(guided_decoding_guide_type="json").grammar == grammar_of("json")
    assert params(guided_decoding_guide_type="").grammar is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"guided_decoding_guide": "a"}, "guided_decoding_guide is given without its type"),
        ({"guided_decoding_guide_type": "xml"}, "'xml' is no form of an output"),
        ({"guided_decoding_guide_type": "regex", "guided_decoding_guide": "("}, "unclosed group"),
        ({"guided_decoding_guide_type": "json", "ignore_eos": True}, "ignore_eos"),
        ({"guided_decoding_guide_type": "json", "sampling_parameters": '{"structured_outputs": {}}'}, "both given"),
        ({"sampling_parameters": '{"structured_outputs": 5}'}, "structured_outputs must be an object"),
        ({"sampling_parameters": '{"structured_outputs": {}}'}, "the form of the output is given by nothing"),
    ],
)
def test_forms_that_are_none(given: dict[str, Any], says: str) -> None:
    refused(says, **given)


def test_a_prompt_of_token_ids() -> None:
    assert prepare(text_input="", input_ids=[5, 299])[0] == (5, 299)
    assert make().prepare(tensors({"input_ids": [5]}))[0] == (5,)


@pytest.mark.parametrize("text", ["", "{}", '{"temperature": null, "stop": null}', " {} "])
def test_sampling_parameters_that_say_nothing(text: str) -> None:
    assert vllm(text, seed=1) == params(seed=1)


def test_neutral_sampling_parameters() -> None:
    given = {"n": 1, "best_of": "1", "min_p": 0, "logprobs": None, "prompt_logprobs": None, "detokenize": True}
    given |= {"skip_special_tokens": "true", "include_stop_str_in_output": "False", "repetition_penalty": "1.0"}
    given |= {"presence_penalty": 0, "frequency_penalty": 0.0, "spaces_between_special_tokens": True}
    assert vllm(given, seed=1) == params(seed=1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"n": 2}, "n 2 is not supported"),
        ({"n": "2"}, "n '2' is not supported"),
        ({"best_of": 3}, "best_of"),
        ({"min_p": 1.1}, "min_p 1.1 must be"),
        ({"logprobs": 25}, "logprobs 25 must be"),
        ({"logprobs": "all"}, "logprobs 'all' is not a number"),
        ({"bad_words": [1]}, "bad_words must be a text or a list of texts"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids 1.5 is not a number"),
        ({"logit_bias": [5]}, "logit_bias must be a JSON object"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"repetition_penalty": "0"}, "repetition_penalty 0.0 must be"),
        ({"lora_name": "x"}, "'lora_name' is not supported; known: max_tokens"),
        ({"": 1}, "'' is not supported"),
        ({"max_token": 1}, "'max_token' is not supported"),
        ({"text_input": "x"}, "'text_input' is not supported"),
        ({"ssv_tier": "turbo"}, "'ssv_tier' is not supported"),
        ({"max_tokens": "many"}, "max_tokens 'many' is not a number"),
        ({"max_tokens": ""}, "max_tokens '' is not a number"),
        ({"max_tokens": 1.5}, "max_tokens 1.5 is not a number"),
        ({"max_tokens": True}, "max_tokens True is not a number"),
        ({"max_tokens": [1]}, r"max_tokens \[1\] is not a number"),
        ({"max_tokens": {"a": 1}}, "is not a number"),
        ({"max_tokens": -1}, "max_tokens -1"),
        ({"max_tokens": 1000}, "at most 100 are possible"),
        ({"temperature": "nan"}, "temperature 'nan' is not a number"),
        ({"temperature": "inf"}, "temperature 'inf' is not a number"),
        ({"temperature": math.nan}, "temperature nan is not a number"),
        ({"temperature": -math.inf}, "temperature -inf is not a number"),
        ({"max_tokens": math.nan}, "max_tokens nan is not a number"),
        ({"max_tokens": math.inf}, "max_tokens inf is not a number"),
        ({"temperature": 10**400}, "is not a number"),
        ({"seed": 10**400}, "is not a number"),
        ({"seed": -1}, "seed -1 must be between"),
        ({"seed": 2.0**70}, "seed .* must be between"),
        ({"ignore_eos": 1}, "ignore_eos 1 is not a flag"),
        ({"ignore_eos": "yes"}, "ignore_eos 'yes' is not a flag"),
        ({"ignore_eos": []}, "is not a flag"),
        ({"stop": 1}, "stop must be a text or a list of texts"),
        ({"stop": ["a", 1]}, "stop must be"),
        ({"stop": {"a": "b"}}, "stop must be"),
    ],
)
def test_sampling_parameters_that_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        vllm(given)


@pytest.mark.parametrize("text", ["[]", "1", '"a"', "null", "true", "NaN"])
def test_sampling_parameters_that_are_no_object(text: str) -> None:
    with pytest.raises(RequestError, match="must be a JSON object"):
        vllm(text)


@pytest.mark.parametrize("text", ["{", "{'a': 1}", "x", '{"max_tokens": 1,}'])
def test_sampling_parameters_that_are_no_json(text: str) -> None:
    with pytest.raises(RequestError, match="sampling_parameters is not valid JSON"):
        vllm(text)


@pytest.mark.parametrize("depth", [50, *range(850, 1010, 3), 100_000])
def test_deeply_nested_sampling_parameters(depth: int) -> None:
    with pytest.raises(RequestError):
        vllm('{"max_tokens": ' + "[" * depth + "]" * depth + "}")


def test_stop_of_sampling_parameters() -> None:
    assert vllm({"stop": "END"}).stop == ("END",)
    assert vllm({"stop": ["a", "", "b"]}).stop == ("a", "b")
    assert vllm({"stop": []}).stop == ()
    assert vllm({"stop": ["a"]}, stop_words=["a"]).stop == ("a",)


@pytest.mark.parametrize("given", ["true", "True", True])
def test_ignore_eos_of_sampling_parameters(given: Any) -> None:
    assert vllm({"ignore_eos": given}).ignore_eos


def test_a_setting_given_twice() -> None:
    assert vllm({"max_tokens": "9"}, max_tokens=9).max_tokens == 9
    with pytest.raises(RequestError, match="max_tokens is given twice, as 8 and in sampling_parameters as 9"):
        vllm({"max_tokens": "9"}, max_tokens=8)
    with pytest.raises(RequestError, match="stop is given twice"):
        vllm({"stop": ["a"]}, stop_words=["b"])


@pytest.mark.parametrize("top_k", [2**63, 10**30, 1e300, "99999999999999999999"])
def test_top_k_beyond_int64_would_end_the_engine(top_k: Any) -> None:
    """It passes, and the decoding thread fails on making a tensor of it: for all requests, and for good."""
    try:
        taken = vllm({"top_k": top_k, "temperature": 1}).top_k
    except RequestError:
        return
    assert taken < 2**63


@pytest.mark.parametrize("seed", [2**53 + 1, 2**63 - 1, LARGEST_SEED])
@pytest.mark.parametrize("kind", [int, str])
def test_large_seeds_of_sampling_parameters_are_exact(seed: int, kind: type) -> None:
    assert vllm({"seed": kind(seed)}).seed == seed


def test_the_same_fraction_as_tensor_and_as_json() -> None:
    """A tensor has fp32's 0.7."""
    assert vllm({"temperature": 0.7, "top_p": "0.9"}, temperature=0.7, top_p=0.9).temperature == pytest.approx(0.7)


def test_a_key_given_twice_in_sampling_parameters() -> None:
    """Nothing is ignored in silence."""
    with pytest.raises(RequestError, match="twice"):
        vllm('{"max_tokens": 9, "max_tokens": 12}')


@pytest.mark.parametrize(
    "given", [{"sampling_parameters": '{"stop": ["' + "x" * 2000 + '"]}'}, {"stop_words": ["x" * 2000]}]
)
def test_stop_words_are_bounded(given: dict[str, Any]) -> None:
    """They are looked for at every token by the thread that decodes for all, and travel with every piece."""
    refused("bytes", **given)


# --- travelling -----------------------------------------------------------------------------------------------------


def test_settings_come_back_from_json() -> None:
    given = {"stop_words": ["é", '"', "\n"], "seed": LARGEST_SEED, "temperature": 0.1, "top_p": 0.3, "top_k": 4}
    given |= {"logit_bias": '{"3": 0.5}', "bad_words": ["é"], "stop_token_ids": [3], "ssv_top_logprobs": 2}
    given |= {"guided_decoding_guide_type": "json", "ssv_return_fates": True, "latency_bound_ms": 12.5}
    _, settings = prepare(stream=True, ssv_timeout=0.1, ssv_tier="balanced", min_tokens=2, **given)
    assert settings.policy is None
    assert Settings.from_json(settings.to_json()) == settings
    assert Settings.from_json(prepare()[1].to_json()).timeout is None


def test_declared_inputs_are_different() -> None:
    assert len(set(declared_inputs())) == len(declared_inputs())


# --- anything -------------------------------------------------------------------------------------------------------


def random_json(rng: random.Random, depth: int = 0) -> Any:
    kinds = 9 if depth < 3 else 7
    kind = rng.randrange(kinds)
    simple = [
        None,
        rng.random() < 0.5,
        rng.choice([0, 1, -1, 2**31, 2**64, 10**40, rng.randrange(-5, 300)]),
        rng.choice([0.0, -0.5, 0.5, 1.0, 1e308, 1e-320, math.nan, math.inf]),
        rng.choice(["", "1", "0.5", "true", "nan", "1e400", "x", "\ud800", "\x00", "é"]),
        "9" * rng.randrange(1, 30),
        [],
    ]
    if kind < 7:
        return simple[kind]
    if kind == 7:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(["role", "content", "stop", "n", "x"]): random_json(rng, depth + 1) for _ in range(3)}


def random_tensors(rng: random.Random) -> dict[str, np.ndarray]:
    names = ["text_input", *rng.sample(declared_inputs(), rng.randrange(6))]
    given: dict[str, Any] = {}
    for name in names:
        length = 1 if rng.random() < 0.97 else rng.choice([0, 2])
        if name in module.STRING_LISTS + module.TOKEN_LISTS:
            length = rng.randrange(4)
        values: list[Any] = []
        for _ in range(length):
            if name == "sampling_parameters":
                keys = [*module._VLLM, *module._VLLM_NEUTRAL, *module._VLLM_NAMES, *module._VLLM_LISTS, "other"]
                held = {rng.choice(keys): random_json(rng) for _ in range(rng.randrange(4))}
                text = json.dumps(held if rng.random() < 0.9 else random_json(rng))
                values.append(text if rng.random() < 0.9 else text[: rng.randrange(len(text) + 1)])
            elif name == "ssv_messages":
                turns = [{"role": rng.choice(["user", "robot", ""]), "content": rng.choice(["", " ", "a" * 500])}]
                values.append(json.dumps(turns if rng.random() < 0.6 else random_json(rng)))
            elif name == "ssv_policy":
                held = {rng.choice([*Policy.model_fields, "x"]): random_json(rng) for _ in range(rng.randrange(3))}
                values.append(json.dumps(held))
            elif name == "ssv_tier":
                values.append(rng.choice([*METHODS, "", "gold", b"\xff"]))
            elif name in module.STRINGS + module.STRING_LISTS:
                values.append(rng.choice([b"", b"a", b"\xc3", b"\x00", "é" * 30, b"x" * rng.randrange(1100)]))
            elif name in module.FLAGS:
                values.append(rng.random() < 0.7)
            elif name == "seed":
                values.append(rng.choice([0, 1, LARGEST_SEED, rng.getrandbits(64)]))
            elif name == "logit_bias":
                values.append(
                    json.dumps({rng.choice(["1", "-2", "x"]): random_json(rng)} if rng.random() < 0.5 else {})
                )
            elif name in module.WHOLE_NUMBERS + module.TOKEN_LISTS:
                values.append(rng.choice([-(2**31), -1, 0, 1, 2, 7, 100, 101, 2**31 - 1, rng.randrange(100)]))
            else:
                values.append(rng.choice([0.0, -0.0, 0.02, 0.5, 1.0, -1.0, 1e-45, 3e38, math.nan, math.inf]))
        given[name] = values
    return tensors(given)


def test_whatever_is_sent_is_served_or_refused() -> None:
    rng, intake, served = random.Random(0), make(), 0
    for _ in range(2000):
        given = random_tensors(rng)
        try:
            prompt, settings = intake.prepare(given)
        except RequestError as error:
            assert str(error)
            continue
        served += 1
        assert 0 < len(prompt) < LIMITS.max_length
        assert len(prompt) + settings.params.max_tokens <= LIMITS.max_length
        assert settings.method in METHODS
        assert Settings.from_json(settings.to_json()) == settings
    assert 100 < served < 1900
