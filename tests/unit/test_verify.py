"""Zones, passes and verdicts on tables made by hand; the sampled verdict by the distribution of what it emits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from chi_square import p_value
from torch import Tensor

from ssv.builder.tiers import Policy
from ssv.runtime.verify import (
    Verdict,
    asks_for_pass,
    draw,
    greedy_verdict,
    judged_rows,
    sampled_verdict,
)


def asks(reject_prob: Sequence[float], **settings: float) -> bool:
    numbers = {"accept_below": 0.0, "verify_above": 1.0, "risk_budget": 1.0, "max_pending": 9} | settings
    policy = Policy.model_validate(numbers)
    return asks_for_pass(reject_prob, policy, policy.max_pending)


# --- zones and passes -----------------------------------------------------------------------------------------------


def test_zones_have_open_borders() -> None:
    assert judged_rows([0.0, 0.125, 0.25, 0.5, 1.0], 0.25) == [False, False, True, True, True, True]


def test_nothing_is_trusted_below_zero() -> None:
    assert judged_rows([0.0, 0.0, 0.0], 0.0) == [True] * 4


def test_everything_is_trusted_below_one_but_a_certain_rejection() -> None:
    assert judged_rows([0.0, 0.999, 1.0], 1.0) == [False, False, True, True]


def test_critical_token_asks() -> None:
    assert asks([0.1, 0.6], verify_above=0.5)
    assert not asks([0.1, 0.5], verify_above=0.5)
    assert asks([0.6, 0.1], verify_above=0.5)


def test_trusted_token_never_asks() -> None:
    """Not by its own risk, nor by adding to the others'."""
    assert not asks([0.4], accept_below=0.5, verify_above=0.1)
    assert not asks([0.4, 0.4, 0.4], accept_below=0.5, risk_budget=0.1)
    assert asks([0.4, 0.6], accept_below=0.5, risk_budget=0.5)


def test_risk_adds_up() -> None:
    assert not asks([0.5, 0.5], risk_budget=0.75)
    assert asks([0.5, 0.5, 0.125], risk_budget=0.75)
    assert asks([0.01], risk_budget=0.0)
    assert not asks([0.0], risk_budget=0.0)
    assert not asks([1.0, 1.0], risk_budget=1.0)


def test_max_pending_asks() -> None:
    assert not asks([0.0, 0.0], max_pending=3)
    assert asks([0.0, 0.0, 0.0], max_pending=3)
    assert asks([], max_pending=0)
    assert asks([0.0], accept_below=1.0, max_pending=1)


def test_an_output_that_ends_before_asks_sooner() -> None:
    policy = Policy(accept_below=0.0, verify_above=1.0, risk_budget=1.0, max_pending=9)
    assert asks_for_pass([0.0, 0.0], policy, 2)
    assert not asks_for_pass([0.0, 0.0], policy, 3)


def test_the_bonus_row_is_always_judged() -> None:
    assert judged_rows([0.1, 0.1], 0.5) == [False, False, True]
    assert judged_rows([], 0.5) == judged_rows([], 0.0) == [True]


# --- greedy ---------------------------------------------------------------------------------------------------------

GREEDY_CASES = [
    # drafted, judged, target's tokens and the bonus -> kept, next token
    ([1, 2, 3], [1, 1, 1], [1, 2, 3, 4], Verdict(3, 4)),
    ([1, 2, 3], [1, 1, 1], [9, 2, 3, 4], Verdict(0, 9)),
    ([1, 2, 3], [1, 1, 1], [1, 2, 9, 4], Verdict(2, 9)),
    ([1, 2, 3], [1, 1, 1], [1, 9, 9, 4], Verdict(1, 9)),
    ([1, 2, 3], [0, 0, 0], [9, 9, 9, 4], Verdict(3, 4)),
    ([1, 2, 3], [0, 1, 0], [9, 2, 9, 4], Verdict(3, 4)),
    ([1, 2, 3], [0, 1, 0], [9, 8, 9, 4], Verdict(1, 8)),
    ([1, 2, 3], [1, 0, 0], [7, 2, 3, 4], Verdict(0, 7)),
]


@pytest.mark.parametrize(("drafted", "judged", "target", "expected"), GREEDY_CASES)
def test_greedy_verdict(drafted: list[int], judged: list[int], target: list[int], expected: Verdict) -> None:
    flags = [bool(j) for j in judged] + [True]
    gathered = [token for token, is_judged in zip(target, flags, strict=True) if is_judged]
    assert greedy_verdict(drafted, flags, gathered) == expected


def test_greedy_verdict_without_a_draft() -> None:
    assert greedy_verdict([], [True], [3]) == Verdict(0, 3)


# --- sampled --------------------------------------------------------------------------------------------------------


def one_hot(tokens: Sequence[int], vocab: int = 10) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocab).float()


@pytest.mark.parametrize(("drafted", "judged", "target", "expected"), GREEDY_CASES)
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_sampled_verdict_of_one_hot_rows_is_the_greedy_one(
    drafted: list[int], judged: list[int], target: list[int], expected: Verdict, uniform: float
) -> None:
    judged_BJ = torch.tensor([[*judged, 1]]).bool()
    verdicts = sampled_verdict(
        torch.tensor([drafted]),
        judged_BJ,
        torch.tensor([3]),
        one_hot(target)[judged_BJ[0]],
        one_hot(drafted)[None],
        torch.full((1, 3), uniform),
        torch.tensor([uniform]),
    )
    assert verdicts == [expected]


def test_sampled_verdict_without_a_draft() -> None:
    """A pass over rows of which none has drafted: plain sampling from the bonus row."""
    p_RV = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    nothing_BK = torch.zeros(2, 0)
    verdicts = sampled_verdict(
        nothing_BK.long(),
        torch.ones(2, 1).bool(),
        torch.zeros(2).long(),
        p_RV,
        torch.zeros(2, 1, 2),
        nothing_BK,
        torch.tensor([0.3, 0.3]),
    )
    assert verdicts == [Verdict(0, 1), Verdict(0, 0)]


def test_trusted_token_is_kept_where_the_target_gives_it_nothing() -> None:
    p_RV = torch.tensor([[0.0, 0.0, 1.0]])
    q_BKV = torch.tensor([[[1.0, 0.0, 0.0]]])
    judged_BJ = torch.tensor([[False, True]])
    verdicts = sampled_verdict(
        torch.tensor([[0]]), judged_BJ, torch.tensor([1]), p_RV, q_BKV, torch.tensor([[0.9]]), torch.tensor([0.5])
    )
    assert verdicts == [Verdict(1, 2)]


def test_acceptance_has_the_ratio_as_its_border() -> None:
    p_RV = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).repeat(3, 1)
    q_BKV = torch.tensor([[[0.5, 0.5]]]).repeat(3, 1, 1)
    uniform_BK = torch.tensor([[0.0], [0.4375], [0.5]])
    verdicts = sampled_verdict(
        torch.zeros(3, 1).long(),
        torch.ones(3, 2).bool(),
        torch.ones(3).long(),
        p_RV,
        q_BKV,
        uniform_BK,
        torch.tensor([0.75, 0.25, 0.75]),
    )
    assert verdicts == [Verdict(1, 1), Verdict(1, 0), Verdict(0, 1)]


Rule = Callable[..., list[Verdict]]


def always_accept(*args: Tensor) -> list[Verdict]:
    *rest, accept_uniform_BK, next_uniform_B = args
    return sampled_verdict(*rest, torch.full_like(accept_uniform_BK, -1.0), next_uniform_B)


def resample_from_target(*args: Tensor) -> list[Verdict]:
    _, judged_BJ, _, target_prob_RV, *_, next_uniform_B = args
    kept = [verdict.num_kept for verdict in sampled_verdict(*args)]
    p_BJV = target_prob_RV.view(*judged_BJ.shape, -1)
    drawn_B = draw(p_BJV[torch.arange(len(p_BJV)), torch.tensor(kept)], next_uniform_B)
    return list(map(Verdict, kept, drawn_B.tolist()))


def inverted_ratio(*args: Tensor) -> list[Verdict]:
    drafted_BK, judged_BJ, num_pending_B, target_prob_RV, draft_prob_BKV, *uniforms = args
    p_BJV = target_prob_RV.view(*judged_BJ.shape, -1)
    verdicts = sampled_verdict(drafted_BK, judged_BJ, num_pending_B, target_prob_RV, draft_prob_BKV, *uniforms)
    p_BK = p_BJV[:, :-1].gather(2, drafted_BK[:, :, None])[:, :, 0]
    q_BK = draft_prob_BKV.gather(2, drafted_BK[:, :, None])[:, :, 0]
    kept_B = (uniforms[0] * p_BK < q_BK).cumprod(dim=1).sum(dim=1)
    return [Verdict(kept, v.next_token) for kept, v in zip(kept_B.tolist(), verdicts, strict=True)]


COUNT = 30_000
# p of drafted tokens 1 and 2 and of the bonus, q of drafted tokens 1 and 2.
DISTRIBUTIONS = {
    "different": (
        [[0.5, 0.2, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4], [0.25] * 4],
        [[0.1, 0.3, 0.4, 0.2], [0.4, 0.3, 0.2, 0.1]],
    ),
    "q_without_mass": (
        [[0.5, 0.2, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4], [0.7, 0.3, 0, 0]],
        [[0.0, 0.5, 0.5, 0.0], [1.0, 0, 0, 0]],
    ),
    "p_without_mass": (
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.9, 0.0, 0.1], [0, 0, 0.5, 0.5]],
        [[0.25] * 4, [0.7, 0.1, 0.1, 0.1]],
    ),
    "p_one_hot": ([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0, 0, 0]], [[0.25] * 4, [0.1, 0.2, 0.3, 0.4]]),
    "equal": ([[0.5, 0.2, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4], [0.25] * 4], [[0.5, 0.2, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4]]),
    "disjoint": (
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.25] * 4],
        [[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 0.0, 0.5]],
    ),
}


def emitted_p_values(rule: Rule, name: str) -> list[float]:
    """Of the first token emitted, of the second where one was kept, and of the third where two were."""
    p_JV, q_KV = (torch.tensor(rows) for rows in DISTRIBUTIONS[name])
    generator = torch.Generator().manual_seed(7)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    drafted_BK = torch.stack([draw(q_V.expand(COUNT, -1), uniform(COUNT)) for q_V in q_KV], dim=1)
    verdicts = rule(
        drafted_BK,
        torch.ones(COUNT, 3, dtype=torch.bool),
        torch.full((COUNT,), 2),
        p_JV.repeat(COUNT, 1),
        q_KV.expand(COUNT, -1, -1),
        uniform(COUNT, 2),
        uniform(COUNT),
    )
    kept_B = torch.tensor([verdict.num_kept for verdict in verdicts])
    next_B1 = torch.tensor([[verdict.next_token] for verdict in verdicts])
    emitted_BJ = torch.cat((drafted_BK, next_B1), dim=1).scatter(1, kept_B[:, None], next_B1)
    results = []
    for j, p_V in enumerate(p_JV):
        counts_V = torch.bincount(emitted_BJ[kept_B >= j, j], minlength=4)
        results.append(p_value(counts_V.tolist(), p_V.tolist()))
    return results


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_emitted_tokens_have_the_target_distribution(name: str) -> None:
    assert min(emitted_p_values(sampled_verdict, name)) > 1e-4


def test_equal_distributions_reject_nothing() -> None:
    p_JV, q_KV = (torch.tensor(rows) for rows in DISTRIBUTIONS["equal"])
    uniforms = torch.full((4, 2), 1 - 2**-24), torch.rand(4)
    drafted_BK = torch.arange(4)[:, None].expand(-1, 2)
    args = (drafted_BK, torch.ones(4, 3).bool(), torch.full((4,), 2), p_JV.repeat(4, 1), q_KV.expand(4, -1, -1))
    assert [verdict.num_kept for verdict in sampled_verdict(*args, *uniforms)] == [2] * 4


@pytest.mark.parametrize("broken", [always_accept, resample_from_target, inverted_ratio])
def test_broken_rule_is_caught(broken: Rule) -> None:
    assert min(emitted_p_values(broken, "different")) < 1e-4


def test_ragged_sampled_rows_read_their_own_target_rows() -> None:
    """Rows of the target are packed: what one row judges shifts the rows of those after it."""
    num_pending_B = torch.tensor([2, 0, 1, 2])
    judged_BJ = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    drafted_BK = torch.tensor([[1, 2], [0, 0], [4, 0], [5, 6]])
    # Of row 0: token 2 and the bonus; of row 1: the bonus; of row 2: token 1 and the bonus; of row 3: token 1 and the bonus.
    p_RV = one_hot([2, 3, 7, 8, 9, 5, 6])
    verdicts = sampled_verdict(
        drafted_BK,
        judged_BJ,
        num_pending_B,
        p_RV,
        one_hot([1, 2, 0, 0, 4, 0, 5, 6]).view(4, 2, 10),
        torch.full((4, 2), 0.5),
        torch.full((4,), 0.5),
    )
    assert verdicts == [Verdict(2, 3), Verdict(0, 7), Verdict(0, 8), Verdict(2, 6)]


# --- draw -----------------------------------------------------------------------------------------------------------


def test_draw_by_inversion() -> None:
    weight_RV = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    uniforms = [0.0, 0.2499, 0.25, 0.7499, 0.75, 0.999999, 1.0]
    assert draw(weight_RV.expand(7, -1), torch.tensor(uniforms)).tolist() == [1, 1, 3, 3, 4, 4, 4]


def test_draw_never_gives_what_has_no_weight() -> None:
    generator = torch.Generator().manual_seed(3)
    weight_RV = torch.rand(4000, 50, generator=generator) ** 8
    weight_RV[torch.rand(4000, 50, generator=generator) < 0.6] = 0.0
    weight_RV[:, 17] += 1e-6
    for uniform in (0.0, 0.5, 1 - 2**-24, 1.0):
        index_R = draw(weight_RV, torch.full((4000,), uniform))
        assert bool((weight_RV[torch.arange(4000), index_R] > 0).all())


def test_draw_follows_its_weights() -> None:
    weight_V = torch.tensor([1.0, 0.0, 5.0, 2.0])
    drawn = draw(weight_V.expand(COUNT, -1), torch.rand(COUNT, generator=torch.Generator().manual_seed(4)))
    assert p_value(torch.bincount(drawn, minlength=4).tolist(), (weight_V / 8).tolist()) > 1e-4


def test_chi_square_itself() -> None:
    assert p_value([50, 50], [0.5, 0.5]) == 1.0
    assert abs(p_value([60, 40], [0.5, 0.5]) - 0.0455) < 1e-4
    assert p_value([99, 1], [1.0, 0.0]) == 0.0
    assert p_value([996, 4], [0.999, 0.001]) == 1.0
