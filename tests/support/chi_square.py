"""Whether counts come from a distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def p_value(counts: Sequence[float], probabilities: Sequence[float], least: float = 5.0) -> float:
    """Pearson's chi-square test: probability of counts at least as far off as these.

    Cells expecting fewer than `least` are put together. A count where nothing can be gives 0.
    """
    total = float(sum(counts))
    cells: list[tuple[float, float]] = []
    rest_seen = rest_expected = 0.0
    for seen, probability in zip(counts, probabilities, strict=True):
        if probability == 0.0 and seen:
            return 0.0
        if probability * total < least:
            rest_seen, rest_expected = rest_seen + seen, rest_expected + probability * total
        else:
            cells.append((seen, probability * total))
    if rest_expected >= least:
        cells.append((rest_seen, rest_expected))
    elif cells and rest_expected:
        seen, expected = cells.pop()
        cells.append((seen + rest_seen, expected + rest_expected))
    if len(cells) < 2:
        return 1.0
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
