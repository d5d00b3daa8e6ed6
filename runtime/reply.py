"""A response of the server.

Its outputs are declared here, and nowhere else: whoever sends, reads or configures them asks this class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_type_hints


def _output(name: str, meaning: str, **how: Any) -> Any:
    """A field of `Reply`: the name that its tensor, of one element, has, and what it is."""
    return field(metadata={"name": name, "meaning": meaning}, **how)


@dataclass(frozen=True, slots=True)
class Reply:
    """One response of a stream, or the only one. Counts are of the request so far, but for the output's tokens."""

    text: str = _output("text_output", "new text")
    finish_reason: str = _output("finish_reason", "why the answer ended; empty but for the last response")
    num_input_tokens: int = _output("num_input_tokens", "tokens of the prompt")
    num_output_tokens: int = _output("num_output_tokens", "new tokens")
    judged: int = _output("total_draft_tokens", "drafted tokens that the target judged")
    accepted: int = _output("total_accepted_draft_tokens", "judged tokens that it kept")
    unverified: int = _output("ssv_unverified_tokens", "emitted tokens that the target never judged")
    typical: int = _output("ssv_typical_tokens", "judged tokens that it kept although it would have chosen others")
    target_passes: int = _output("ssv_target_passes", "target steps after the prompt's")
    cached_tokens: int = _output("ssv_cached_tokens", "tokens of the prompt that had been computed before")
    tier: str = _output("ssv_tier_used", "how it was decoded")
    lossless: bool = _output("ssv_lossless", "whether the output is what the target alone would have said")
    drafted: int = _output("ssv_draft_tokens", "tokens that were drafted, judged or not", default=0)
    kept_per_pass: str = _output(
        "ssv_kept_per_pass",
        "JSON list: how many target passes kept no drafted token, one, two, and so on; empty before the end",
        default="",
    )
    withdrawn_tier: str = _output(
        "ssv_tier_withdrawn", "the tier that was asked for, where it was withdrawn; empty where it was not", default=""
    )
    arm: str = _output("ssv_arm", "the arm that an A/B router chose; empty where none did", default="")
    logprobs: str = _output("ssv_logprobs", "JSON of log-probabilities that were asked for; empty without", default="")
    fates: str = _output("ssv_fates", "JSON of how each token came about, if asked for; empty without", default="")
    acceptance_rate: float = _output("acceptance_rate", "share of the judged tokens that were kept", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "acceptance_rate", self.accepted / self.judged if self.judged else 0.0)

    def outputs(self) -> dict[str, str | bool | int | float]:
        """The elements of the tensors, by name."""
        return {output.name: getattr(self, output.attribute) for output in outputs()}

    @classmethod
    def read(cls, element: Callable[[str], Any]) -> Reply:
        """Makes a reply of the elements of tensors, which are asked for by name; bytes are UTF-8.

        Raises:
            UnicodeDecodeError: they are not.
        """
        given = {output.attribute: element(output.name) for output in outputs() if not output.is_derived}
        kinds = {output.attribute: output.kind for output in outputs()}
        return cls(**{name: each.decode() if kinds[name] is str else kinds[name](each) for name, each in given.items()})


@dataclass(frozen=True, slots=True)
class Output:
    """What is declared of an output.

    Attributes:
        name: of its tensor.
        attribute: of `Reply`.
        kind: str, bool, int or float.
        meaning: in words.
        is_derived: whether it follows from the others.
    """

    name: str
    attribute: str
    kind: type
    meaning: str
    is_derived: bool


@cache
def outputs() -> tuple[Output, ...]:
    """All outputs, in their order."""
    kinds = get_type_hints(Reply)
    return tuple(
        Output(each.metadata["name"], each.name, kinds[each.name], each.metadata["meaning"], not each.init)
        for each in fields(Reply)
    )
