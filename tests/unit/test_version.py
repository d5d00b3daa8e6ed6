"""Every command says its version."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points, version

import pytest

from ssv.triton_repo.openai import process

COMMANDS = {entry.name: entry for entry in entry_points(group="console_scripts") if entry.value.startswith("ssv.")}


def test_there_are_commands() -> None:
    assert COMMANDS.keys() >= {"ssv-build", "ssv-generate", "ssv-serve", "ssv-bench", "ssv-ab"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_says_its_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    says_version(COMMANDS[name].load(), name, capsys)


def test_the_openai_api_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    says_version(process.main, "python -m ssv.triton_repo.openai.process", capsys)


def says_version(main: Callable[[list[str]], int], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{name} {version('ssv')}\n"
