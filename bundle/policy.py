"""Who drafts, what shape a draft has, and the numbers that decide when it is verified."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ssv.support.strict import Given

MAX_PENDING = 64
"""Most tokens that may be pending, as a tree or a chain."""

LONGEST_NGRAM = 16
"""Most tokens of an n-gram that prompt lookup looks up: an index of a text holds its n-grams of each length."""

RESERVED_LENGTH = 2 * MAX_PENDING
"""Tokens of each row of a cache that no sequence can have: room for what is pending, and for its padding."""

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1, le=MAX_PENDING)]
"""Of what is pending at a time."""


# Prompt lookup's n-grams, suffix decoding's longest suffix and its least probable path, unless a policy says otherwise.
_PUBLISHED_NGRAM, _PUBLISHED_SUFFIX, _PUBLISHED_PROBABILITY = 3, 32, 0.1

_OF_LOOK_UPS = {
    "shortest_match": ("prompt-lookup",),
    "longest_match": ("prompt-lookup", "suffix"),
    "min_probability": ("suffix",),
}


class TypicalAcceptance(Given):
    """Medusa's rule for sampled output (Cai et al. 2024, arXiv:2401.10774, section 2.3.1), with its authors' numbers: a
    drafted token is kept if the target gives it a probability above min(posterior_threshold, posterior_alpha *
    exp(-H)), H being the entropy of what the target says there, in nats.

    Attributes:
        posterior_threshold: epsilon in the paper.
        posterior_alpha: delta in the paper, which has sqrt(epsilon) for it.
    """

    posterior_threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.09
    posterior_alpha: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3


class Policy(Given):
    """What is drafted, when drafted tokens are trusted, and when the target is asked.

    With r the scorer's probability that the target would reject a token:

    Attributes:
        drafter: who proposes tokens, see `ssv.runtime.decode.drafters`.
        accept_below: r below it: trusted, committed without being judged. 0 trusts nothing, which is lossless.
        verify_above: r above it: critical, asks for a target pass now.
        risk_budget: a pass also runs when 1 - prod(1 - r) over the pending, not trusted tokens exceeds it. 1 never
            does.
        max_pending: and when so many tokens are pending. 0 drafts nothing: autoregressive decoding.
        children: most children of a node by its depth, the root's first; the last number is also that of all deeper
            ones. (1,) is a chain.
        beam: most nodes of a level that get children: those that are most probably right.
        max_depth: most tokens of a path; None for as many as may be pending.
        pays: draft only what saves more time than it costs, by costs that were measured (`ssv.runtime.decode.costs`).
        shortest_match: prompt lookup looks up no fewer of the text's last tokens; None for 1, the published default.
        longest_match: prompt lookup and suffix decoding look up no more of them; None for the published defaults, 3 and
            32.
        min_probability: suffix decoding drafts no path that is less probable; None for 0.1, the published default.
        typical: keep drafted tokens of sampled output that are typical of the target, not its own choice alone; None
            keeps that alone. Greedy output has no other choice, and stays exact.
    """

    drafter: Literal["model", "heads", "prompt-lookup", "suffix", "lookahead"] = "model"

    accept_below: Probability
    verify_above: Probability
    risk_budget: Probability
    max_pending: Annotated[int, Field(ge=0)]

    children: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)
    beam: Count = 1
    max_depth: Count | None = None
    pays: bool = False
    shortest_match: Count | None = None
    longest_match: Count | None = None
    min_probability: Probability | None = None
    typical: TypicalAcceptance | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pays and self.drafter == "lookahead":
            raise ValueError(
                "lookahead cannot draft only what pays: its window is run for later passes. Leave `pays` out"
            )
        if self.typical is not None:
            if self.drafter != "heads":
                raise ValueError(
                    f"typical acceptance is a rule for Medusa's heads, not for the drafter {self.drafter!r}"
                )
            if self.accept_below > 0:
                raise ValueError("typical acceptance judges every token. Leave `accept_below` at 0")
            if self.pays:
                raise ValueError(
                    "typical acceptance keeps other tokens of other trees, and what pays depends on other requests. "
                    "Leave `pays` out"
                )
        if self.accept_below > 0 and self.drafter != "model":
            raise ValueError(
                f"{self.drafter} proposes tokens without a score by which they could be trusted. Leave `accept_below` "
                "at 0, or take the drafter 'model'"
            )
        return self

    @model_validator(mode="after")
    def _looks_up_what_its_drafter_can(self) -> Self:
        for name, drafters in _OF_LOOK_UPS.items():
            if getattr(self, name) is not None and self.drafter not in drafters:
                raise ValueError(f"`{name}` is of {' and '.join(drafters)}, not of the drafter {self.drafter!r}")
        if self.drafter == "prompt-lookup":
            shortest, longest = self.lengths_of_match
            if longest > LONGEST_NGRAM:
                raise ValueError(f"prompt lookup looks up at most {LONGEST_NGRAM} tokens: lower `longest_match`")
            if shortest > longest:
                raise ValueError(
                    f"no n-gram has {shortest} tokens at least and {longest} at most: lower `shortest_match` or raise "
                    "`longest_match`"
                )
        return self

    @property
    def lengths_of_match(self) -> tuple[int, int]:
        """Least and most of the text's last tokens that are looked up in the text, by those who do."""
        longest = _PUBLISHED_NGRAM if self.drafter == "prompt-lookup" else _PUBLISHED_SUFFIX
        return self.shortest_match or 1, self.longest_match or longest

    @property
    def least_probability(self) -> float:
        """Probability of a path below which suffix decoding does not draft it."""
        return _PUBLISHED_PROBABILITY if self.min_probability is None else self.min_probability

    @property
    def lossless(self) -> bool:
        """Whether output is plain decoding's, token for token, greedy or sampled."""
        return self.lossless_for(greedy=False)

    def lossless_for(self, *, greedy: bool) -> bool:
        """Whether greedy output is, or sampled output."""
        keeps_others = self.accept_below > 0.0 or (self.typical is not None and not greedy)
        return not keeps_others or self.max_pending == 0

    @property
    def recalls(self) -> bool:
        """Whether what followed the same words before is drafted beside what a draft model says, where that pays. It
        needs branches, and has no score by which it could be trusted."""
        return self.pays and self.lossless and self.drafter == "model" and not self.is_chain

    @property
    def is_chain(self) -> bool:
        """Whether what it drafts has no branches."""
        return max(self.children) == 1

    def children_of(self, depth: int) -> int:
        """Most children of a node of a depth, the root's being 0."""
        return self.children[min(depth, len(self.children) - 1)]


def verify_all(max_pending: int, **shape: Any) -> Policy:
    """Drafts up to so many tokens, in whatever shape, and has the target judge each of them: lossless.

    Args:
        shape: further fields of a policy.
    """
    return Policy(accept_below=0.0, verify_above=1.0, risk_budget=1.0, max_pending=max_pending, **shape)
