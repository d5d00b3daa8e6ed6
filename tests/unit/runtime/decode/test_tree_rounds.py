"""Rounds that draft trees: the text of plain decoding, in every shape and company; and what is wrong is noticed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from chi_square import p_value
from drive import run, text_of
from growing import GrowingFakeDraft

from fakes import EOS, VOCAB_SIZE, FakeDraft, FakeTarget, FakeTokenizer
from ssv.bundle.policy import MAX_PENDING, Policy, verify_all
from ssv.bundle.profile import Costs, Curve
from ssv.runtime.decode import round as module
from ssv.runtime.decode.tree import Tree, branches_of
from ssv.runtime.decode.verify import Verdict, walk
from ssv.runtime.engines.contract import Branches
from ssv.runtime.llm import LLM
from ssv.runtime.methods import SPECINFER
from ssv.runtime.request import Request, SamplingParams
from ssv.runtime.tokenizer import BundleTokenizer

SHAPES = {
    "one of two": verify_all(2, children=(2,)),
    "bushy": verify_all(12, children=(4,), beam=3, max_depth=3),
    "static": verify_all(20, children=(1, 1, 3, 1), beam=3, max_depth=8),
    "eagle": verify_all(60, children=(10,), beam=10, max_depth=7),
    "narrow": verify_all(MAX_PENDING, children=(2,), beam=2),
    "all": verify_all(MAX_PENDING, children=(VOCAB_SIZE,), beam=1, max_depth=6),
    "pays": verify_all(MAX_PENDING, children=(4,), beam=8, pays=True),
}
LOSSY = Policy(accept_below=0.45, verify_above=0.8, risk_budget=1.0, max_pending=12)
COSTS = Costs(target=Curve(tokens=(1, 64), seconds=(1.0, 3.0)), draft=Curve(tokens=(1, 64), seconds=(0.05, 0.3)))
KINDS = ("standalone", "conditioned")


def make_llm(policy: Policy, kind: str, *, seed: int = 0, max_batch: int = 1, **options: Any) -> LLM:
    """A tier `premium` of that shape and a lossy `turbo`, with the room that is promised to be enough."""
    vocab_size, eos_bias = options.pop("vocab_size", VOCAB_SIZE), options.pop("eos_bias", -1.0)
    target = FakeTarget(
        seed=seed,
        tap=kind == "conditioned",
        eos_bias=eos_bias,
        max_batch=max_batch,
        max_length=48 + MAX_PENDING,
        vocab_size=vocab_size,
    )
    settings = {"agreement": 0.5, "noise": 0.7} | options
    kind_of_draft = GrowingFakeDraft if settings.pop("grows", False) else FakeDraft
    draft = kind_of_draft(target, seed=seed + 1000, conditioned=kind == "conditioned", **settings)
    return LLM(
        target,
        draft,
        BundleTokenizer(FakeTokenizer()),
        eos_token_ids=[EOS],
        tiers={"premium": policy, "turbo": LOSSY},
        max_length=48,
        prefill_chunk=4,
        costs=COSTS,
    )


def random_params(rng: random.Random) -> SamplingParams:
    sampled = rng.random() < 0.5
    return SamplingParams(
        temperature=rng.choice([0.6, 1.0, 1.4]) if sampled else 0.0,
        top_k=rng.choice([0, 0, 4]),
        top_p=rng.choice([1.0, 0.8]),
        seed=rng.randrange(1000),
        max_tokens=rng.randint(1, 24),
        min_tokens=rng.choice([0, 0, 1]),
        stop=rng.choice([(), (), ("b c",), ("E", "x")]),
        ignore_eos=rng.random() < 0.3,
    )


@pytest.mark.parametrize("grows", [False, True], ids=["stepped", "grown"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_trees_give_the_text_of_plain_decoding(shape: str, kind: str, grows: bool) -> None:
    """Alone, and among lossless and lossy company that comes and goes; greedy and sampled; ends of every kind."""
    rng = random.Random(f"{shape} {kind}")
    accepted = passes = 0
    for seed in range(4):
        options: dict[str, Any] = {
            "seed": seed,
            "grows": grows,
            "token_ids": [3, 0, 11, 6, 2, 9, 5] if seed == 3 else None,
        }
        asked = [
            (tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 11))), random_params(rng)) for _ in range(11)
        ]
        plain = run(
            make_llm(SHAPES[shape], kind, **options), [Request(ids, "autoregressive", params) for ids, params in asked]
        )
        methods = [
            "premium",
            "premium",
            "turbo",
            "autoregressive",
            "premium",
            "prompt-lookup",
            "premium",
            "speculative",
        ]
        methods += ["suffix", "lookahead"]
        requests = [
            Request(ids, method, params) for (ids, params), method in zip(asked, (*methods, "premium"), strict=True)
        ]
        together = run(make_llm(SHAPES[shape], kind, max_batch=3, **options), requests)
        for request, output, expected in zip(requests, together, plain, strict=True):
            counters = output.counters
            if request.method != "turbo":
                assert text_of(output) == text_of(expected), request
            assert counters.drafted == counters.accepted + counters.trusted + counters.rolled_back
            assert counters.target_tokens == counters.drafted + counters.target_passes
            if request.method == "premium":
                alone = run(make_llm(SHAPES[shape], kind, **options), [request])[0]
                assert text_of(alone) == text_of(expected), request
                accepted, passes = accepted + counters.accepted, passes + counters.target_passes
    # Not plain decoding by another name; where an engine grows trees, sampled rows that have to pay do not draft.
    assert accepted > (0.0 if grows and shape == "pays" else 0.25) * passes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["speculative", "turbo", "eagle"])
def test_trees_that_an_engine_grows_are_those_of_its_steps(method: str, kind: str) -> None:
    """Greedy chains, also where a policy ends them or trusts tokens, and trees: text and counters are the same."""
    rng = random.Random(method)
    asked = [
        Request(
            tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 11))),
            method,
            SamplingParams(
                max_tokens=rng.randint(1, 24), ignore_eos=method == "eagle", stop=rng.choice([(), ("b c",)])
            ),
        )
        for _ in range(12)
    ]
    found = []
    for grows in (False, True):
        for max_batch in (1, 3):
            # No guess is beyond a beam of ten here, so that ends of the text leave it no room.
            llm = make_llm(SHAPES["eagle"], kind, grows=grows, max_batch=max_batch, eos_bias=-1.0)
            found.append(run(llm, asked))
            assert isinstance(llm.draft, GrowingFakeDraft) == grows
            assert not isinstance(llm.draft, GrowingFakeDraft) or llm.draft.num_grown
    for outputs in found[1:]:
        for output, expected in zip(outputs, found[0], strict=True):
            assert text_of(output) == text_of(expected)
            mine, theirs = (replace(each.counters, first_token_s=0.0, total_s=0.0) for each in (output, expected))
            assert mine == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_siblings_find_what_the_first_guess_misses(kind: str) -> None:
    """A draft that is never right at first, but whose next guesses are the target's."""
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    found = {}
    for name, policy in (("chain", verify_all(5)), ("tree", SHAPES["bushy"])):
        llm = make_llm(policy, kind, agreement=0.0, noise=0.0)
        assert isinstance(llm.draft, FakeDraft) and isinstance(llm.target, FakeTarget)
        # The target's logits with its best one a little below its second.
        best_N1 = llm.target.logits_NV.argmax(dim=1, keepdim=True)
        second_N1 = llm.target.logits_NV.topk(2, dim=1).values[:, 1:]
        llm.draft.other_NV = llm.target.logits_NV.scatter(1, best_N1, second_N1 - 1e-3)
        (output,) = run(llm, [Request((1, 2, 3), "premium", params)])
        found[name] = output.counters
    assert found["chain"].accepted == 0
    assert found["tree"].tokens_per_pass > 2


def test_nodes_of_a_kept_path_are_not_made_again() -> None:
    """A standalone draft keeps its own entries of what became text."""
    llm = make_llm(verify_all(6, children=(2,), beam=1, max_depth=6), "standalone", agreement=1.0, noise=0.0)
    assert isinstance(llm.draft, FakeDraft)
    run(llm, [Request((1, 2, 3), "premium", SamplingParams(max_tokens=22, ignore_eos=True))])
    # The prompt; then a round's text is the bonus token and the last node of the path, which got no children.
    assert {call.tokens for call in llm.draft.calls[1:]} <= {1, 2}


@pytest.mark.parametrize("cached", [0, 1 << 20])
def test_prompts_from_the_cache(cached: int) -> None:
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    prompts = [(1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 4, 5, 6, 7, 8, 3), (1, 2, 3, 4, 9)]
    found = []
    for method in ("autoregressive", "premium"):
        llm = make_llm(SHAPES["bushy"], "conditioned", max_batch=2)
        loop = llm.loop(prompt_cache_bytes=cached)
        tokens: dict[int, tuple[int, ...]] = {}
        for index, ids in enumerate(prompts):
            policy = llm.tiers["premium"] if method == "premium" else verify_all(0)
            loop.submit(index, Request(ids, method, params), policy, None)
            for _ in range(4):
                for chunk in loop.step():
                    tokens[chunk.index] = tokens.get(chunk.index, ()) + chunk.token_ids
        while loop.has_work:
            for chunk in loop.step():
                tokens[chunk.index] = tokens.get(chunk.index, ()) + chunk.token_ids
        assert isinstance(llm.draft, FakeDraft) and llm.draft.wrong_features == 0
        found.append(tokens)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("policy", "vocab", "length", "runs"),
    [
        (verify_all(9, children=(3, 2), beam=3, max_depth=2), 5, 3, 3000),
        (SPECINFER, 4, 4, 2000),  # its siblings are guesses of the third token behind the prompt's
    ],
    ids=["bushy", "specinfer"],
)
def test_sampled_trees_have_the_target_distribution(policy: Policy, vocab: int, length: int, runs: int) -> None:
    """The first tokens of many seeds, by chi-square against the exact probabilities."""
    llm = make_llm(policy, "conditioned", max_batch=32, vocab_size=vocab)
    assert isinstance(llm.target, FakeTarget)
    requests = [
        Request((1, 2), "premium", SamplingParams(temperature=0.9, seed=seed, max_tokens=length, ignore_eos=True))
        for seed in range(runs)
    ]
    counts: dict[tuple[int, ...], int] = {}
    for output in run(llm, requests):
        counts[output.token_ids] = counts.get(output.token_ids, 0) + 1
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        texts = {
            (*text, token): p * q
            for text, p in texts.items()
            for token, q in enumerate((llm.target.next_logits([1, 2, *text]) / 0.9).softmax(dim=0).tolist())
        }
    assert p_value([counts.get(text, 0) for text in texts], list(texts.values())) > 1e-4


# --- what is wrong is noticed -----------------------------------------------------------------------------------------


def assert_noticed(**options: Any) -> None:
    """Some text is not plain decoding's, or an engine or the draft complains."""
    for seed in range(12):
        asked = [Request((1, 2, seed % 9), "premium", SamplingParams(max_tokens=24, ignore_eos=True))]
        plain = [Request(r.prompt_ids, "autoregressive", r.params) for r in asked]
        llm = make_llm(SHAPES["bushy"], "conditioned", seed=seed, **options)
        try:
            different = text_of(run(llm, asked)[0]) != text_of(llm.generate(plain)[0])
        except AssertionError:
            return
        if different:
            return
    pytest.fail("nobody noticed")


def test_a_wrong_parent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def sees_the_last_node(prefixes: Any, paths: Any, ends: Any) -> Branches:
        for row in paths:
            for t in range(2, len(row)):
                if len(row[t]) > 2:
                    row[t][-2] = row[t - 1][-1]
        return branches_of(prefixes, paths, ends)

    monkeypatch.setattr(module, "branches_of", sees_the_last_node)
    assert_noticed()


def test_a_mask_that_sees_a_cousin_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def sees_a_cousin(prefixes: Any, paths: Any, ends: Any) -> Branches:
        paths = [[sorted({*path, *(row[t - 1][-1:] if t else ())}) for t, path in enumerate(row)] for row in paths]
        return branches_of(prefixes, paths, ends)

    monkeypatch.setattr(module, "branches_of", sees_a_cousin)
    assert_noticed()


def test_a_sibling_taken_in_place_of_the_choice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def takes_a_sibling(tree: Tree, judged: Any, choices: Any) -> Verdict:
        verdict = walk(tree, judged, choices)
        if verdict.path:
            last = verdict.path[-1]
            for node in range(last + 1, len(tree)):
                if tree.parents[node] == tree.parents[last]:
                    return Verdict((*verdict.path[:-1], node), verdict.num_judged, verdict.next_token)
        return verdict

    monkeypatch.setattr(module, "walk", takes_a_sibling)
    assert_noticed()


def test_a_path_that_is_not_moved_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTarget, "keep", lambda self, row, start, slots: None)
    assert_noticed()


def test_a_position_that_is_a_slot_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen_at_slots(rows: Any, logits: Any, at: Any, *rest: Any) -> Any:
        return choices(rows, logits, [(b, i) for i, (b, _) in enumerate(at)], *rest)

    choices = module.choices
    monkeypatch.setattr(module, "choices", chosen_at_slots)
    params = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True)
    llm = make_llm(SHAPES["bushy"], "conditioned")
    outputs = [llm.generate([Request((1, 2), method, params)])[0] for method in ("premium", "autoregressive")]
    assert text_of(outputs[0]) != text_of(outputs[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_brings_its_own_tree(kind: str) -> None:
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    llm = make_llm(SHAPES["bushy"], kind, max_batch=2)
    own = Request((1, 2), "my tree", params, policy=SHAPES["static"])
    outputs = run(llm, [own, Request((1, 2), "autoregressive", params)])
    assert text_of(outputs[0]) == text_of(outputs[1])
    assert outputs[0].counters.drafted > 16
