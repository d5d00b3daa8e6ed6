"""The kernels of sample.cu choose what `ssv.runtime.decode.sampling` chooses. Needs any NVIDIA GPU of compute
capability 8.0.

make test-gpu
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from chi_square import p_value
from torch import Tensor

from ssv.plugins.ops import on
from ssv.runtime.decode.sampling import Sampling, choose, filtered, ranked
from ssv.runtime.engines.contract import RoundRow
from ssv.runtime.engines.cuda import places
from ssv.runtime.engines.cuda.launching import SAMPLING, Draw, Perturb, address, kernels_of
from ssv.runtime.engines.cuda.rounds import settings_of
from ssv.runtime.request import SamplingParams

ROWS = 64
DEVICE = torch.device("cuda", 0)

SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.4, "top_k": 7, "top_p": 0.5},
    {"temperature": 1e-6},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 1.0, "top_k": 3000},
    {"temperature": 1.0, "top_k": 3000, "top_p": 0.95},
    {"temperature": 0.9, "top_p": 1e-9},
    {"temperature": 0.9, "top_k": 1},
]


class Rows:
    """Logits of rows, each with settings of its own, and the numbers of a step that they come from."""

    def __init__(self, logits_RV: Tensor, tokens_V: Tensor | None, seed: int) -> None:
        self.logits_RV, self.tokens_V = logits_RV.to(DEVICE), tokens_V
        num = len(logits_RV)
        chosen = [SETTINGS[r % len(SETTINGS)] for r in range(num)]
        self.params = [SamplingParams(seed=2**64 - 1 - 977 * (seed + r), **each) for r, each in enumerate(chosen)]
        # Row r of the cache sees 5 r + 1 keys, and lags one token behind its text where r is odd.
        self.positions = [5 * r + 1 + r % 2 for r in range(num)]
        rows = [
            RoundRow(0, 0, 0, temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, seed=p.seed) for p in self.params
        ]
        self.settings = torch.from_numpy(settings_of(rows, [r % 2 for r in range(num)])).to(DEVICE)
        step = np.zeros(places.SIZE, dtype=np.int32)
        places.write(
            step, next(iter(places.blocks([1] * num))), np.zeros((num, 1), dtype=np.int64),
            [5 * r for r in range(num)], 0, range(num), None, 1,
        )  # fmt: skip
        self.step = torch.from_numpy(step).to(DEVICE)

    def sampling(self) -> Sampling:
        return Sampling.of(self.params, self.positions)

    def drawn(self) -> list[int]:
        token_R = torch.full((ROWS,), -7, dtype=torch.int64, device=DEVICE)
        argument = Draw(
            self.step.data_ptr(), self.logits_RV.data_ptr(), address(self.tokens_V), self.settings.data_ptr(),
            token_R.data_ptr(), self.logits_RV.shape[1], 0,
        )  # fmt: skip
        self._launch("draw", argument)
        assert token_R[len(self.logits_RV) :].eq(-7).all()
        return token_R[: len(self.logits_RV)].tolist()

    def perturbed(self) -> tuple[Tensor, Tensor]:
        """The logits, in fp64, and what else their softmax has below its line."""
        own_RV, extra_R = self.logits_RV.clone(), torch.zeros(ROWS, device=DEVICE)
        argument = Perturb(
            self.step.data_ptr(), own_RV.data_ptr(), address(self.tokens_V), self.settings.data_ptr(),
            extra_R.data_ptr(), own_RV.shape[1],
        )  # fmt: skip
        self._launch("perturb", argument)
        return own_RV.double().cpu(), extra_R[: len(own_RV)].double().cpu()

    def _launch(self, name: str, argument: Draw | Perturb) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        kernels_of(DEVICE, "sample", SAMPLING)[name].launch(argument, (ROWS, 1, 1), 1024, stream, overlaps=False)
        torch.cuda.synchronize()


def logits(vocab: int, spread: float, *, ties: bool, seed: int) -> Tensor:
    made = spread * torch.randn(55, vocab, generator=torch.Generator().manual_seed(seed))
    return (made * 2).round() / 2 if ties else made


def tokens_of(vocab: int) -> Tensor:
    return torch.randperm(3 * vocab, generator=torch.Generator().manual_seed(1))[:vocab].sort().values.to(DEVICE)


SHAPES = [(49152, 3.0), (49152, 0.5), (16384, 5.0), (1000, 2.0), (997, 2.0), (151, 0.01), (3, 1.0)]


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("vocab", "spread"), SHAPES)
def test_rows_draw_what_is_defined(vocab: int, spread: float, ties: bool, is_mapped: bool) -> None:
    tokens_V = tokens_of(vocab) if is_mapped else None
    others = 0
    for seed in range(4):
        rows = Rows(logits(vocab, spread, ties=ties, seed=seed), tokens_V, 1000 * seed)
        sampling = rows.sampling().to(DEVICE)
        index_R = (
            on(DEVICE).choose(filtered(rows.logits_RV, sampling), sampling.seed_R, sampling.position_R, tokens_V).long()
        )
        expected = (index_R if tokens_V is None else tokens_V[index_R]).tolist()
        found = rows.drawn()
        others += sum(a != b for a, b in zip(found, expected, strict=True))
        columns_R = choose(rows.logits_RV, rows.sampling(), tokens_V).long()
        assert (columns_R if tokens_V is None else tokens_V[columns_R]).tolist() == found
    # The mass that top-p is of is summed in fp32 there: an edge within its last bits may be another.
    assert others <= 1


@pytest.mark.parametrize(("vocab", "spread"), SHAPES)
def test_a_rows_choice_does_not_depend_on_the_others(vocab: int, spread: float) -> None:
    rows = Rows(logits(vocab, spread, ties=True, seed=9), None, 5)
    together = rows.drawn()
    assert rows.drawn() == together
    turned = Rows(rows.logits_RV.clone(), None, 5)
    turned.logits_RV[1:] = turned.logits_RV[1:].flip(1)
    assert turned.drawn()[0] == together[0]


def test_more_rows_than_a_step_has() -> None:
    made = logits(1000, 2.0, ties=False, seed=1).repeat(3, 1)
    sampling = Sampling.of([SamplingParams(temperature=0.8, top_p=0.7, seed=5)] * len(made), list(range(len(made))))
    together = choose(made.to(DEVICE), sampling).tolist()
    alone = [int(choose(row_V[None].to(DEVICE), sampling.of_rows(torch.tensor([r])))) for r, row_V in enumerate(made)]
    assert together == alone and len(set(together)) > 20


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_distribution_is_told(wrong: float) -> None:
    made = logits(1000, 1.0, ties=False, seed=0)
    made[3, 999], made[8, 0] = wrong, wrong
    made[9] = -torch.inf
    found = Rows(made, None, 0).drawn()
    assert [r for r, token in enumerate(found) if token < 0] == [3, 8, 9]


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("vocab", "spread"), SHAPES)
def test_drafts_rank_as_is_defined(vocab: int, spread: float, ties: bool, is_mapped: bool) -> None:
    tokens_V = tokens_of(vocab) if is_mapped else None
    rows = Rows(logits(vocab, spread, ties=ties, seed=3), tokens_V, 77)
    own_RV, extra_R = rows.perturbed()
    top_R = own_RV.amax(dim=1)
    total_R = (own_RV - top_R[:, None]).exp().sum(dim=1) + extra_R * (-top_R).exp()
    count = min(5, vocab)
    score_RK = own_RV.sort(dim=1, descending=True).values[:, :count]
    share_RK = (score_RK - top_R[:, None]).exp() / total_R[:, None]
    expected_RK, expected_share_RK = ranked(rows.logits_RV, rows.sampling(), count, tokens_V)
    torch.testing.assert_close(share_RK.float(), expected_share_RK, atol=3e-4, rtol=3e-3)
    # Of nearly equal guesses either may come first.
    of_expected_RK = own_RV.gather(1, expected_RK.long().clamp(min=0)).where(expected_RK >= 0, -torch.inf)
    torch.testing.assert_close(of_expected_RK, score_RK, atol=1e-3, rtol=1e-4)


def test_what_is_drawn_has_the_distribution() -> None:
    made = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5]]).expand(55, 5).clone()
    counts = [0] * 5
    for seed in range(200):
        rows = Rows(made, None, 10_000 * seed)
        for r, token in enumerate(rows.drawn()):
            if r % len(SETTINGS) == 1:
                counts[token] += 1
    assert sum(counts) == 1000 and p_value(counts, made[0].softmax(dim=0).tolist()) > 1e-4
