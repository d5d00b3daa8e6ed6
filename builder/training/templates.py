"""Whole turns of users, made from templates by combining lists: what people ask for looks like neither of a target's
own inventions.

A file of templates is YAML:

    lists:
      city: [Lyon, Osaka]
      trip: ["a weekend in {city}", "a bicycle tour around {city}"]
    first:                       # turns that begin a conversation, by kind; kinds are equally frequent
      travel: ["Plan {trip} for {int:2-5} people.", "Is {city} or {city#other} better for {trip}?"]
    later: ["Shorter, please.", "And in {city}?"]
    kept:                        # first turns that are never trained on, to choose among checkpoints by
      travel: ["Which museums are there in {city}?"]

A slot is filled with an entry of the list of its name, which may have slots itself, or with a whole number of a range.
The same slot in one turn is filled the same; another mark after # makes it another slot.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from ssv.support.errors import UserError
from ssv.support.strict import Strict, problems
from ssv.support.yaml_text import read_yaml

_SLOT = re.compile(r"\{([a-z_]+)(?::(\d+)-(\d+))?(?:#\w+)?\}")
_NUMBER = "int"
_MOST_DEPTH = 8

_CASUAL_SHARE = 0.12
"""Share of the turns that are written as in haste: small letters, no full stop."""

Templates = Annotated[list[str], Field(min_length=1)]


class TemplateFile(Strict):
    """A file of templates; the head of this module describes it."""

    lists: dict[str, Templates] = Field(default_factory=dict)
    first: Annotated[dict[str, Templates], Field(min_length=1)]
    later: list[str] = Field(default_factory=list)
    kept: dict[str, Templates] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fills_every_slot(self) -> TemplateFile:
        depths: dict[str, int] = {}
        for text in self._texts():
            for name, low, high in _SLOT.findall(text):
                if name == _NUMBER and low and int(low) <= int(high):
                    continue
                if name == _NUMBER or low:
                    raise ValueError(f"{text!r}: {{{name}}} is no range such as {{int:2-9}}")
                if name not in self.lists:
                    raise ValueError(f"{text!r}: there is no list {name}")
                self._depth(name, depths, ())
        return self

    def _depth(self, name: str, depths: dict[str, int], within: tuple[str, ...]) -> int:
        if name in within:
            raise ValueError(f"list {name} is made of itself")
        if name not in depths:
            inner = {slot for text in self.lists[name] for slot, _, _ in _SLOT.findall(text)} & self.lists.keys()
            depths[name] = 1 + max((self._depth(slot, depths, (*within, name)) for slot in inner), default=0)
        return depths[name]

    def _texts(self) -> Iterator[str]:
        for group in (self.lists, self.first, self.kept):
            for texts in group.values():
                yield from texts
        yield from self.later


@dataclass(frozen=True, slots=True)
class MadeTurns:
    """Turns made of templates: such that begin a conversation, such that go on with one, and such that are kept."""

    first: list[str]
    later: list[str]
    kept: list[str]


def make_turns(path: Path, num: int, num_kept: int, seed: int) -> MadeTurns:
    """Makes turns of a file of templates, no two the same; the same seed gives the same.

    Args:
        num: first turns, and half as many later ones; fewer where the templates give no more.

    Raises:
        UserError: the file cannot be read or used.
    """
    try:
        file = TemplateFile.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {problems(error, 'templates')}") from error
    rng = random.Random(seed)
    return MadeTurns(
        first=_different(file.first, file.lists, num, rng),
        later=_different({"later": file.later} if file.later else {}, file.lists, num // 2, rng),
        kept=_different(file.kept, file.lists, num_kept, rng),
    )


def _different(
    kinds: Mapping[str, list[str]], lists: Mapping[str, list[str]], num: int, rng: random.Random
) -> list[str]:
    made: dict[str, None] = {}
    names = list(kinds)
    for _ in range(4 * num if names else 0):
        if len(made) == num:
            break
        text = fill(rng.choice(kinds[rng.choice(names)]), lists, rng)
        if rng.random() < _CASUAL_SHARE and "\n" not in text:
            text = text.lower().rstrip(".!")
        made[text] = None
    return list(made)


def fill(template: str, lists: Mapping[str, list[str]], rng: random.Random) -> str:
    """A template with its slots filled."""
    filled: dict[str, str] = {}

    def value(slot: re.Match[str]) -> str:
        whole, (name, low, high) = slot.group(0), slot.groups()
        if whole not in filled:
            if name == _NUMBER:
                filled[whole] = str(rng.randint(int(low), int(high)))
            else:
                # Not twice the same for {city} and {city#other}.
                others = {text for key, text in filled.items() if key[1:-1].split("#")[0] == name}
                choices = [entry for entry in lists[name] if entry not in others] or lists[name]
                filled[whole] = rng.choice(choices)
        return filled[whole]

    for _ in range(_MOST_DEPTH):
        new = _SLOT.sub(value, template)
        if new == template:
            break
        template = new
    return template
