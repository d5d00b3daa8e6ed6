"""What every command line says of its options."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from importlib.metadata import entry_points

import pytest

from ssv.triton_repo.openai import process

Option = tuple[str, argparse.ArgumentParser, argparse.Action]


def parsers() -> Iterator[argparse.ArgumentParser]:
    """The parsers of all commands, and of their subcommands."""
    commands = [entry for entry in entry_points(group="console_scripts") if entry.name.startswith("ssv-")]
    assert len(commands) == 6
    for parser in (*(importlib.import_module(entry.module)._parser() for entry in commands), process._parser()):
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()


def arguments() -> Iterator[Option]:
    for parser in parsers():
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction | argparse._VersionAction | argparse._SubParsersAction):
                yield (
                    f"{parser.prog} {action.option_strings[-1] if action.option_strings else action.dest}",
                    parser,
                    action,
                )


ARGUMENTS = list(arguments())
NAMES = [name for name, *_ in ARGUMENTS]


def shown(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The help as it is shown."""
    return parser._get_formatter()._expand_help(action) if action.help else ""


def lacks(parser: argparse.ArgumentParser, action: argparse.Action) -> str | None:
    """What is missing of an argument's help."""
    help = shown(parser, action)
    if not help:
        return "it says nothing"
    either_or = any(group.required and action in group._group_actions for group in parser._mutually_exclusive_groups)
    if action.required or either_or:
        return None
    said = re.search(r"\(default: (.+)\)$", help)
    if said is None:
        return "it does not end with its default"
    if action.default in (None, False, "") or action.default == []:
        return None
    value = re.split(r"[,;] ", said[1])[0]
    return None if value == str(action.default) else f"it says {value}, and the default is {action.default}"


@pytest.mark.parametrize("argument", ARGUMENTS, ids=NAMES)
def test_help_says_the_default(argument: Option) -> None:
    _, parser, action = argument
    assert lacks(parser, action) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"type": int, "default": 3}, "it says nothing"),
        ({"type": int, "default": 3, "help": "tokens"}, "it does not end with its default"),
        ({"type": int, "default": 3, "help": "tokens (default: 4)"}, "it says 4, and the default is 3"),
        ({"action": "store_true", "help": "quiet"}, "it does not end with its default"),
        ({"type": int, "default": 3, "help": "tokens (default: %(default)s, enough)"}, None),
        ({"action": "store_true", "help": "quiet (default: off)"}, None),
        ({"required": True, "help": "what to serve"}, None),
    ],
)
def test_what_lacks_is_found(options: dict[str, object], said: str | None) -> None:
    parser = argparse.ArgumentParser()
    assert lacks(parser, parser.add_argument("--x", **options)) == said  # type: ignore[arg-type]


def test_one_word_for_one_thing() -> None:
    """Bundles, rows and methods are called the same in every command."""
    names = {name.partition(" --")[2] for name in NAMES}
    assert not names & {"batch", "max-batch", "rows", "tier", "tiers", "model", "checkpoints"}
    assert {"bundle", "max-rows", "method"} <= names
    assert not [name for name in NAMES if name.endswith(" bundle")], "a bundle is an option everywhere"
