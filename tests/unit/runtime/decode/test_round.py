"""Rounds over table-driven engines: what is lossless equals plain decoding, what is lossy equals a slow twin."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from chi_square import p_value
from drive import start, text_of
from torch import Tensor

from fakes import EOS, NUM_STATES, VOCAB_SIZE, FakeDraft, FakeHeads, FakeTarget, FakeTokenizer
from ssv.bundle.policy import MAX_PENDING, Policy, verify_all
from ssv.runtime.counters import Counters
from ssv.runtime.decode import choice
from ssv.runtime.decode import round as module
from ssv.runtime.decode.membership import PREFILL_CHUNK
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.sampling import Sampling, choose
from ssv.runtime.decode.verify import Verdict
from ssv.runtime.engines.contract import EngineError, StepOutput
from ssv.runtime.llm import LLM
from ssv.runtime.methods import policy_for
from ssv.runtime.request import Output, Request, RequestError, SamplingParams
from ssv.runtime.tokenizer import BundleTokenizer

# Under the names of the tiers, so that one batch can mix them.
LOSSLESS = {
    "premium": Policy(accept_below=0.0, verify_above=0.3, risk_budget=0.6, max_pending=6),
    "balanced": Policy(accept_below=0.0, verify_above=1.0, risk_budget=0.2, max_pending=MAX_PENDING),
    "turbo": Policy(accept_below=0.0, verify_above=0.0, risk_budget=1.0, max_pending=3),
}
LOSSY = {
    "premium": Policy(accept_below=0.0, verify_above=0.3, risk_budget=0.6, max_pending=6),
    "balanced": Policy(accept_below=0.05, verify_above=0.4, risk_budget=0.7, max_pending=8),
    "turbo": Policy(accept_below=0.45, verify_above=0.8, risk_budget=1.0, max_pending=12),
}
MODEL_FREE = ("prompt-lookup", "suffix", "lookahead")
METHODS = [
    ("autoregressive", 5),
    *((method, 5) for method in MODEL_FREE),
    *(("speculative", k) for k in range(1, 8)),
    *((tier, 5) for tier in LOSSLESS),
]
KINDS = ("standalone", "conditioned")
SUBSET = [3, 0, 11, 6, 2, 9, 5]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a dozen numbers only lose by being shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_llm(
    *,
    seed: int = 0,
    kind: str | None = "conditioned",
    tiers: dict[str, Policy] | None = None,
    max_batch: int = 1,
    max_length: int = 40,
    vocab_size: int = VOCAB_SIZE,
    eos_bias: float = 0.0,
    prefill_chunk: int = PREFILL_CHUNK,
    **draft_options: Any,
) -> LLM:
    """Engines with just the room that `MAX_PENDING` promises to be enough."""
    sizes = {"max_batch": max_batch, "max_length": max_length + MAX_PENDING, "vocab_size": vocab_size}
    target = FakeTarget(seed=seed, tap=kind == "conditioned", eos_bias=eos_bias, **sizes)
    draft = FakeDraft(target, seed=seed + 1000, conditioned=kind == "conditioned", **draft_options) if kind else None
    tiers = LOSSLESS if tiers is None else tiers
    return LLM(
        target,
        draft,
        BundleTokenizer(FakeTokenizer()),
        eos_token_ids=[EOS],
        tiers=tiers,
        max_length=max_length,
        prefill_chunk=prefill_chunk,
        heads=FakeHeads(target, noise=0.5),
    )


def target_of(llm: LLM) -> FakeTarget:
    assert isinstance(llm.target, FakeTarget)
    return llm.target


def draft_of(llm: LLM) -> FakeDraft:
    assert isinstance(llm.draft, FakeDraft)
    return llm.draft


def run(llm: LLM, requests: Sequence[Request]) -> list[Output]:
    outputs = llm.generate(requests)
    if llm.draft is not None:
        assert draft_of(llm).wrong_features == 0
    return outputs


def prompt(seed: int) -> tuple[int, ...]:
    """One to six tokens."""
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 7, (1,), generator=generator))
    return tuple(torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist())


def reference(
    target: FakeTarget, prompt_ids: Sequence[int], params: SamplingParams
) -> tuple[tuple[int, ...], str, str]:
    """Plain greedy decoding in plain Python, without a cache."""
    tokens: list[int] = []
    reason = "length"
    decode = FakeTokenizer().decode
    while len(tokens) < params.max_tokens:
        logits_V = target.next_logits([*prompt_ids, *tokens]).clone()
        if len(tokens) < params.min_tokens:
            logits_V[EOS] = -torch.inf
        tokens.append(int(logits_V.argmax()))
        text = decode(tokens, skip_special_tokens=True)
        if (tokens[-1] == EOS and not params.ignore_eos) or any(stop in text for stop in params.stop):
            reason = "stop"
            break
    cut = [text.index(stop) for stop in params.stop if stop in text]
    return tuple(tokens), text[: min(cut, default=len(text))], reason


def assert_lossless(llm: LLM, params: SamplingParams, prompts: Sequence[Sequence[int]]) -> list[Output]:
    """Every method gives what plain greedy decoding gives, all of them side by side."""
    requests = [Request(tuple(p), method, params, k) for p in prompts for method, k in METHODS]
    outputs = run(llm, requests)
    for request, output in zip(requests, outputs, strict=True):
        assert text_of(output) == reference(target_of(llm), request.prompt_ids, params), request
    return outputs


def assert_adds_up(counters: Counters, output: Output) -> None:
    assert counters.emitted == len(output.token_ids)
    assert counters.drafted == counters.accepted + counters.trusted + counters.rolled_back
    assert counters.accepted <= counters.judged <= counters.drafted
    assert counters.target_tokens == counters.drafted + counters.target_passes
    # A token of the target after each pass; only that of the last one may come after the output's end.
    made = 1 + counters.accepted + counters.trusted + counters.target_passes
    assert made - counters.emitted in ((0, 1) if output.finish_reason == "stop" else (0,))
    assert 0 <= counters.first_token_s <= counters.total_s


# --- lossless methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("token_ids", [None, SUBSET], ids=["whole_head", "subset_head"])
@pytest.mark.parametrize("kind", KINDS)
def test_lossless_methods_equal_plain_decoding(kind: str, token_ids: list[int] | None, agreement: float) -> None:
    seed = int(agreement * 10) + 100 * (kind == "conditioned") + 1000 * (token_ids is not None)
    llm = make_llm(seed=seed, kind=kind, token_ids=token_ids, agreement=agreement, max_batch=7)
    for output in assert_lossless(llm, SamplingParams(max_tokens=14), [prompt(seed + i) for i in range(4)]):
        assert_adds_up(output.counters, output)
        assert output.counters.trusted == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "k"), METHODS)
def test_lossless_method_alone(method: str, k: int, kind: str) -> None:
    params = SamplingParams(max_tokens=16)
    for seed in range(3):
        llm = make_llm(seed=seed, kind=kind, eos_bias=-2.0)
        output = run(llm, [Request(prompt(seed), method, params, k)])[0]
        assert text_of(output) == reference(target_of(llm), prompt(seed), params)
        assert_adds_up(output.counters, output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_right_draft_is_never_rolled_back(kind: str, k: int) -> None:
    """Greedy output hides a draft that is fed wrongly; its agreement does not."""
    for seed in range(4):
        llm = make_llm(seed=seed, kind=kind, agreement=1.0, max_batch=2)
        params = SamplingParams(max_tokens=25, ignore_eos=True)
        for output in run(llm, [Request(prompt(seed + i), "speculative", params, k) for i in range(4)]):
            assert output.counters.rolled_back == 0
            assert output.counters.target_passes == -(-24 // (k + 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", range(5))
def test_rejection_at_every_position(kind: str, offset: int) -> None:
    """Right everywhere but at one place of the first block: that is where the pass must cut."""
    prompt_ids = prompt(3)
    disagree_at = len(prompt_ids) + 1 + offset
    llm = make_llm(kind=kind, agreement=1.0, disagree_at=[disagree_at])
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    output = run(llm, [Request(prompt_ids, "speculative", params, 5)])[0]
    assert text_of(output) == reference(target_of(llm), prompt_ids, params)
    assert output.counters.rolled_back == 5 - offset
    passes = [call.position[0] - len(prompt_ids) for call in target_of(llm).calls[1:]]
    assert passes[:3] == [0, offset + 1, offset + 7]


def test_wrong_draft_costs_but_changes_nothing() -> None:
    llm = make_llm(agreement=0.0)
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    output = run(llm, [Request((1, 2), "speculative", params, 4)])[0]
    assert text_of(output) == reference(target_of(llm), (1, 2), params)
    assert output.counters.accepted == 0
    assert output.counters.rolled_back == output.counters.drafted == 5 * 4 + 3 + 2 + 1
    assert output.counters.target_passes == 9


def test_without_draft() -> None:
    llm = make_llm(kind=None)
    output = run(llm, [Request((1, 2), "autoregressive", SamplingParams(max_tokens=9))])[0]
    assert text_of(output) == reference(target_of(llm), (1, 2), SamplingParams(max_tokens=9))
    with pytest.raises(RequestError, match="needs a draft"):
        run(llm, [Request((1, 2), "speculative", SamplingParams(max_tokens=9))])


@pytest.mark.parametrize("kind", KINDS)
def test_draft_without_scorer(kind: str) -> None:
    llm = make_llm(kind=kind, reject_noise=None, max_batch=3)
    assert_lossless(llm, SamplingParams(max_tokens=12), [prompt(1), prompt(2)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_prompt_in_chunks(kind: str, chunk: int) -> None:
    prompts = [tuple(range(1, n + 1)) for n in (10, 1, 2, 3, 5, 6)]
    llm = make_llm(kind=kind, agreement=1.0, max_batch=4, prefill_chunk=chunk)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    for request, output in zip(prompts, run(llm, [Request(p, "speculative", params, 3) for p in prompts]), strict=True):
        assert text_of(output) == reference(target_of(llm), request, params)
        assert output.counters.rolled_back == 0
    sizes = [min(chunk, 10 - start) for start in range(0, 10, chunk)]
    assert [call.tokens for call in target_of(llm).calls[: len(sizes)]] == sizes


def tell_tokens(monkeypatch: pytest.MonkeyPatch, engine: type[FakeTarget | FakeDraft]) -> list[int]:
    """Has steps return the argmax that they find on their way; the list counts those of each step."""
    plain, found = engine.step, []

    def step(self: FakeTarget | FakeDraft, *args: Any, **options: Any) -> StepOutput:
        out = plain(self, *args, **options)
        index_R = out.logits_RV.argmax(dim=1)
        found.append(len(index_R))
        return replace(out, token_R=index_R if self.token_ids_V is None else self.token_ids_V[index_R])

    monkeypatch.setattr(engine, "step", step)
    return found


@pytest.mark.parametrize("min_tokens", [0, 5])
@pytest.mark.parametrize("token_ids", [None, SUBSET], ids=["whole_head", "subset_head"])
@pytest.mark.parametrize("kind", KINDS)
def test_engines_that_tell_their_argmax(
    monkeypatch: pytest.MonkeyPatch, kind: str, token_ids: list[int] | None, min_tokens: int
) -> None:
    """It is the token, unless end-of-sequence is taken from the logits: the same output at the same cost."""
    options = {"kind": kind, "token_ids": token_ids, "agreement": 0.8, "eos_bias": 1.0, "max_batch": 4}
    params = SamplingParams(max_tokens=14, min_tokens=min_tokens)
    prompts = [prompt(i) for i in range(3)]
    expected = assert_lossless(make_llm(**options), params, prompts)
    told = [tell_tokens(monkeypatch, engine) for engine in (FakeTarget, FakeDraft)]
    outputs = assert_lossless(make_llm(**options), params, prompts)
    assert [costs(output) for output in outputs] == [costs(output) for output in expected]
    assert all(sum(counts) > 50 for counts in told)


def test_told_argmax_is_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would pass for nothing if it were not read."""
    plain = FakeTarget.step

    def step(self: FakeTarget, *args: Any, **options: Any) -> StepOutput:
        out = plain(self, *args, **options)
        return replace(out, token_R=torch.full((len(out.logits_RV),), 7))

    monkeypatch.setattr(FakeTarget, "step", step)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    output = run(make_llm(agreement=0.5), [Request((1, 2), "autoregressive", params)])[0]
    assert output.token_ids[1:] == (7,) * 5  # the first is of the prompt, and read off its logits


# --- where an output ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_tokens", range(1, 13))
def test_max_tokens_in_mid_block(kind: str, max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    llm = make_llm(kind=kind, seed=max_tokens, agreement=0.8, max_batch=6)
    for output in assert_lossless(llm, params, [prompt(max_tokens)]):
        assert output.finish_reason == "length"
        assert len(output.token_ids) == max_tokens
        assert_adds_up(output.counters, output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("agreement", [0.5, 1.0])
def test_end_of_sequence_in_the_draft(kind: str, agreement: float) -> None:
    ended = 0
    for seed in range(3):
        llm = make_llm(kind=kind, seed=seed, agreement=agreement, eos_bias=0.3, max_batch=4)
        for output in assert_lossless(llm, SamplingParams(max_tokens=30), [prompt(seed + 10), prompt(seed + 20)]):
            assert EOS not in output.token_ids[:-1]
            assert "<end>" not in output.text
            assert_adds_up(output.counters, output)
            ended += output.finish_reason == "stop" and len(output.token_ids) > 3
    assert ended > 20


@pytest.mark.parametrize("kind", KINDS)
def test_end_of_sequence_rejected(kind: str) -> None:
    """Wherever the draft disagrees it wants to end: nothing may be drafted after that, and the output goes on."""
    llm = make_llm(kind=kind, agreement=0.6, eos_bias=-20.0, max_batch=3)
    draft_of(llm).other_NV[:, EOS] += 50.0
    outputs = assert_lossless(llm, SamplingParams(max_tokens=20), [prompt(5), prompt(6)])
    assert all(output.finish_reason == "length" for output in outputs)
    of_model = [o.counters for o, (method, _) in zip(outputs, METHODS * 2, strict=True) if method not in MODEL_FREE]
    assert all(counters.rolled_back <= counters.target_passes for counters in of_model)
    assert sum(counters.rolled_back for counters in of_model) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_end_of_sequence_asks_for_a_pass(kind: str) -> None:
    llm = make_llm(
        kind=kind, agreement=1.0, tiers={"turbo": Policy(accept_below=1, verify_above=1, risk_budget=1, max_pending=32)}
    )
    params = SamplingParams(max_tokens=38)
    prompt_ids = next(p for p in map(prompt, range(100)) if 5 < len(reference(target_of(llm), p, params)[0]) < 20)
    output = run(llm, [Request(prompt_ids, "turbo", params)])[0]
    assert text_of(output) == reference(target_of(llm), prompt_ids, params)
    assert output.counters.target_passes == 1
    assert output.counters.drafted == len(output.token_ids) - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eos_bias", [0.5, 4.0])
def test_min_tokens(kind: str, eos_bias: float) -> None:
    for min_tokens in (1, 4, 11):
        llm = make_llm(kind=kind, seed=min_tokens, agreement=0.7, eos_bias=eos_bias, max_batch=4)
        params = SamplingParams(max_tokens=12, min_tokens=min_tokens)
        for output in assert_lossless(llm, params, [prompt(min_tokens), prompt(min_tokens + 1)]):
            assert EOS not in output.token_ids[:min_tokens]
            assert len(output.token_ids) >= min_tokens
            assert_adds_up(output.counters, output)


@pytest.mark.parametrize("kind", KINDS)
def test_min_tokens_reaches_a_subset_head(kind: str) -> None:
    """The head's column of end-of-sequence is not its token id."""
    llm = make_llm(kind=kind, agreement=1.0, eos_bias=6.0, token_ids=[4, 5, 6, 0, 7, 8, 9, 10, 11, 1, 2, 3])
    params = SamplingParams(max_tokens=12, min_tokens=8)
    output = run(llm, [Request((1, 2), "speculative", params, 4)])[0]
    assert text_of(output) == reference(target_of(llm), (1, 2), params)
    assert output.counters.rolled_back == 0


@pytest.mark.parametrize("kind", KINDS)
def test_ignore_eos(kind: str) -> None:
    llm = make_llm(kind=kind, agreement=0.8, eos_bias=2.0, max_batch=4)
    outputs = assert_lossless(llm, SamplingParams(max_tokens=15, ignore_eos=True), [prompt(1), prompt(2)])
    assert all(len(output.token_ids) == 15 and EOS in output.token_ids for output in outputs)


STOPS = [("END",), ("aEND", "b"), ("€",), ("ab c", "E"), ("Eé", "bab", "ND"), ("not there",), ("aa", "abaE")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", STOPS, ids=repr)
def test_stop_strings(kind: str, stop: tuple[str, ...]) -> None:
    """Across the borders of tokens and of blocks."""
    params = SamplingParams(max_tokens=20, stop=stop, ignore_eos=True)
    for seed in range(2):
        llm = make_llm(kind=kind, seed=seed, agreement=0.9, max_batch=6, eos_bias=-3.0)
        for output in assert_lossless(llm, params, [prompt(seed)]):
            assert not any(s in output.text for s in stop)
            assert_adds_up(output.counters, output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", range(1, 9))
def test_stop_string_completed_in_mid_block(kind: str, at: int) -> None:
    """The tokens before and after it are of one block; what comes after it is dropped."""
    prompt_ids = (3, 1)
    steered = [1, 2, 2, 1, 2, 1, 1, 2, 2, 1]
    steered[at - 1 : at + 1] = [5, 6]
    llm = make_llm(kind=kind, agreement=1.0)
    target = target_of(llm)
    for i, token in enumerate(steered):
        state = target.state([*prompt_ids, *steered[:i]])
        for table in (target.logits_NV, draft_of(llm).same_NV):
            table[state, token] = 50.0
    params = SamplingParams(max_tokens=10, stop=("END",), ignore_eos=True)
    output = run(llm, [Request(prompt_ids, "speculative", params, 7)])[0]
    assert output.token_ids == tuple(steered[: at + 1])
    assert output.text == FakeTokenizer().decode(steered[: at - 1])
    assert output.finish_reason == "stop"
    # The stop string asks for its pass: nothing is drafted after it.
    assert output.counters.rolled_back == 0
    assert output.counters.drafted <= at


def test_finish_reason_when_the_last_token_holds_a_stop_string_and_half_a_character() -> None:
    llm = make_llm()
    target = target_of(llm)
    target.logits_NV[target.state((1, 2)), 10] = 50.0
    params = SamplingParams(max_tokens=1, stop=("x",))
    output = run(llm, [Request((1, 2), "autoregressive", params)])[0]
    assert text_of(output) == ((10,), "", "stop")


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_batch", [2, 3, 7])
def test_result_does_not_depend_on_the_batch(kind: str, max_batch: int) -> None:
    """More requests than rows, every method, greedy and sampled, ending at different times."""
    options = {"kind": kind, "tiers": LOSSY, "eos_bias": 0.5, "noise": 0.5, "agreement": 0.8}
    requests = []
    for i, (method, k) in enumerate(METHODS * 2):
        temperature = (0.0, 0.7, 1.3)[i % 3]
        params = SamplingParams(
            temperature=temperature, seed=i, max_tokens=2 + i % 11, min_tokens=i % 2, top_k=(0, 5)[i % 2]
        )
        requests.append(Request(prompt(i), method, params, k))
    batched = run(make_llm(max_batch=max_batch, **options), requests)
    for request, output in zip(requests, batched, strict=True):
        alone = run(make_llm(max_batch=1, **options), [request])[0]
        assert text_of(output) == text_of(alone)
        assert costs(output) == costs(alone)
        assert_adds_up(output.counters, output)


def costs(output: Output) -> Counters:
    return replace(output.counters, first_token_s=0.0, total_s=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_engines_can_be_used_again(kind: str) -> None:
    """A second run over caches full of the first one's entries."""
    llm = make_llm(kind=kind, max_batch=3)
    params = SamplingParams(max_tokens=10)
    for first in (0, 6, 12):
        assert_lossless(llm, params, [prompt(first), prompt(first + 1)])


def test_conditioned_draft_when_the_batch_grows_by_a_row_without_draft() -> None:
    """The features of the last pass are of fewer rows than the next round has."""
    llm = make_llm(max_batch=2)
    long, short = SamplingParams(max_tokens=12, ignore_eos=True), SamplingParams(max_tokens=1)
    requests = [
        Request((1, 2), "speculative", long, 3),
        Request((3,), "autoregressive", short),
        Request((4, 5), "autoregressive", long),
    ]
    for request, output in zip(requests, run(llm, requests), strict=True):
        assert text_of(output) == reference(target_of(llm), request.prompt_ids, request.params)


@pytest.mark.parametrize("kind", KINDS)
def test_engines_are_told_what_is_padding(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Rows have tokens up to the last that is gathered, and none where none is."""
    counts: dict[type, list[list[int]]] = {FakeTarget: [], FakeDraft: []}

    def told(engine: type[FakeTarget | FakeDraft]) -> Callable[..., StepOutput]:
        plain = engine.step

        def step(self: FakeTarget | FakeDraft, ids_BT: Tensor, *args: Any, **options: Any) -> StepOutput:
            out = plain(self, ids_BT, *args, **options)
            if (count_B := options.get("count_B")) is not None:
                counts[engine].append(count_B.tolist())
                last = {row: at for row, at in self.calls[-1].gathered}
                position = self.calls[-1].position
                assert counts[engine][-1] == [last[b] - position[b] + 1 if b in last else 0 for b in range(len(ids_BT))]
            return out

        return step

    for engine in counts:
        monkeypatch.setattr(engine, "step", told(engine))
    llm = make_llm(kind=kind, max_batch=4, tiers=LOSSY)
    outputs = run(llm, [Request(prompt(i), m, SamplingParams(max_tokens=12), k) for i, (m, k) in enumerate(METHODS)])
    assert sum(map(sum, counts[FakeTarget])) == sum(output.counters.target_tokens for output in outputs)
    drafted = [o.counters.drafted for o, (method, _) in zip(outputs, METHODS, strict=True) if method not in MODEL_FREE]
    assert sum(map(sum, counts[FakeDraft])) >= sum(drafted) > 0
    assert any(0 in each for each in counts[FakeDraft])


def test_stream_gives_every_token_once() -> None:
    llm = make_llm(max_batch=3, tiers=LOSSY)
    requests = [
        Request(prompt(i), method, SamplingParams(max_tokens=12, ignore_eos=True), k)
        for i, (method, k) in enumerate(METHODS)
    ]
    outputs = run(make_llm(max_batch=3, tiers=LOSSY), requests)
    chunks = list(llm.stream(requests))
    for index, output in enumerate(outputs):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert sum((chunk.token_ids for chunk in mine), ()) == output.token_ids
        assert "".join(chunk.text for chunk in mine) == output.text
        assert [chunk.finish_reason for chunk in mine] == [None] * (len(mine) - 1) + [output.finish_reason]
        assert replace(mine[-1].counters, first_token_s=0.0, total_s=0.0) == costs(output)
        assert all(chunk.token_ids for chunk in mine)


def test_stream_leaves_its_caller_out_of_inference_mode() -> None:
    stream = make_llm().stream([Request((1, 2), "autoregressive", SamplingParams(max_tokens=4, ignore_eos=True))])
    next(stream)
    inside = torch.is_inference_mode_enabled()
    list(stream)
    assert not inside


@pytest.mark.parametrize("kind", KINDS)
def test_cache_of_the_promised_size_is_enough(kind: str) -> None:
    """Up to the last position, beside rows that pad."""
    llm = make_llm(kind=kind, max_length=40, max_batch=3, agreement=1.0)
    full = SamplingParams(max_tokens=38, ignore_eos=True)
    prompts = [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]
    requests = [
        Request(p, m, full, k)
        for p, (m, k) in zip(prompts, [("speculative", 32), ("autoregressive", 5), ("balanced", 5)] * 2, strict=False)
    ]
    for request, output in zip(requests, run(llm, requests), strict=True):
        assert text_of(output) == reference(target_of(llm), request.prompt_ids, full)


def test_requests_that_cannot_run_are_refused_before_any_starts() -> None:
    llm = make_llm(max_length=20)
    good = Request((1, 2), "speculative", SamplingParams(max_tokens=5))
    refused = [
        (replace(good, prompt_ids=()), "prompt is empty"),
        (replace(good, params=SamplingParams(max_tokens=19)), "max_tokens 19 exceed the cache of 20"),
        (replace(good, num_draft_tokens=65), "num_draft_tokens 65: .* 1 to 64"),
        (replace(good, policy=verify_all(65)), "max_pending 65 of the policy: at most 64 tokens"),
        (replace(good, num_draft_tokens=0), "num_draft_tokens 0"),
        (
            replace(good, method="fast"),
            "unknown method 'fast'; known: autoregressive, lookahead, prompt-lookup, suffix, medusa, medusa-typical, "
            "specinfer, eagle, speculative, premium",
        ),
    ]
    for request, message in refused:
        with pytest.raises(RequestError, match=message):
            llm.generate([good, request])
    with pytest.raises(RequestError, match=r"no tier 'turbo' \(it has: premium\)"):
        make_llm(tiers={"premium": LOSSLESS["premium"]}).generate([replace(good, method="turbo")])
    assert target_of(llm).calls == []


def test_a_row_that_cannot_run_does_not_begin() -> None:
    llm = make_llm(max_length=20)
    batch = DecodeBatch(llm.target, llm.draft, [EOS], llm.max_length, heads=llm.heads)
    row = Row(SamplingParams(max_tokens=19), LOSSLESS["turbo"], lambda _: False, Counters())
    with pytest.raises(RequestError, match="max_tokens 19 exceed the cache of 20"):
        batch.members.begin((1, 2), row)
    assert start(batch, (1,), row) == reference(target_of(llm), (1,), row.params)[0][0]


def test_chat_ids() -> None:
    llm = make_llm()
    assert llm.chat_ids("ab c") == (3, 4, EOS, 3)
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.chat_ids(" \n")


# --- lossy tiers ----------------------------------------------------------------------------------------------------


@dataclass
class Twin:
    """What the slow twin did.

    Attributes:
        passes: first position, number of tokens and gathered positions of each target step after the prompt's.
        releases: tokens that could leave before each pass.
    """

    tokens: list[int]
    counters: Counters
    passes: list[tuple[int, int, list[int]]] = field(default_factory=list)
    releases: list[list[int]] = field(default_factory=list)


def slow_twin(
    target: FakeTarget,
    draft: FakeDraft,
    prompt_ids: Sequence[int],
    policy: Policy,
    max_tokens: int,
    min_tokens: int = 0,
) -> Twin:
    """DESIGN.md section 2 for one greedy request, in plain Python and without a cache."""

    def argmax(logits_V: Tensor, eos: int | None, prefix: Sequence[int]) -> int:
        early = len(prefix) - len(prompt_ids) < min_tokens
        return max((i for i in range(len(logits_V)) if not (early and i == eos)), key=lambda i: float(logits_V[i]))

    def choice(prefix: Sequence[int]) -> int:
        return argmax(target.next_logits(prefix), EOS, prefix)

    ids = draft.token_ids_V.tolist() if draft.token_ids_V is not None else list(range(target.vocab_size))
    draft_eos = ids.index(EOS) if EOS in ids else None
    tokens = [*prompt_ids, choice(prompt_ids)]
    twin = Twin(tokens, Counters(prompt_tokens=len(prompt_ids)))
    counters = twin.counters
    while tokens[-1] != EOS and len(tokens) - len(prompt_ids) < max_tokens:
        rest = max_tokens - (len(tokens) - len(prompt_ids))
        pending: list[int] = []
        risks: list[float] = []
        safe = 1.0
        asks = False
        while len(pending) < min(policy.max_pending, rest - 1) and not asks:
            logits_V, risk = draft.next(tokens + pending)
            best = argmax(logits_V, draft_eos, tokens + pending)
            if best != int(logits_V.argmax()):  # the scorer speaks of another token
                risk = 1 - float(logits_V.index_fill(0, torch.tensor([draft_eos]), -torch.inf).softmax(0)[best])
            pending.append(ids[best])
            risks.append(risk)
            if risk >= policy.accept_below:
                safe *= 1 - risk
                asks = risk > policy.verify_above
            asks = asks or 1 - safe > policy.risk_budget or pending[-1] == EOS
        judged = [i for i, risk in enumerate(risks) if risk >= policy.accept_below]
        rejected = next((i for i in judged if pending[i] != choice(tokens + pending[:i])), None)
        kept = len(pending) if rejected is None else rejected
        start = len(tokens) - 1
        twin.passes.append((start, len(pending) + 1, [start + i for i in [*judged, len(pending)]]))
        twin.releases.append(pending[: min(judged[0] if judged else len(pending), max(len(pending) - 1, 0))])
        counters.drafted += len(pending)
        counters.judged += len(judged)
        counters.accepted += sum(i < kept for i in judged)
        counters.trusted += kept - sum(i < kept for i in judged)
        counters.rolled_back += len(pending) - kept
        counters.target_passes += 1
        counters.target_tokens += len(pending) + 1
        counters.passes_by_kept[kept] += 1
        tokens += [*pending[:kept], choice(tokens + pending[:kept])]
        if EOS in tokens[start + 1 :]:
            del tokens[tokens.index(EOS, start + 1) + 1 :]
    del tokens[: len(prompt_ids)]
    counters.emitted = len(tokens)
    return twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token_ids", [None, SUBSET], ids=["whole_head", "subset_head"])
@pytest.mark.parametrize("tier", LOSSY)
def test_tiers_equal_the_slow_twin(tier: str, token_ids: list[int] | None, kind: str) -> None:
    """Output, counters, when the target runs, over what, and which rows of it are gathered."""
    trusted = 0
    for seed in range(6):
        llm = make_llm(kind=kind, seed=seed, token_ids=token_ids, agreement=0.8, tiers=LOSSY, eos_bias=-1.0)
        target, draft = target_of(llm), draft_of(llm)
        prompt_ids = prompt(seed)
        twin = slow_twin(target, draft, prompt_ids, LOSSY[tier], 30)
        output = run(llm, [Request(prompt_ids, tier, SamplingParams(max_tokens=30))])[0]
        assert list(output.token_ids) == twin.tokens
        assert costs(output) == twin.counters
        assert_adds_up(output.counters, output)
        passes = [(call.position[0], call.tokens, [at for _, at in call.gathered]) for call in target.calls[1:]]
        assert passes == twin.passes
        trusted += output.counters.trusted
    assert (trusted > 0) == (tier != "premium")


@pytest.mark.parametrize("kind", KINDS)
def test_min_tokens_of_a_lossy_tier(kind: str) -> None:
    """Tokens that have been released count once."""
    for seed in range(8):
        llm = make_llm(kind=kind, seed=seed, agreement=0.9, tiers=LOSSY, eos_bias=3.0, max_length=60)
        target, draft = target_of(llm), draft_of(llm)
        twin = slow_twin(target, draft, (1, 2), LOSSY["turbo"], 50, 20)
        output = run(llm, [Request((1, 2), "turbo", SamplingParams(max_tokens=50, min_tokens=20))])[0]
        assert list(output.token_ids) == twin.tokens
        assert output.counters.drafted == twin.counters.drafted
        assert EOS not in output.token_ids[:20]


def test_lossy_output_differs() -> None:
    """The tests above would pass for nothing if trusting changed nothing."""
    llm = make_llm(agreement=0.5, tiers=LOSSY, eos_bias=-3.0, max_batch=4)
    params = SamplingParams(max_tokens=30)
    outputs = run(llm, [Request(prompt(i), "turbo", params) for i in range(4)])
    assert any(text_of(o) != reference(target_of(llm), prompt(i), params) for i, o in enumerate(outputs))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_after_a_rejection_is_dropped(kind: str) -> None:
    """The first token is judged and wrong; those after it are trusted."""
    prompt_ids = (1, 2, 3)
    llm = make_llm(
        kind=kind,
        agreement=1.0,
        disagree_at=[4],
        reject_noise=0.0,
        tiers={"turbo": Policy(accept_below=0.45, verify_above=1.0, risk_budget=1.0, max_pending=5)},
    )
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    output = run(llm, [Request(prompt_ids, "turbo", params)])[0]
    assert text_of(output) == reference(target_of(llm), prompt_ids, params)
    first_pass = target_of(llm).calls[1]
    assert [at for _, at in first_pass.gathered] == [3, 8]
    assert output.counters.rolled_back == 5


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_release_gives_a_trusted_prefix_before_the_pass(kind: str) -> None:
    released = 0
    for seed in range(6):
        llm = make_llm(kind=kind, seed=seed, agreement=0.8, eos_bias=-2.0)
        target, draft = target_of(llm), draft_of(llm)
        twin = slow_twin(target, draft, prompt(seed), LOSSY["turbo"], 25)
        row = Row(SamplingParams(max_tokens=25), LOSSY["turbo"], lambda _: False, Counters())
        batch = DecodeBatch(target, draft, [EOS], llm.max_length)
        tokens = [start(batch, prompt(seed), row)]
        for expected in twin.releases:
            row.counters.emitted = len(tokens)
            batch.draft()
            steps = len(target.calls)
            pending = row.first_path
            gained = batch.release()[0]
            assert gained == expected == pending[: len(gained)]
            assert len(target.calls) == steps
            released += len(gained)
            row.counters.emitted += len(gained)
            tokens += gained + batch.verify()[0]
        assert tokens[: len(twin.tokens)] == twin.tokens
    assert released > 10


def test_released_tokens_leave_before_the_pass() -> None:
    llm = make_llm(agreement=1.0, reject_noise=0.0, tiers={"turbo": LOSSY["turbo"]})
    steps_at = [
        (len(chunk.token_ids), len(target_of(llm).calls))
        for chunk in llm.stream([Request((1, 2), "turbo", SamplingParams(max_tokens=14, ignore_eos=True))])
    ]
    assert steps_at == [(1, 1), (11, 1), (2, 2)]


def test_a_latency_bound_asks_for_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the time since the pass before, on a clock that draft steps make go."""
    llm = make_llm(agreement=1.0)
    monkeypatch.setattr(time, "monotonic", lambda: float(len(draft_of(llm).calls)))
    params = SamplingParams(max_tokens=15, ignore_eos=True, latency_bound_ms=3000.0)
    output = run(llm, [Request((1, 2), "speculative", params, 7)])[0]
    assert text_of(output) == reference(target_of(llm), (1, 2), params)
    assert [call.tokens for call in target_of(llm).calls[1:]] == [4, 4, 4, 2]


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_output(kind: str) -> None:
    options = {"kind": kind, "noise": 0.7, "eos_bias": -3.0}
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=12) for seed in (1, 1, 2, 3)]
    requests = [Request((1, 2), "speculative", p, 4) for p in params]
    outputs = run(make_llm(max_batch=4, **options), requests)
    assert text_of(outputs[0]) == text_of(outputs[1])
    assert len({output.token_ids for output in outputs}) == 3
    for request, output in zip(requests, outputs, strict=True):
        assert text_of(run(make_llm(**options), [request])[0]) == text_of(output)


@pytest.mark.parametrize("method", ["autoregressive", *MODEL_FREE, "speculative", "premium", "turbo"])
def test_every_token_is_chosen_with_the_noise_of_its_place(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """What is proposed and what would have been right, in every pass over it; released and trusted tokens count."""
    made: list[tuple[Tensor, list[int], list[int]]] = []

    def recording(logits_RV: Tensor, sampling: Sampling, token_V: Tensor | None = None) -> Tensor:
        made.append((logits_RV, sampling.seed_R.tolist(), sampling.position_R.tolist()))
        return choose(logits_RV, sampling, token_V)

    monkeypatch.setattr(choice, "choose", recording)
    llm = make_llm(max_batch=3, agreement=0.8, tiers=LOSSY)
    known = {}  # logits of the fake target, by what gives them
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True) for seed in (5, 6, 7)]
    prompts = [(1, 2), (3, 4, 5), (6,)]
    outputs = run(llm, [Request(ids, method, p, 4) for ids, p in zip(prompts, params, strict=True)])
    for ids, p, output in zip(prompts, params, outputs, strict=True):
        for n in range(12):
            row = target_of(llm).next_logits([*ids, *output.token_ids[:n]])
            known[p.seed, len(ids) + n] = row
    places = {(seed, position) for _, seeds, positions in made for seed, position in zip(seeds, positions, strict=True)}
    assert {(p.seed, len(ids)) for p, ids in zip(params, prompts, strict=True)} <= places <= set(known)
    # The last choice of a place is of the text that was kept, unless it was trusted.
    last = {
        (seed, position): logits_V
        for logits_RV, seeds, positions in made
        if logits_RV.shape[1] == target_of(llm).vocab_size
        for logits_V, seed, position in zip(logits_RV, seeds, positions, strict=True)
    }
    right = [place for place, logits_V in known.items() if place in last and torch.equal(last[place], logits_V)]
    assert len(right) > (30 if method != "turbo" else 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token_ids", [None, SUBSET], ids=["whole_head", "subset_head"])
def test_a_seed_gives_the_same_text_with_every_lossless_method(kind: str, token_ids: list[int] | None) -> None:
    """Alone, in a batch, beside lossy company, and where end-of-sequence is held back."""
    settings = [(0.5, 0, 1.0), (1.0, 0, 0.8), (1.3, 7, 1.0), (0.9, 12, 0.9)]
    accepted = 0
    for seed in range(6):
        temperature, top_k, top_p = settings[seed % len(settings)]
        params = SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, seed=2**64 - 1 - seed, max_tokens=20, min_tokens=6
        )
        options = {
            "kind": kind,
            "seed": seed,
            "token_ids": token_ids,
            "agreement": 0.8,
            "eos_bias": 0.0,
            "tiers": LOSSY,
        }
        plain = text_of(run(make_llm(**options), [Request((1, 2), "autoregressive", params)])[0])
        methods = ["speculative", "premium", "turbo", "autoregressive", *MODEL_FREE, "medusa"]
        outputs = run(make_llm(max_batch=8, **options), [Request((1, 2), method, params, 4) for method in methods])
        for method, output in zip(methods, outputs, strict=True):
            if method != "turbo":
                assert text_of(output) == plain
                accepted += output.counters.accepted
                assert text_of(run(make_llm(**options), [Request((1, 2), method, params, 4)])[0]) == plain
    assert accepted > 50


def test_temperature_towards_zero_is_greedy() -> None:
    params = SamplingParams(temperature=1e-4, max_tokens=15, ignore_eos=True)
    llm = make_llm(max_batch=4)
    assert_lossless(llm, params, [prompt(1), prompt(2)])


def test_top_k_of_one_is_greedy() -> None:
    params = SamplingParams(temperature=2.0, top_k=1, max_tokens=15, ignore_eos=True)
    assert_lossless(make_llm(max_batch=4), params, [prompt(1), prompt(2)])


SMALL_VOCAB = 5
SMALL_TIERS = {"premium": Policy(accept_below=0.0, verify_above=0.55, risk_budget=0.4, max_pending=3)}


def exact_distribution(
    target: FakeTarget, prompt_ids: Sequence[int], params: SamplingParams
) -> dict[tuple[int, ...], float]:
    """Probability of every output of the autoregressive chain."""
    done: dict[tuple[int, ...], float] = {}
    grown: dict[tuple[int, ...], float] = {(): 1.0}
    for length in range(params.max_tokens):
        prefixes, grown = grown, {}
        for prefix, mass in prefixes.items():
            logits_V = target.next_logits([*prompt_ids, *prefix]).double().clone()
            if length < params.min_tokens:
                logits_V[EOS] = -torch.inf
            for token, p in enumerate((logits_V / params.temperature).softmax(dim=0).tolist()):
                ended = token == EOS or length + 1 == params.max_tokens
                (done if ended else grown)[*prefix, token] = mass * p
    return done


def sampled_p_value(llm: LLM, method: str, k: int, params: SamplingParams, count: int) -> float:
    """Of rows that all join before the first round: the loop lets one join a round, and would run few of them side by
    side."""
    prompt_ids, policy = (3,), policy_for(method, llm.tiers, k)
    expected = exact_distribution(target_of(llm), prompt_ids, params)
    counts = dict.fromkeys(expected, 0)
    for first in range(0, count, llm.target.max_batch):
        batch = DecodeBatch(llm.target, llm.draft, [EOS], llm.max_length, heads=llm.heads)
        seeds = range(first, min(first + llm.target.max_batch, count))
        rows = [Row(replace(params, seed=seed), policy, lambda _: False, Counters()) for seed in seeds]
        outputs = [[start(batch, prompt_ids, row)] for row in rows]
        while min(map(len, outputs)) < params.max_tokens:
            for row, output in zip(rows, outputs, strict=True):
                row.counters.emitted = len(output)
            batch.draft()
            for output, gained in zip(outputs, batch.verify(), strict=True):
                output += gained
        for output in outputs:
            end = output.index(EOS) + 1 if EOS in output else len(output)
            counts[tuple(output[: min(end, params.max_tokens)])] += 1
    assert draft_of(llm).wrong_features == 0
    return p_value(list(counts.values()), list(expected.values()))


def small_llm(kind: str, **options: Any) -> LLM:
    settings = {"seed": 5, "agreement": 0.5, "noise": 1.0, "tiers": SMALL_TIERS, "eos_bias": -0.5} | options
    return make_llm(kind=kind, vocab_size=SMALL_VOCAB, max_batch=64, max_length=10, **settings)


@pytest.mark.parametrize(
    ("kind", "method", "k", "token_ids"),
    [
        # The draft cannot propose tokens 2 and 4: they come of rejections and bonus rows alone.
        ("conditioned", "speculative", 2, [3, 0, 1]),
        ("standalone", "premium", 5, None),
        *(("standalone", method, 0, None) for method in (*MODEL_FREE, "medusa")),
    ],
)
def test_sampled_output_has_the_target_distribution(
    kind: str, method: str, k: int, token_ids: list[int] | None
) -> None:
    params = SamplingParams(temperature=0.9, max_tokens=4)
    assert sampled_p_value(small_llm(kind, token_ids=token_ids), method, k, params, 4000) > 1e-4


def test_broken_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """That accepts every drafted token."""
    monkeypatch.setattr(
        module, "walk", lambda tree, judged, choices: Verdict(tuple(range(len(tree))), len(tree), choices[-1])
    )
    params = SamplingParams(temperature=0.9, max_tokens=4)
    assert sampled_p_value(small_llm("standalone"), "speculative", 2, params, 800) < 1e-4


def test_noise_that_does_not_change_with_the_place_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(logits_RV: Tensor, sampling: Sampling, token_V: Tensor | None = None) -> Tensor:
        return choose(logits_RV, replace(sampling, position_R=torch.zeros_like(sampling.position_R)), token_V)

    monkeypatch.setattr(choice, "choose", stuck)
    params = SamplingParams(temperature=0.9, max_tokens=4)
    assert sampled_p_value(small_llm("standalone"), "autoregressive", 0, params, 800) < 1e-4


def test_fake_states_do_not_collide() -> None:
    """The tests rest on prefixes that differ having different logits."""
    target = FakeTarget()
    states = [target.state([a, b, c]) for a in range(6) for b in range(6) for c in range(6)]
    assert len(set(states)) > 0.8 * min(len(states), NUM_STATES)
    assert partial(target.state)([1, 2]) != target.state([2, 1])


# --- what cannot run ------------------------------------------------------------------------------------------------


def damaged(where: str) -> LLM:
    """Engines of which one gives logits that are not numbers: the target for the first token or from then on, or the
    draft."""
    llm = make_llm(agreement=1.0, max_batch=2)
    target, draft = target_of(llm), draft_of(llm)
    if where == "draft":
        draft.same_NV.fill_(torch.nan)
        draft.other_NV.fill_(torch.nan)
    else:
        at_prompt_N = torch.arange(NUM_STATES) == target.state((1, 2))
        target.logits_NV[at_prompt_N if where == "first" else ~at_prompt_N] = torch.nan
    return llm


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=["plain", "top_k", "top_p"])
@pytest.mark.parametrize(
    ("where", "method", "target_steps"),
    [
        ("first", "speculative", 1),
        ("first", "autoregressive", 1),
        ("draft", "speculative", 1),
        ("verify", "speculative", 2),
        ("verify", "autoregressive", 2),
    ],
)
def test_sampling_from_what_is_not_a_number(
    where: str, method: str, target_steps: int, settings: dict[str, Any]
) -> None:
    llm = damaged(where)
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=9, ignore_eos=True, **settings)
    sampled = Request((1, 2), method, params, 3)
    with pytest.raises(EngineError, match="an engine gave logits that are not numbers: its weights are damaged"):
        llm.generate([sampled])
    assert len(target_of(llm).calls) == target_steps
    # Nor does a greedy request beside it hide it.
    greedy = Request((1, 2), method, SamplingParams(max_tokens=9, ignore_eos=True), 3)
    with pytest.raises(EngineError, match="not numbers"):
        llm.generate([greedy, sampled])


def test_one_stream_at_a_time() -> None:
    """Two would write over each other's cache rows."""
    llm = make_llm()
    request = Request((1, 2), "premium", SamplingParams(max_tokens=9, ignore_eos=True))
    first = llm.stream([request])
    begun = next(first)
    with pytest.raises(RequestError, match="another stream of this LLM is not finished"):
        next(llm.stream([request]))
    tokens = [*begun.token_ids, *(token for chunk in first for token in chunk.token_ids)]
    assert tuple(tokens) == reference(target_of(llm), (1, 2), request.params)[0]
    unfinished = llm.stream([request])
    next(unfinished)
    unfinished.close()
    assert run(llm, [request])[0].token_ids == tuple(tokens)


def test_lossy_tier_needs_a_scorer() -> None:
    llm = make_llm(reject_noise=None, tiers=LOSSY)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    with pytest.raises(RequestError, match="without a scorer"):
        llm.generate([Request((1, 2), "turbo", params)])
    assert text_of(run(llm, [Request((1, 2), "premium", params)])[0]) == reference(target_of(llm), (1, 2), params)


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_prompt_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(RequestError, match=f"outside the target's vocabulary of {VOCAB_SIZE}"):
        make_llm().generate([Request((1, token), "premium", SamplingParams(max_tokens=9))])


def test_draft_with_fewer_rows_than_the_target() -> None:
    target = FakeTarget(max_batch=2)
    draft = FakeDraft(target)
    draft.max_batch = 1
    with pytest.raises(EngineError, match="1 rows, the target's 2"):
        DecodeBatch(target, draft, [EOS], 40)


@pytest.mark.parametrize("gather", [[-1], [4], [0, 99]])
def test_gathered_rows_outside_the_step(gather: list[int]) -> None:
    ids, position = torch.tensor([[1, 2, 3, 4]]), torch.tensor([0], dtype=torch.int32)
    with pytest.raises(EngineError, match=r"gather_rows .* outside the step's 4 rows"):
        FakeTarget().step(ids, position, torch.tensor(gather))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pass_tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_share_a_pass_draft_less(kind: str, pass_tokens: int, temperature: float) -> None:
    """Output that is lossless anyway is the same; no pass is larger than it has to be."""
    llm = make_llm(kind=kind, agreement=0.9, max_batch=4)
    llm.pass_tokens = pass_tokens
    params = SamplingParams(max_tokens=14, ignore_eos=True, temperature=temperature, seed=3)
    prompts = [prompt(i) for i in range(4)]
    plain = run(make_llm(kind=kind, max_batch=4), [Request(p, "autoregressive", params) for p in prompts])
    outputs = run(llm, [Request(p, "speculative", params, 5) for p in prompts])
    assert list(map(text_of, outputs)) == list(map(text_of, plain))
    rounds = [call for call in target_of(llm).calls if len(call.position) == 4]
    assert rounds and all(call.tokens <= max(pass_tokens // 4, 2) for call in rounds)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_what_depends_on_when_it_is_verified_drafts_as_much_as_ever(kind: str, temperature: float) -> None:
    """The text of a lossy tier must not depend on the load."""
    outputs = []
    for pass_tokens in (None, 1):
        llm = make_llm(kind=kind, max_batch=4, agreement=0.6)
        llm.pass_tokens = pass_tokens
        params = SamplingParams(max_tokens=14, ignore_eos=True, temperature=temperature, seed=3)
        outputs.append([o.token_ids for o in run(llm, [Request(prompt(i), "turbo", params, 5) for i in range(4)])])
    assert outputs[0] == outputs[1]
