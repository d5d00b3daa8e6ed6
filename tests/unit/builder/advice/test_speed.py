"""Expected speed: the rules that decode, gone through without an engine."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from fakes import EOS, FakeDraft, FakeTarget
from ssv.builder.advice.positions import drawn, watch
from ssv.builder.advice.rounds import SHAPES, Overhead, Timed, fitted, seconds_of_rounds
from ssv.builder.advice.speed import Basis, break_even, expected, least_acceptance, speeds, verdict
from ssv.bundle.policy import Policy, verify_all
from ssv.bundle.profile import Costs, Curve
from ssv.bundle.survival import Survival
from ssv.runtime.counters import Counters
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.decode.row import Row
from ssv.runtime.methods import PREMIUM, SPECINFER
from ssv.runtime.request import SamplingParams

NONE = Survival()


def costs(draft: float, further: float = 0.0) -> Costs:
    """A pass of one token takes a second."""
    return Costs(
        target=Curve(tokens=(1, 65), seconds=(1.0, 1.0 + 64 * further)),
        draft=Curve(tokens=(1, 65), seconds=(draft, draft)),
    )


def places(*shares: float, count: int = 3000) -> list:
    return drawn(
        [{"rows": "greedy", "rank": k, "guesses": 1, "chosen": share} for k, share in enumerate(shares)], count
    )


@pytest.mark.parametrize(
    ("policy", "nodes_off_by"),
    [
        (verify_all(3), 0.0),
        (verify_all(6, children=(3,), beam=2, max_depth=4), 0.0),
        (Policy(accept_below=0.0, verify_above=0.5, risk_budget=0.7, max_pending=6), 0.0),
        # Some of their guesses are behind guesses that nobody watches.
        (SPECINFER, 0.03),
        (PREMIUM, 0.03),
    ],
)
def test_rounds_are_those_of_decoding(policy: Policy, nodes_off_by: float) -> None:
    """The same passes, the same drafted tokens, for the same text: also what followed the same words before."""
    target = FakeTarget(max_length=400, eos_bias=-20.0)
    draft = FakeDraft(target, conditioned=True, agreement=0.7)
    batch = DecodeBatch(target, draft, [EOS], 200, costs=costs(0.1, 0.02), recorded_costs=costs(0.1, 0.02))
    prompt = (1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3)
    (text,) = watch(batch, [prompt], 40)
    row = Row(SamplingParams(max_tokens=40), policy, lambda _: False, Counters())
    batch.members.begin(prompt, row)
    while batch.members.prefill() is None:
        pass
    row.counters.emitted = 1
    while row.rest >= 0:
        batch.draft()
        row.counters.emitted += len(batch.verify()[0])
    found = expected("", "", [text], policy, Basis(costs(0.1, 0.02), NONE, True))
    drafted = row.counters.drafted / row.counters.target_passes
    assert found.nodes_per_pass == pytest.approx(drafted, rel=max(nodes_off_by, 1e-6))
    assert found.tokens_per_pass == pytest.approx(row.counters.tokens_per_pass)
    assert any(position.recalled for position in text) and any(any(p.is_recalled_right) for p in text)


def test_a_chain_gives_what_its_acceptance_says() -> None:
    found = expected("", "", places(0.8), verify_all(3), Basis(costs(0.1), NONE, False))
    assert found.tokens_per_pass == pytest.approx(1 + 0.8 + 0.64 + 0.512, rel=0.03)
    assert found.seconds_per_pass == pytest.approx(1.3)
    assert found.speedup == pytest.approx(found.tokens_per_pass / 1.3)


def test_trusted_tokens_are_passed_without_being_right() -> None:
    trusting = Policy(accept_below=0.5, verify_above=1.0, risk_budget=1.0, max_pending=4)
    found = expected("", "", places(0.6), trusting, Basis(costs(0.1), NONE, False))
    assert found.tokens_per_pass == 5.0


def test_what_rounds_take_beside_their_steps_is_in_it() -> None:
    basis = Basis(costs(0.1, 0.02), NONE, False)
    assert basis.timed([]).overhead == Overhead()
    found = {shape: 0.3 + 0.05 * levels + 0.002 * guesses for shape, levels, guesses in zip(
        SHAPES, (0, 3, 3, 6), (0, 3, 4 + 16 + 16, 8 + 5 * 64), strict=True)}  # fmt: skip
    steps = {SHAPES[0]: 1.0, SHAPES[1]: 1.36, SHAPES[2]: 1.54, SHAPES[3]: 2.56}
    timed = basis.timed([(shape, steps[shape] + more) for shape, more in found.items()])
    assert asdict(timed.overhead) == pytest.approx({"round": 0.3, "level": 0.05, "guess": 0.002})
    chain = expected("", "", places(0.8), verify_all(2), timed)
    assert chain.seconds_per_pass == pytest.approx(1.0 + 2 * 0.02 + 2 * 0.1 + 0.3 + 2 * 0.05 + 2 * 0.002)
    assert chain.speedup == pytest.approx(chain.tokens_per_pass * 1.3 / chain.seconds_per_pass)


def test_no_part_of_the_overhead_is_below_nothing() -> None:
    rounds = [Timed(0, 0, 1.0, 1.1), Timed(3, 3, 1.5, 1.4), Timed(3, 40, 2.0, 2.2), Timed(6, 300, 9.0, 8.0)]
    found = fitted(rounds)
    assert min(asdict(found).values()) >= 0 and found != Overhead()
    assert fitted([Timed(0, 0, 1.0, 1.2), Timed(3, 3, 1.5, 1.7)]) == Overhead()


def test_rounds_are_those_of_the_middle_prompt_and_behind_the_first_token() -> None:
    asked: list[tuple[int, ...]] = []

    def decode(prompt: tuple[int, ...], policy: Policy, max_tokens: int) -> Counters:
        asked.append(prompt)
        seconds = {1: 0.5, 2: 0.3, 3: 60.0}[prompt[0]]  # one was interrupted
        passes = 0 if policy == SHAPES[2] else 10
        return Counters(target_passes=passes, first_token_s=2.0, total_s=2.0 + passes * seconds)

    found = seconds_of_rounds([(1,), (2,), (3,), (4,)], decode)
    assert found == [(shape, pytest.approx(0.5)) for shape in SHAPES if shape != SHAPES[2]]
    assert asked.count((3,)) == len(SHAPES) and (4,) not in asked
    assert Overhead(0.04).doubts(0.1) is None
    assert "took 9.0 times its step" in str(Overhead(0.8).doubts(0.1))


def test_lossy_trees_go_by_recorded_costs() -> None:
    """As decoding does: their text must not depend on what was measured just now."""
    trusting = Policy(
        accept_below=0.05, verify_above=1.0, risk_budget=1.0, max_pending=16, children=(2,), beam=4, pays=True
    )
    texts = places(0.8, 0.1, count=200)
    dear, cheap = costs(2.0, 0.02), costs(0.01, 0.02)
    assert expected("", "", texts, trusting, Basis(dear, NONE, False, recorded=dear)).nodes_per_pass == 0
    drafted = expected("", "", texts, trusting, Basis(dear, NONE, False, recorded=cheap))
    assert drafted.nodes_per_pass > 2 and drafted.seconds_per_pass > 3
    assert expected("", "", texts, PREMIUM, Basis(dear, NONE, False, recorded=cheap)).nodes_per_pass == 0


def test_what_pays_is_never_slower_than_plain_decoding() -> None:
    for share, step in ((0.9, 0.1), (0.1, 0.8), (0.6, 1.5)):
        rows = {s.method: s for s in speeds(places(share, count=400), Basis(costs(step), NONE, False), {})}
        assert rows["premium"].speedup >= 0.99
        assert rows["autoregressive"].speedup == 1.0


def test_break_even_of_a_free_and_of_a_dear_draft() -> None:
    # k tokens of acceptance a pay where a + ... + a^k > k * 0.5: a chain of one is the first to.
    assert least_acceptance(costs(0.5)) == pytest.approx(0.5, abs=1e-3)
    assert least_acceptance(costs(1.01)) is None
    found = break_even(places(0.8), Basis(costs(0.1, further=0.05), NONE, False))
    # a - 0.05 seconds are what a first token may cost
    assert found.draft_share == pytest.approx(0.75, abs=0.02)
    assert found.draft_share_now == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("share", "step", "word"),
    [(0.9, 0.1, "good"), (0.05, 0.06, "too weak"), (0.7, 0.9, "too strong"), (0.45, 0.4, "doubtful")],
)
def test_verdicts(share: float, step: float, word: str) -> None:
    texts = places(share, count=800)
    found, free = (speeds(texts, Basis(costs(c), NONE, False), {}) for c in (step, 1e-9))
    assert verdict(found, costs(step), free)[0] == word
