"""Whether rounds that draft are faster than rounds that do not, by the clock.

Costs that were measured beforehand know nothing of what the host does around an engine's steps, of how long the texts
are, or of what else the machine does. So the last word on what pays has what rounds really gave: tokens of all rows
over the seconds between one round's beginning and the next one's. A rate is believed only against one that was measured
shortly before, as machines change too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ssv.bundle.policy import MAX_PENDING

WEIGHT = 0.1
"""Of a round in a running mean."""

LONG_WEIGHT = 1 / 64
"""The same of rates: over many rounds one is bound to have a bad time once, and would be left for it."""

TRIALS = 8
"""Rounds before their rate is believed."""

SETTLING = 2
"""Rounds after a change from one to the other that are not counted: some of what went before is still under way."""

RETRY = 64
"""Rounds, times the rows that share them, after which what did not pay is tried again: texts change, and the load does.
Twice as many after each trial in vain."""

MOST_PATIENCE = 16 * RETRY

MOST_COMPANIES = 1024
"""That are remembered; requests may bring policies of their own."""

MARGIN = 1.02
"""By so much plain decoding has to be faster before drafting is left: going back and forth costs some rounds, too."""

DOUBT = 0.5
"""Standard errors of what drafting gave that are added to that: a draft that loses clearly is left after `TRIALS`
rounds, one that seems to lose by little is looked at for longer, which costs little. (Simulated, 8 rows, 3,000 rounds:
a draft that gains 15 % keeps 99 % of the rounds; without this 61 %, as a bad time once was enough to leave it. One that
loses 10 % has 1 % of them either way.)"""

INTERRUPTED = 4.0
"""A round that took so many times the mean was not only a round: a prompt came, a graph was captured, or the machine
did something else."""


@dataclass(slots=True)
class Patience:
    """When something that did not pay is tried again."""

    waited: int = 0
    most: int = RETRY

    def is_over(self, num_rows: int) -> bool:
        """Whether it is, after a round of so many rows without it."""
        self.waited += 1
        if self.waited < self.most * num_rows:
            return False
        self.waited, self.most = 0, min(2 * self.most, MOST_PATIENCE)
        return True

    def renew(self) -> None:
        """It pays."""
        self.waited, self.most = 0, RETRY


@dataclass(slots=True)
class Mean:
    """A running mean of seconds that leaves interruptions out, and lets none stay that it began with."""

    seconds: float = 0.0
    count: int = 0
    weight: float = WEIGHT

    def note(self, seconds: float) -> bool:
        """Whether it was taken in."""
        if self.count and seconds > INTERRUPTED * self.seconds:
            return False
        if self.count and INTERRUPTED * seconds < self.seconds:
            self.count = 0
        self.count += 1
        self.seconds += self.share * (seconds - self.seconds)
        return True

    @property
    def share(self) -> float:
        """What the last value has of the mean."""
        return max(self.weight, 1 / self.count)


@dataclass(slots=True)
class _Rate:
    """Running means of rounds: tokens of all rows, and seconds; and variances of both."""

    time: Mean = field(default_factory=lambda: Mean(weight=LONG_WEIGHT))
    tokens: float = 0.0
    tokens_variance: float = 0.0
    seconds_variance: float = 0.0

    def note(self, tokens: float, seconds: float) -> None:
        seconds_off = seconds - self.time.seconds
        if not self.time.note(seconds):
            return
        share, tokens_off = self.time.share, tokens - self.tokens
        self.tokens += share * tokens_off
        # Of a first round, which is all of the mean, nothing is left of what was before.
        self.tokens_variance = (1 - share) * (self.tokens_variance + share * tokens_off**2)
        self.seconds_variance = (1 - share) * (self.seconds_variance + share * seconds_off**2)

    @property
    def is_believed(self) -> bool:
        return self.time.count >= TRIALS

    @property
    def per_second(self) -> float:
        return self.tokens / self.time.seconds

    @property
    def per_second_at_most(self) -> float:
        """What it may be, and a little more: what others have to be better than."""
        spread = self.tokens_variance / self.tokens**2 + self.seconds_variance / self.time.seconds**2
        return (MARGIN + DOUBT * math.sqrt(spread / self.time.count)) * self.per_second


@dataclass(slots=True)
class _Company:
    """Rows side by side: whether they may draft now, and what rounds gave in which they might and might not.

    Attributes:
        is_compared: whether both rates have been, since plain decoding was tried.
        patience: until drafting is tried again.
        calm: until plain decoding is, once drafting was found no slower.
    """

    drafts: bool = True
    drafted: _Rate = field(default_factory=_Rate)
    plain: _Rate = field(default_factory=_Rate)
    settling: int = 0
    is_compared: bool = False
    patience: Patience = field(default_factory=Patience)
    calm: Patience | None = None

    @property
    def is_known(self) -> bool:
        """Whether it has rounds of its own to go by."""
        return self.drafted.is_believed or self.plain.is_believed

    def change(self, *, drafts: bool) -> None:
        self.drafts, self.settling = drafts, SETTLING


@dataclass(frozen=True, slots=True)
class _Round:
    """The round under way."""

    company: _Company
    num_tokens: int
    began: float
    drafts: bool


class Pace:
    """Lets rows draft as long as that gives more tokens per second than plain decoding of the same rows.

    Rows of the same number and the same policies are taken to be alike; of a number that was hardly seen, like those of
    the nearest that was.
    """

    def __init__(self, clock: Callable[[], float] | None = time.perf_counter) -> None:
        """Begins with nothing measured.

        Args:
            clock: seconds; None leaves what pays to costs alone.
        """
        self._clock = clock
        self._companies: dict[tuple[int, frozenset[int]], _Company] = {}
        # Of what was asked for: found once, and again when other companies are believed than were then.
        self._nearest: dict[tuple[int, frozenset[int]], _Company | None] = {}
        self._under_way: _Round | None = None

    def begin(
        self,
        num_rows: int,
        policies: frozenset[int],
        num_tokens: int,
        plain_s: float | None,
        *,
        is_filling: bool = False,
    ) -> bool:
        """A round begins; returns whether its rows may draft.

        Args:
            policies: whatever tells them apart.
            num_tokens: of the rows' texts together.
            plain_s: of a round without a draft, by costs: what drafting is held against until plain decoding has been
                tried; None where nobody knows.
            is_filling: whether further rows are about to join: a few rounds of so many would be no trial of a draft
                that nothing is known of.
        """
        if self._clock is None:
            return True
        now = self._clock()
        company = self._company(num_rows, policies)
        self._close(company, num_rows, num_tokens, now)
        if not company.is_known:
            nearest = self._nearest_drafts(num_rows, policies)
            if nearest is None and is_filling:
                self._under_way = None
                return False
            if nearest is not None and nearest != company.drafts:
                company.change(drafts=nearest)
                company.is_compared = not nearest
        if company.drafts:
            self._consider_plain(company, num_rows / plain_s if plain_s else None)
        else:
            self._consider_drafting(company, num_rows)
        self._under_way = _Round(company, num_tokens, now, company.drafts)
        return company.drafts

    def would_draft(self, num_rows: int, policies: frozenset[int]) -> bool:
        """Whether rows of such a number and such policies might draft, as far as is known."""
        known = self._companies.get((num_rows, policies))
        if known is not None and known.is_known:
            return known.drafts
        return self._nearest_drafts(num_rows, policies) is not False

    def forget(self) -> None:
        """What the round under way takes is not only its own: rows come or go."""
        self._under_way = None

    def _company(self, num_rows: int, policies: frozenset[int]) -> _Company:
        if (known := self._companies.get((num_rows, policies))) is not None:
            return known
        drafts = self.would_draft(num_rows, policies)
        if len(self._companies) >= MOST_COMPANIES:
            oldest = self._companies.pop(next(iter(self._companies)))
            if oldest.drafted.is_believed:
                self._nearest.clear()
        # What is only supposed is not measured again at once: the next trial is a draft's.
        found = self._companies[num_rows, policies] = _Company(drafts, is_compared=not drafts)
        return found

    def _nearest_drafts(self, num_rows: int, policies: frozenset[int]) -> bool | None:
        """Whether the rows do whose number is the nearest, of those that were seen to; None if there are none."""
        if (num_rows, policies) not in self._nearest:
            if len(self._nearest) >= MOST_COMPANIES:
                self._nearest.clear()
            self._nearest[num_rows, policies] = self._look_for_nearest(num_rows, policies)
        nearest = self._nearest[num_rows, policies]
        return nearest.drafts if nearest is not None else None

    def _look_for_nearest(self, num_rows: int, policies: frozenset[int]) -> _Company | None:
        judged = {num: it for (num, of), it in self._companies.items() if of == policies and it.drafted.is_believed}
        nearest = min(judged, key=lambda num: max(num, num_rows) / min(num, num_rows), default=None)
        return judged[nearest] if nearest is not None else None

    def _close(self, company: _Company, num_rows: int, num_tokens: int, now: float) -> None:
        if (last := self._under_way) is None or last.company is not company:
            return
        if company.settling:
            company.settling -= 1
            return
        gained = num_tokens - last.num_tokens
        if 0 < gained <= num_rows * (1 + MAX_PENDING):
            was_believed = company.drafted.is_believed
            (company.drafted if last.drafts else company.plain).note(gained, now - last.began)
            if company.drafted.is_believed != was_believed:
                self._nearest.clear()

    @staticmethod
    def _consider_plain(company: _Company, by_costs: float | None) -> None:
        """Tries plain decoding where it seems to be faster."""
        if not company.drafted.is_believed:
            return
        if company.calm is not None and not company.calm.is_over(1):
            return
        known = company.plain.per_second if company.plain.is_believed else by_costs
        if known is not None and company.drafted.per_second_at_most < known:
            company.change(drafts=False)
            company.is_compared, company.plain = False, _Rate()
        else:
            company.patience.renew()
            company.calm = None

    def _consider_drafting(self, company: _Company, num_rows: int) -> None:
        """Goes back to drafting if plain decoding turns out to be no faster; tries it again after a while if it is."""
        if company.plain.is_believed and not company.is_compared:
            company.is_compared = True
            if company.plain.per_second <= company.drafted.per_second_at_most:
                company.change(drafts=True)
                company.calm = company.calm or Patience()
            else:
                company.calm = None
        elif company.patience.is_over(num_rows):
            company.change(drafts=True)
            company.drafted = _Rate()
            self._nearest.clear()
